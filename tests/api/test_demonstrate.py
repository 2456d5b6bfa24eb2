"""`demonstrate` on flux-tiny: what it writes, what its numbers are of, that it goes on, and what may be wrong."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ir import FluxIRError, Note, steer
from flux_ir.api.demonstrate import demonstrate
from flux_ir.commands.demonstrate import main
from flux_ir.features.folder import open_features, read_tensors, write_tensors
from flux_ir.sae.files.folder import load_sae, save_sae
from flux_ir.steering import perceptual
from tests.features.real import make_features

FAST = {"number": 2, "examples": 1, "strength": (-2, 2), "dtype": "float32"}
DEAD = 5


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Features of a random autoencoder that knows its maxima, feature 5 having none. No test writes into it."""
    path = tmp_path_factory.mktemp("made")
    folder = make_features(path, site="double.2.img", pictures=False)
    sae = load_sae(folder.sae)
    sae.max_active = torch.from_numpy(np.array(folder.table().max_active)).clamp_min(0.5)
    sae.max_active[DEAD], sae.mean_active = 0, sae.max_active / 3
    save_sae(sae, folder.sae)
    return folder


def copy_of(features, path):
    """A folder of the same features beside the same autoencoder and collection, to write into."""
    for name in ("saes", "captures"):
        (path / name).symlink_to(features.path.parents[1] / name)
    target = path / "features" / features.path.name
    shutil.copytree(features.path, target)
    return target


@pytest.fixture
def copied(features, tmp_path):
    return copy_of(features, tmp_path)


@pytest.fixture(scope="module")
def demonstrated(features, tmp_path_factory):
    """The folder of features with two of them turned. Read it only."""
    folder = copy_of(features, tmp_path_factory.mktemp("demonstrated"))
    demonstrate(folder, **FAST)
    return open_features(folder)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "edit.json"  # that names the autoencoder from where it lies
    }


def test_strips_numbers_and_sheet(demonstrated):
    folder = demonstrated.path / "steering"
    numbers = json.loads((folder / "demonstrations.json").read_text())
    found = numbers["features"]
    assert len(found) == numbers["summary"]["features"] == 2
    differences = [one["score"] - one["control"] for one in found]
    assert differences == sorted(differences, reverse=True)
    lines = list(csv.DictReader((folder / "demonstrations.csv").open()))
    assert [int(line["feature"]) for line in lines] == [one["feature"] for one in found]
    for one in found:
        feature, (scene,) = one["feature"], one["scenes"]
        assert json.loads((folder / f"{feature}.json").read_text()) == one
        assert one["distance"] == "latent"
        down, zero, up = scene["distances"]
        assert zero == 0
        assert min(down, up) > 0
        assert one["score"] == pytest.approx((down + up) / 2 * (0.5 + 0.5 * min(down, up) / max(down, up)))
        assert scene["random"][0][0] != scene["random"][0][2]  # down is not the same picture as up
        row = demonstrated.images[int(demonstrated.examples().top[feature][0])]
        assert (scene["prompt"], scene["seed"]) == (row.prompt, row.seed)
        for name in (f"{feature}.png", f"strips/{feature}_0.png", f"strips/{feature}_0_random.png"):
            assert Image.open(folder / name).size[0] > 3 * 48
    assert Image.open(folder / "overview.png").size[1] > 200
    assert "demonstrate" in demonstrated.stages


def test_the_command_prints_the_failures_too_and_makes_nothing_twice(demonstrated, tmp_path, capsys):
    folder = copy_of(demonstrated, tmp_path)
    before = contents(folder / "steering")
    words = ["--number", "2", "--examples", "1", "--strength=-2,2", "--dtype", "float32"]
    assert main(["--features", str(folder), *words]) == 0
    assert contents(folder / "steering") == before
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["feature", "score", "random", "difference", "prompts", "above", "at"]
    assert all(("above" in line) for line in lines[:2])
    assert "of 2 features are above their random directions; by chance it would be 1 (p " in lines[2]


def test_distances_are_those_of_steer_with_the_same_edit(copied, tmp_path):
    done = demonstrate(copied, feature=7, prompt="a red star", strength=(-1, 1), seed=3, dtype="float32")
    (scene,) = done.features[0].scenes
    again = steer(
        "a red star",
        model="flux-tiny",
        edit=done.folder / scene.folder / "edit.json",
        strength=(-1, 1),
        seed=3,
        seeds=1,
        controls=0,
        width=64,
        height=48,
        num_steps=3,
        dtype="float32",
        output_dir=tmp_path / "out",
    )
    said = {row.strength: row.latent_inside.mean for row in again.table if row.row == "edit"}
    assert scene.distances == pytest.approx((said[-1], 0, said[1]), rel=1e-5)


def test_a_stopped_call_goes_on_to_the_same_bytes(demonstrated, copied):
    class Stop(Exception):  # noqa: N818 (a signal)
        pass

    def stop(event):
        if getattr(event, "stage", None) == "features" and event.done == 1:
            raise Stop

    with pytest.raises(Stop):
        demonstrate(copied, **FAST, progress=stop)
    lost, *others = sorted((copied / "steering").rglob("edit_*.png"))
    lost.with_suffix(".json").unlink()  # as if killed between a picture and its numbers
    kept = {path: path.stat().st_mtime_ns for path in others}
    assert kept
    demonstrate(copied, **FAST)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(copied / "steering") == contents(demonstrated.path / "steering")


def test_more_random_directions_do_not_move_the_first(demonstrated, tmp_path):
    folder = copy_of(demonstrated, tmp_path)
    one = json.loads((folder / "steering" / "demonstrations.json").read_text())["features"][0]
    two = demonstrate(folder, **FAST, feature=one["feature"], controls=2)
    assert two.features[0].controls[:1] == one["controls"]
    assert len(set(two.features[0].controls)) == 2
    assert two.summary.by_chance == pytest.approx(1 / 3)


def test_lpips_where_it_is_there(demonstrated, tmp_path, monkeypatch):
    with torch.random.fork_rng():
        lpips = perceptual.Lpips(perceptual._network(random_backbone=True))
    monkeypatch.setattr("flux_ir.api.demonstrate.find_lpips", lambda device, grid: lpips)
    done = demonstrate(copy_of(demonstrated, tmp_path), **FAST)
    assert {one.distance for one in done.features} == {"lpips"}
    scene = done.features[0].scenes[0]
    pictures = [
        torch.from_numpy(np.array(Image.open(done.folder / scene.folder / "pictures" / f"{name}.png")))
        for name in (f"edit_strength_2_seed_{scene.seed}", f"unsteered_strength_0_seed_{scene.seed}")
    ]
    assert scene.distances[2] == lpips.distance(*pictures)


def test_features_that_cannot_be_turned_are_noted_one_by_one(copied):
    notes = []
    alive = np.flatnonzero(open_features(copied).table().alive)
    good, silenced = (int(feature) for feature in alive[alive != DEAD][:2])
    demonstrate(
        copied,
        feature=(DEAD, good),
        **FAST,
        progress=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert f"note: feature {DEAD} is left out: it was never active in training, so it has no maximum to measure " in (
        " ".join(notes)
    )
    tensors, metadata = read_tensors(copied / "table.safetensors")
    changed = {name: np.array(array) for name, array in tensors.items()}
    changed["img/count"][silenced] = 0
    write_tensors(copied / "table.safetensors", changed, metadata)
    with pytest.raises(FluxIRError, match="all that were asked for are dead"):
        demonstrate(copied, feature=silenced, **FAST)
    done = demonstrate(copied, feature=silenced, prompt="a red star", **FAST)
    assert [one.feature for one in done.features] == [silenced]


WRONG = [
    ({"window": (95, 70)}, "--window is two percentiles, the lower one first: got 95,70"),
    ({"window": (70,)}, "--window is two percentiles"),
    ({"strength": (1, 2)}, "strengths go as far down as up"),
    ({"feature": 10**6}, "features are numbered 0 to"),
    ({"feature": DEAD}, "all that were asked for are dead"),
    ({"prompt": " "}, "--prompt is empty"),
    ({"controls": 0}, "--controls must be at least 1"),
    ({"number": 0}, "--number must be at least 1"),
    ({"examples": 0}, "--examples must be at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_told_before_anything_is_written(copied, changes, message):
    with pytest.raises(FluxIRError, match=message) as error:
        demonstrate(copied, **FAST | changes)
    assert "\n" not in str(error.value)
    assert not (copied / "steering").exists()
