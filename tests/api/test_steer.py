"""`steer` on flux-tiny: what it writes, that it goes on where it was stopped, and what may be wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ir import FluxIRError, capture, collect, open_source, read_capture
from flux_ir.api.steer import steer
from flux_ir.commands.steer import dose_table
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from flux_ir.steering import perceptual
from flux_ir.steering.edits import POOLED, Edit, read_edits

PROMPT = "a large red circle on the left on a white background"
FAST = {"model": "flux-tiny", "num_steps": 3, "seeds": 2, "controls": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """A random autoencoder of flux-tiny's third double block."""
    made = make_sae(SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny"))
    made.max_active, made.mean_active = torch.full((64,), 6.0), torch.full((64,), 2.0)
    return save_sae(made, tmp_path_factory.mktemp("saes") / "random")


@pytest.fixture(scope="module")
def steered(sae, tmp_path_factory):
    """A whole steering. Read it only."""
    folder = tmp_path_factory.mktemp("steering")
    return steer(PROMPT, sae=sae, feature=12, strength=(0, 1, 4), output_dir=folder, region=(0, 0, 64, 128), **FAST)


def test_every_picture_has_its_numbers_and_every_row_its_place(steered):
    pictures = sorted(path.stem for path in (steered.folder / "pictures").glob("*.png"))
    assert pictures == sorted(path.stem for path in (steered.folder / "pictures").glob("*.json"))
    rows = [(row.row, row.strength, row.pictures) for row in steered.table]
    assert rows == [
        *(("edit", strength, 2) for strength in (0, 1, 4)),
        *((row, strength, 2) for strength in (0, 1, 4) for row in ("random", "neuron")),
        *((window, 4, 2) for window in ("early", "middle", "late")),
    ]
    assert all(path.is_file() for path in steered.drawn.values())
    numbers = json.loads(steered.numbers.read_text())
    assert len(numbers["pictures"]) == len(pictures)
    assert numbers["settings"]["prompt"] == PROMPT
    assert read_edits(steered.edit)[0].feature == (12,)


def test_strength_zero_gives_the_unsteered_bytes_for_the_edit_and_its_controls(steered):
    for row in steered.table:
        assert row.identical == (row.pictures if row.strength == 0 else 0), row.row
    for seed in (0, 1):
        zero, plain = (
            (steered.folder / "pictures" / f"{row}_strength_0_seed_{seed}.png").read_bytes()
            for row in ("edit", "unsteered")
        )
        assert zero == plain


def test_the_picture_changes_inside_the_region_above_all(steered):
    strongest = next(row for row in steered.table if row.row == "edit" and row.strength == 4)
    assert strongest.latent_inside.mean > 2 * strongest.latent_outside.mean
    assert strongest.psnr_inside_db.mean < strongest.psnr_outside_db.mean
    assert strongest.activation.mean > 0


def test_a_stopped_steering_goes_on_to_the_same_bytes(sae, steered, tmp_path):
    words = {
        "sae": sae,
        "feature": 12,
        "strength": (0, 1, 4),
        "region": (0, 0, 64, 128),
        "output_dir": tmp_path,
        **FAST,
    }

    class Stop(Exception):  # noqa: N818 (a signal)
        pass

    def stop(event):
        if getattr(event, "stage", None) == "pictures" and event.done == 5:
            raise Stop

    with pytest.raises(Stop):
        steer(PROMPT, **words, progress=stop)
    (folder,) = tmp_path.iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "pictures").glob("edit*.png")}
    assert kept
    done = steer(PROMPT, **words)
    assert {name: (folder / "pictures" / name).stat().st_mtime_ns for name in kept} == kept
    assert done.folder.name == steered.folder.name
    for path in sorted(steered.folder.rglob("*")):
        if path.is_file() and path.name != "edit.json":  # that names the autoencoder from where it lies
            assert (done.folder / path.relative_to(steered.folder)).read_bytes() == path.read_bytes(), path.name


def test_another_prompt_is_another_folder_and_a_name_is_not_taken_twice(sae, tmp_path):
    words = {"sae": sae, "feature": 12, "strength": 1, "output_dir": tmp_path, **(FAST | {"seeds": 1, "controls": 0})}
    first, second = steer(PROMPT, **words), steer("a small blue star at the top on a black background", **words)
    assert first.folder != second.folder
    steer(PROMPT, **words, name="mine")
    with pytest.raises(FluxIRError, match="holds a steering that differs in edits"):
        steer(PROMPT, **(words | {"feature": 13}), name="mine")


def test_the_pooled_vector_can_be_edited(tmp_path):
    done = steer(
        PROMPT, edit=Edit(kind="scale", sites=POOLED), strength=(0, 1), output_dir=tmp_path, **(FAST | {"seeds": 1})
    )
    assert [(row.row, row.strength, row.identical) for row in done.table] == [("edit", 0, 0), ("edit", 1, 1)]


def test_layers_of_the_text_encoders_can_be_edited(tmp_path):
    sae = make_sae(SAEConfig("topk", d_in=128, d_sae=64, k=8, site="t5.1", model="flux-tiny"))
    edit = Edit(sae=sae, feature=3, unit="norm")
    done = steer(PROMPT, edit=edit, strength=(0, 1), output_dir=tmp_path, **(FAST | {"seeds": 1}))
    assert [(row.row, row.strength, row.identical) for row in done.table] == [("edit", 0, 1), ("edit", 1, 0)]


WRONG = [
    ({"feature": 64}, "this autoencoder has the features 0 to 63: got 64"),
    ({"region": (0, 0, 200, 16)}, "a rectangle lies within the picture of 128 x 128 px"),
    ({"region": (0, 0, 16)}, "a region is left, top, right, bottom in px"),
    ({"region": (0, 0, 16, 16), "mask": "a.png"}, "a region is a rectangle or a mask"),
    ({"steps": (3,)}, "--steps counts from 0 to 2 with 3 steps: got 3"),
    ({"strength": ()}, "a steering has at least one strength"),
    ({"seeds": 0}, "--seeds must be at least 1"),
    ({"edit": Edit(sae="a", feature=1)}, "--edit says everything about the edit: got --sae as well"),
    ({"sites": "single.1"}, "this autoencoder was trained on double.2.img"),
    ({"model": "flux-dev"}, "this autoencoder was trained on flux-tiny"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_told_before_anything_is_written(sae, tmp_path, changes, message):
    words = {"sae": sae, "feature": 12, "output_dir": tmp_path / "out", **FAST} | changes
    with pytest.raises(FluxIRError, match=message.replace("(", r"\(")) as error:
        steer(PROMPT, **words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_picture_shows_the_edit(steered):
    zero, four = (
        np.asarray(Image.open(steered.folder / "pictures" / f"edit_strength_{s}_seed_0.png")).astype(int)
        for s in (0, 4)
    )
    difference = np.abs(zero - four).mean(axis=(0, 2))
    assert difference[:64].mean() > 3 * difference[64:].mean()


def test_a_capture_takes_the_edit_that_a_steering_wrote(steered, tmp_path):
    words = {"model": "flux-tiny", "num_steps": 3, "seed": 1, "dtype": "float32", "lens": "x0", "output_dir": tmp_path}
    (edit,) = read_edits(steered.edit)
    plain, zero, four = (capture(PROMPT, edit=e, **words) for e in (None, edit.at(0.0), edit.at(4.0)))
    pictures = [np.asarray(Image.open(run.picture)) for run in (plain, zero, four)]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    records = [read_capture(run.capture) for run in (plain, zero, four)]
    sites = records[0].sites
    assert all(torch.equal(records[0].read(site, 1), records[1].read(site, 1)) for site in sites)
    # What is recorded is what the edits made of it, and the last block's picture is still the sampler's own.
    assert not torch.equal(records[0].read("double.2.img", 0), records[2].read("double.2.img", 0))
    assert torch.equal(records[0].read("double.1.img", 0), records[2].read("double.1.img", 0))
    stored = json.loads(four.metadata.read_text())
    assert stored["edits"][0]["strength"] == [4.0]
    assert "edits" not in json.loads(plain.metadata.read_text())
    with pytest.raises(FluxIRError, match="is to be measured first"):
        capture(PROMPT, edit=Edit(sae=edit.sae, feature=12, weights="presence"), **words)


def test_a_collection_takes_an_edit_and_cannot_be_run_again_without(steered, tmp_path):
    (edit,) = read_edits(steered.edit)
    words = {"model": "flux-tiny", "num_steps": 3, "steps": (1,), "dtype": "float32", "store_dtype": "float32"}
    made = {}
    for name, given in (("plain", None), ("zero", edit.at(0.0)), ("four", edit.at(4.0))):
        collect([PROMPT], "double.2.img,single.1.img", tmp_path / name, edit=given, **words)
        made[name] = open_source(tmp_path / name)
    sites = made["plain"].sites
    rows = {name: [source.read(0, site, 1).values for site in sites] for name, source in made.items()}
    assert all(map(torch.equal, rows["plain"], rows["zero"]))
    assert not any(map(torch.equal, rows["plain"], rows["four"]))
    with pytest.raises(FluxIRError, match="was made with edits"):
        made["four"].sampling(0)
    with pytest.raises(FluxIRError, match=r"other settings|edits"):
        collect([PROMPT], "double.2.img,single.1.img", tmp_path / "four", edit=edit.at(2.0), **words)


def test_lpips_is_added_to_a_steering_that_is_there_and_shown(sae, tmp_path, monkeypatch):
    words = {"sae": sae, "feature": 12, "strength": (0, 4), "region": (0, 0, 64, 128), "output_dir": tmp_path}
    words |= FAST | {"controls": 0, "seeds": 1}
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    before = steer(PROMPT, **words)
    assert before.notes == []
    assert "lpips" not in before.numbers.read_text()
    made = {path: path.stat().st_mtime_ns for path in (before.folder / "pictures").glob("*.png")}
    with torch.random.fork_rng():
        lpips = perceptual.Lpips(perceptual._network(random_backbone=True))
    monkeypatch.setattr("flux_ir.api.steer.find_lpips", lambda device, grid: lpips)
    after = steer(PROMPT, **words)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    zero, four = (row for row in after.table if row.row == "edit")
    assert (zero.lpips.mean, zero.lpips_outside.mean) == (0, 0)
    assert four.lpips.mean > four.lpips_outside.mean > 0
    assert dose_table(after.table)[0].split()[-2:] == ["LPIPS", "outside"]
    monkeypatch.setattr("flux_ir.api.steer.find_lpips", lambda device, grid: None)
    assert steer(PROMPT, **words | {"seeds": 2}).notes[-1].startswith("note: 5 of 10 pictures have LPIPS")
