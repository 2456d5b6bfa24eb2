"""The work behind the page: its pictures are those of the command line, and what may be wrong is said."""

import shlex

import pytest
import torch

from flux_ir import FluxIRError
from flux_ir.commands.main import main
from flux_ir.playing.server import bound
from flux_ir.playing.studio import PlaySettings, Turned, open_studio
from flux_ir.sampling.image import jpeg_bytes

PROMPT = "a large red circle on the left on a white background"


@pytest.fixture(scope="module")
def before(studio):
    return studio.generate(PROMPT, seed=7)


@pytest.fixture(scope="module")
def feature(studio, before):
    return studio.features(before, token=27, step=1)[0].feature


def test_strength_zero_gives_the_same_bytes_and_another_does_not(studio, before, feature):
    zero = studio.generate(PROMPT, seed=7, edits=studio.edits([Turned(0, feature, 0.0)]))
    assert studio.compare(zero, before).identical
    after = studio.generate(PROMPT, seed=7, edits=studio.edits([Turned(0, feature, 3.0)], region=[0, 1, 8, 9]))
    price = studio.compare(after, before)
    assert not price.identical
    assert price.latent_inside > price.latent_outside


def test_the_command_makes_the_very_same_picture(studio, before, feature, tmp_path, capsys):
    edits = studio.edits([Turned(0, feature, 3.0), Turned(0, (feature + 1) % 64, -1.0)], region=[27, 28], steps=[1, 2])
    after = studio.generate(PROMPT, seed=7, edits=edits)
    for generation in (before, after):
        words = shlex.split(studio.command(generation))
        assert words[0] == "flux-ir"
        only_the_picture = ["--output_dir", str(tmp_path), "--should_decode_intermediates", "False"]
        assert main([*words[1:], *only_the_picture]) == 0
        made = tmp_path / capsys.readouterr().out.split()[2] / "img_0.jpg"
        assert made.read_bytes() == jpeg_bytes(generation.picture[None], model="flux-tiny", prompt=PROMPT)


def test_the_last_block_at_the_last_step_has_drawn_the_picture(studio, before):
    views = studio.beliefs(before, 2)
    assert [str(site) for site, _ in views][::11] == ["double.0.img", "single.7"]
    assert torch.equal(views[-1][1], before.picture)


def test_what_is_added_to_a_patch_is_found_there_and_nowhere_outside_the_region(studio, before, feature):
    after = studio.generate(PROMPT, seed=7, edits=studio.edits([Turned(0, feature, 3.0)], region=[27]))
    gain = studio.activity(after, 0, feature, 0) - studio.activity(before, 0, feature, 0)
    assert gain.flatten().argmax() == 27
    assert gain.flatten()[27] > 1
    assert (gain.flatten()[:27] == 0).all()  # at the first step the change has not spread


def test_the_price_is_asked_of_steer_where_all_features_have_one_strength(studio, feature):
    one = studio.generate(PROMPT, edits=studio.edits([Turned(0, feature, 2.0)]))
    assert studio.price_command(one).endswith("--strength 2")
    two = studio.generate(PROMPT, edits=studio.edits([Turned(0, feature, 2.0), Turned(0, (feature + 1) % 64, 1.0)]))
    assert studio.price_command(two) is None


def test_progress_can_end_the_work_and_leaves_no_hook(studio, before):
    class Stop(Exception):  # noqa: N818 (a signal)
        pass

    def stop(event):
        if event.stage == "sample" and event.done == 1:
            raise Stop

    with pytest.raises(Stop):
        studio.generate(PROMPT, seed=7, progress=stop)
    assert torch.equal(studio.generate(PROMPT, seed=7).picture, before.picture)


@pytest.mark.parametrize(
    ("turned", "message"),
    [
        ([], "no feature is turned"),
        ([Turned(0, 64, 1.0)], "random has the features 0 to 63: got 64"),
        ([Turned(0, 1, 1.0), Turned(0, 1, 2.0)], "a feature is turned once"),
        ([Turned(0, number, 1.0) for number in range(5)], "4 features can be turned together: got 5"),
    ],
)
def test_features_that_cannot_be_turned(studio, turned, message):
    with pytest.raises(FluxIRError, match=message):
        studio.edits(turned)


def test_a_step_or_a_patch_that_there_is_not(studio, before):
    with pytest.raises(FluxIRError, match="the steps 0 to 2: got 3"):
        studio.beliefs(before, 3)
    with pytest.raises(FluxIRError, match="64 patches, from 0 to 63: got 64"):
        studio.features(before, token=64, step=0)


def test_an_autoencoder_named_twice(sae):
    with pytest.raises(FluxIRError, match="one autoencoder twice"):
        open_studio(PlaySettings(model="flux-tiny", sae=(sae, f"{sae}/")))


def test_a_port_in_use_is_one_line_and_nothing_is_loaded(capsys):
    with bound(0) as taken:
        port = taken.getsockname()[1]
        assert main(["play", "--model", "flux-tiny", "--port", str(port)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: the port {port} of 127.0.0.1 is in use"
    assert len(said) == 2


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("flux_ir.playing.server.find_spec", lambda name: None)
    assert main(["play", "--model", "flux-tiny"]) == 2
    assert 'hint: pip install "flux-ir[play]"' in capsys.readouterr().err
