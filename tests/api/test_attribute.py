"""`attribute` on flux-tiny: a run and a prompt give the same, removals are those of `steer`, and what may be wrong."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_ir import Edit, FluxIRError, capture, collect, steer
from flux_ir.api.attribute import attribute
from flux_ir.models.checkpoints.locate import locate_transformer
from flux_ir.models.registry import get_spec
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae

PROMPT = "a large red circle on the left on a white background"
LEFT = (0, 0, 64, 128)
FAST = {"probes": 2, "candidates": 2, "controls": 1, "best": 2}
LEAST = {"probes": 1, "candidates": 1, "controls": 0, "best": 1}
PICTURE = {"model": "flux-tiny", "seed": 7, "num_steps": 2, "dtype": "float32"}


def random_sae(folder, name, site="double.2.img", model="flux-tiny", d_in=192):
    return save_sae(make_sae(SAEConfig("topk", d_in=d_in, d_sae=64, k=8, site=site, model=model)), folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attributions")


@pytest.fixture(scope="module")
def sae(folder):
    return random_sae(folder, "random")


@pytest.fixture(scope="module")
def run(folder):
    """A run of two steps, of which one site was recorded."""
    return capture(PROMPT, sites="double.2.img", lens="x0", output_dir=folder / "output", **PICTURE)


@pytest.fixture(scope="module")
def attributed(sae, run, folder):
    """A whole attribution. Read it only."""
    return attribute(run, sae=sae, region=LEFT, output_dir=folder / "out", **FAST)


def test_every_removal_has_its_numbers_and_the_files_say_the_same(attributed):
    assert [row.chosen for row in attributed.table].count(True) == 2
    assert len(attributed.table) == 3
    exact = [row.latent_inside for row in attributed.table]
    assert exact == sorted(exact, reverse=True)
    assert exact[-1] > 0
    stored = json.loads(attributed.numbers.read_text())
    assert stored["settings"]["prompt"] == PROMPT
    assert [(row["feature"], row["latent_inside"]) for row in stored["removals"]] == [
        (row.feature, row.latent_inside) for row in attributed.table
    ]
    assert all(len(row["by_step"]) == 2 for row in stored["removals"])
    assert stored["together"]["features"] == [[0, row.feature] for row in attributed.table[:2]]
    with attributed.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["feature"]) for row in rows] == [row.feature for row in attributed.table]
    assert load_file(attributed.estimates)["0.dots"].shape == (2, 64)
    with Image.open(attributed.sheet) as sheet:
        assert sheet.width > 4 * 128


def test_the_run_and_its_prompt_give_the_same_numbers(attributed, sae, tmp_path):
    again = attribute(prompt=PROMPT, sae=sae, region=LEFT, output_dir=tmp_path, **PICTURE, **FAST)
    assert again.table == attributed.table
    assert again.agreement == attributed.agreement
    assert again.together == attributed.together
    assert not again.notes
    assert not attributed.notes


def test_a_removal_is_the_ablation_of_steer_and_all_at_once_are_one_edit(attributed, sae, tmp_path):
    first, second = ((row.sae, row.feature) for row in attributed.table[:2])
    words = {"seeds": 1, "controls": 0, "strength": 1, "output_dir": tmp_path, **PICTURE}
    pictures = attributed.folder / "pictures"
    both = next(
        path for path in pictures.glob("without_*.png") if path.stem.count("_") == 1 and "difference" not in path.stem
    )
    for features, path in (
        ([first[1]], pictures / f"without_0_{first[1]}.png"),
        ([first[1], second[1]], both),
    ):
        done = steer(PROMPT, edit=Edit(kind="ablate", sae=sae, feature=features), **words)
        assert (done.folder / "pictures" / "edit_strength_1_seed_7.png").read_bytes() == path.read_bytes()
        assert (done.folder / "pictures" / "unsteered_strength_0_seed_7.png").read_bytes() == (
            pictures / "unsteered.png"
        ).read_bytes()


def test_a_stopped_attribution_goes_on_to_the_same_bytes(attributed, sae, run, tmp_path):
    class Stop(Exception):  # noqa: N818 (a signal)
        pass

    def stop(event):
        if getattr(event, "stage", None) == "pictures" and event.done == 3:
            raise Stop

    words = {"sae": sae, "region": LEFT, "output_dir": tmp_path, **FAST}
    with pytest.raises(Stop):
        attribute(run, **words, progress=stop)
    (folder,) = tmp_path.iterdir()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert kept
    stages = []
    done = attribute(run, **words, progress=lambda event: stages.append(getattr(event, "stage", None)))
    assert "gradients" not in stages
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert done.folder.name == attributed.folder.name
    for path in sorted(attributed.folder.rglob("*")):
        if path.is_file():
            assert (done.folder / path.relative_to(attributed.folder)).read_bytes() == path.read_bytes(), path.name
    more = attribute(run, **words | {"controls": 2})
    assert more.folder == done.folder
    assert {row.feature for row in attributed.table} < {row.feature for row in more.table}
    with pytest.raises(FluxIRError, match="holds an attribution that differs in region"):
        attribute(run, **words | {"region": (64, 0, 128, 128)}, name=done.folder.name)


def test_several_autoencoders_are_ranked_together(sae, run, tmp_path):
    other = random_sae(tmp_path, "other", site="single.3")
    done = attribute(
        run, sae=(sae, other), steps=(0,), output_dir=tmp_path / "out", **FAST | {"candidates": 4, "controls": 0}
    )
    assert {row.site for row in done.table} == {"double.2.img", "single.3"}
    assert all(row.latent_outside is None for row in done.table)  # the region is the whole picture
    by_step = [row["by_step"] for row in json.loads(done.numbers.read_text())["removals"]]
    assert all(steps[1] == 0 for steps in by_step)
    assert any(steps[0] > 0 for steps in by_step)


def test_a_generation_of_a_collection_is_a_run(sae, attributed, tmp_path):
    words = {"num_steps": 2, "steps": (1,), "dtype": "float32", "store_dtype": "float32"}
    collect([PROMPT, "a blue star"], "double.2.img", tmp_path / "mine", model="flux-tiny", seed=0, **words)
    with pytest.raises(FluxIRError, match="holds 2 generations"):
        attribute(tmp_path / "mine", sae=sae, output_dir=tmp_path / "out", **FAST)
    done = attribute(tmp_path / "mine", generation="1", sae=sae, output_dir=tmp_path / "out", **LEAST)
    assert json.loads(done.numbers.read_text())["settings"]["prompt"] == "a blue star"
    # A collection is sampled in batches, which round otherwise than a picture by itself.
    assert all("the run's states are off those that are sampled here, by " in note for note in done.notes)
    kept = json.loads((tmp_path / "mine" / "collection.json").read_text())
    kept["settings"]["weights"] = "0" * 16
    (tmp_path / "mine" / "collection.json").write_text(json.dumps(kept))
    with pytest.raises(FluxIRError, match="the run was made with other weights of flux-tiny"):
        attribute(tmp_path / "mine", generation="1", sae=sae, output_dir=tmp_path / "out", **LEAST)


def test_a_run_without_whole_states_is_sampled_again_with_a_note(sae, tmp_path):
    words = {"num_steps": 2, "steps": (1,), "dtype": "float32", "tokens_per_image": 8}
    collect([PROMPT], "double.2.img", tmp_path / "mine", model="flux-tiny", **words)
    done = attribute(tmp_path / "mine", sae=sae, output_dir=tmp_path / "out", **LEAST)
    assert done.notes == ["note: the run kept no whole states: they are sampled again from its seed"]


def test_a_run_has_its_own_weights_and_others_are_refused(sae, run, tmp_path):
    weights = load_file(locate_transformer(get_spec("flux-tiny")).path)
    other, words = tmp_path / "other.safetensors", {"sae": sae, "output_dir": tmp_path / "out", **LEAST}
    save_file({name: 0.9 * tensor for name, tensor in weights.items()}, other)
    with pytest.raises(FluxIRError, match="these are not the weights or the text encoders the run was made with"):
        attribute(run, checkpoint=other, **words)
    made_with = capture(
        PROMPT, checkpoint=other, should_decode_intermediates=False, output_dir=tmp_path / "output", **PICTURE
    )
    assert not attribute(made_with.folder, **words).notes


def test_an_edited_run_is_refused(sae, tmp_path):
    edit = Edit(sae=sae, feature=3, unit="norm")
    edited = capture(PROMPT, edit=edit, should_decode_intermediates=False, output_dir=tmp_path, **PICTURE)
    with pytest.raises(FluxIRError, match="was made with edits"):
        attribute(edited, sae=sae, output_dir=tmp_path / "out", **FAST)


WRONG = [
    ({"sae": ()}, "an attribution is to the features of an autoencoder: got none"),
    ({"region": (0, 0, 200, 16)}, "a rectangle lies within the picture of 128 x 128 px"),
    ({"region": (0, 0, 16)}, "a region is left, top, right, bottom in px"),
    ({"region": LEFT, "mask": "a.png"}, "a region is a rectangle or a mask"),
    ({"steps": (2,)}, "--steps counts from 0 to 1 with 2 steps: got 2"),
    ({"candidates": 65}, "there are 64 features: got --candidates 65"),
    ({"best": 3}, "--best is at most --candidates, 2: got 3"),
    ({"probes": 0}, "--probes must be at least 1: got 0"),
    ({"seed": 1}, "--run says everything about the picture: got --seed as well"),
    ({"model": "flux-schnell"}, "the run is one of flux-tiny: got flux-schnell"),
    ({"run": None, "generation": "1"}, "--generation is one of a collection: got no --run"),
    ({"generation": "3"}, "has no generation 3"),
    ({"sites": ("single.1", "single.2")}, "--sites says where each autoencoder is: got 2 for 1 autoencoders"),
    ({"sites": "single.1"}, "this autoencoder was trained on double.2.img"),
]


def test_an_autoencoder_is_named_once(sae, run, tmp_path):
    with pytest.raises(FluxIRError, match="an autoencoder is named twice"):
        attribute(run, sae=(sae, sae), output_dir=tmp_path / "out", **FAST)


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_told_before_anything_is_written(sae, run, tmp_path, changes, message):
    words = {"run": run, "sae": sae, "output_dir": tmp_path / "out", **FAST} | changes
    with pytest.raises(FluxIRError, match=message.replace("(", r"\(")) as error:
        attribute(**words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"model": "flux-dev"}, "this autoencoder was trained on flux-dev: it is no dictionary of flux-tiny"),
        ({"d_in": 64}, "the tokens of double.2.img of flux-tiny are 192 wide: this autoencoder is of 64"),
        ({"site": "t5.1", "d_in": 128}, "t5.1 is computed once per prompt"),
        ({"site": None}, "this autoencoder does not say of which site it is"),
    ],
)
def test_other_autoencoders_are_refused(run, tmp_path, made, message):
    with pytest.raises(FluxIRError, match=message):
        attribute(run, sae=random_sae(tmp_path, "other", **made), output_dir=tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_a_mask_without_a_token_and_arrays_are_refused(sae, run, tmp_path):
    Image.fromarray(np.zeros((128, 128), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(FluxIRError, match="the region has no token"):
        attribute(run, sae=sae, mask=tmp_path / "black.png", output_dir=tmp_path / "out", **FAST)
    np.save(tmp_path / "tokens.npy", np.zeros((10, 192), np.float32))
    with pytest.raises(FluxIRError, match="holds arrays: no run made them"):
        attribute(tmp_path / "tokens.npy", sae=sae, output_dir=tmp_path / "out", **FAST)


def test_fewer_active_features_than_asked_for_are_told_and_none_is_an_error(run, tmp_path):
    made = make_sae(SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny"))
    with torch.no_grad():
        made.b_enc.fill_(-1e9)
    words = {"output_dir": tmp_path / "out", **FAST | {"candidates": 4, "best": 1}}
    with pytest.raises(FluxIRError, match="no feature is active in this picture"):
        attribute(run, sae=save_sae(made, tmp_path / "silent"), **words)
    with torch.no_grad():
        made.b_enc[:2] = 1e3
    done = attribute(run, sae=save_sae(made, tmp_path / "two"), **words)
    assert sorted(row.feature for row in done.table) == [0, 1]
    assert done.notes == [
        "note: 2 features are active here, so there are 2 candidates, not 4",
        "note: 2 features are active here, so there are 0 controls, not 1",
    ]
    assert done.agreement.spearman is None
