"""A model in hand: its steps are the capture's, with recorders and interventions on the way."""

import numpy as np
import pytest
import torch
from PIL import Image

import flux_ir
from flux_ir.api.models import check_latent, check_loaded
from flux_ir.errors import FluxIRError


@pytest.fixture(scope="module")
def model():
    return flux_ir.load_model("flux-tiny")


@pytest.fixture(scope="module")
def text(model):
    return flux_ir.encode_prompt(model, "a red circle")


def test_the_parts_give_the_picture_of_the_whole_command(model, text, tmp_path):
    done = flux_ir.capture(
        "a red circle", model="flux-tiny", num_steps=2, seed=5, output_dir=tmp_path, should_decode_intermediates=False
    )
    sink = flux_ir.MemorySink()
    with flux_ir.Recorder(model, "single.*.img", sink):
        *_, last = flux_ir.sample(model, text, seed=5, num_steps=2)
    recorded = flux_ir.read_capture(done.folder)
    assert torch.equal(sink.read("single.3.img", 1), recorded.read("single.3.img", 1))
    pixels = flux_ir.decode(model, last.after)
    Image.fromarray(pixels[0].numpy()).save(tmp_path / "again.png")
    with Image.open(done.picture) as picture:
        assert np.abs(np.asarray(picture).astype(int) - pixels[0].numpy()).mean() < 4  # a JPEG of the same


def test_several_prompts_are_sampled_together_each_from_its_own_noise(model):
    *_, both = flux_ir.sample(model, ["a red circle", "a blue square"], seed=[5, 9], num_steps=1, width=64, height=32)
    *_, alone = flux_ir.sample(model, "a blue square", seed=9, num_steps=1, width=64, height=32)
    torch.testing.assert_close(both.after[1:].float(), alone.after.float(), atol=0.05, rtol=0.05)
    assert flux_ir.decode(model, both.after, width=64, height=32).shape == (2, 32, 64, 3)


def test_an_intervention_takes_the_loaded_model(model, text):
    *_, plain = flux_ir.sample(model, text, num_steps=1, width=32, height=32)
    with flux_ir.Intervention(model, {"single.2.img.update": lambda value, step: 0 * value}):
        *_, changed = flux_ir.sample(model, text, num_steps=1, width=32, height=32)
    *_, again = flux_ir.sample(model, text, num_steps=1, width=32, height=32)
    assert torch.equal(plain.after, again.after)
    assert not torch.equal(plain.after, changed.after)


def test_a_latent_of_another_size_is_refused(model):
    with pytest.raises(FluxIRError, match="32 x 32 px has 4 image tokens: got a latent of 64"):
        flux_ir.decode(model, torch.zeros(1, 64, 64), width=32, height=32)


def test_what_cannot_be_sampled_is_told_by_the_call_itself(model):
    with pytest.raises(FluxIRError, match="multiples of 16"):
        flux_ir.sample(model, "a red circle", width=100)


def test_only_the_parts_asked_for_are_loaded(monkeypatch):
    monkeypatch.setattr("flux_ir.models.suite.load_t5", lambda *args, **more: pytest.fail("T5 was loaded"))
    loaded = flux_ir.load_model("flux-tiny", parts=["transformer"])
    assert loaded.flux.params.depth == 4


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(FluxIRError) as caught:
        flux_ir.load_model("flux-tny")
    assert caught.value.hint == "did you mean flux-tiny?"


def test_a_model_that_is_only_named_and_what_is_no_latent_are_refused(model):
    check_loaded(model)
    with pytest.raises(FluxIRError, match="the model must be loaded: got 'flux-tiny'"):
        check_loaded("flux-tiny")
    *_, last = flux_ir.sample(model, "a red circle", num_steps=1, width=16, height=16)
    check_latent(last.after)
    for latent, got in ((last, "Step"), (last.after[0], r"\[1, 64\]")):
        with pytest.raises(FluxIRError, match=rf"a latent must be a tensor \[batch, tokens, channels\]: got {got}"):
            check_latent(latent)
