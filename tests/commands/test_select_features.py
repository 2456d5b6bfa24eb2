"""flux-ir select-features on a real collection of flux-tiny: every column, lists, reruns, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

import flux_ir
from flux_ir.activations.source import open_source
from flux_ir.commands.select_features import main
from flux_ir.features.coherence import coherence
from flux_ir.features.folder import open_features, read_tensors
from flux_ir.features.selection import FILE, GROUPS, LISTS, read_lists
from flux_ir.models.clip import load_picture_tower, read_pixels, read_preprocessing
from tests.features.real import IMAGES, STEPS, files_of, make_features, save_small_clip

COLUMNS = [name for names in GROUPS.values() for name in names]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A collection with pictures and latents, two autoencoders, scores and examples. Read it only."""
    folder = tmp_path_factory.mktemp("selection")
    make_features(folder, latents=True)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of everything, to select in."""
    return shutil.copytree(made, tmp_path / "made") / "features" / "sae"


def run(capsys, folder, *words):
    code = main(["--features", str(folder), *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_every_column_is_there_after_one_command(folder, capsys):
    other = folder.parents[1] / "saes" / "other"
    words = ("--contrast", "red,blue", "--region", "0,0,0.5,1", "--other_sae", str(other), "--effect_images", "1")
    code, out, err = run(
        capsys, folder, *words, "--permutations", "19", "--significance", "0.9", "--examples_each", "1"
    )
    assert code == 0, err
    arrays, _ = read_tensors(folder / FILE)
    assert sorted(arrays) == sorted(f"{stream}/{name}" for stream in ("img", "txt") for name in COLUMNS)
    alive = open_features(folder).table("img").alive
    for name in COLUMNS:
        column = arrays[f"img/{name}"]
        assert column.shape == (48,)
        if name in ("stability", "stability_feature", "region", "step_variance", "effect"):
            assert not np.isnan(column).any(), name
        elif name == "effect_active":
            shown = open_features(folder).part_of(0).feature[open_features(folder).part_of(0).rows(0)]
            assert np.flatnonzero(~np.isnan(column)).tolist() == sorted(shown.tolist())
        else:
            assert np.isnan(column[~alive]).all(), name
            assert not np.isnan(column[alive]).all(), name
    assert np.isnan(arrays["txt/region"]).all()  # text has no place in the picture
    assert "img, red against blue (" in out
    lists = {one.name: one for one in read_lists(open_features(folder), "img")}
    assert set(lists) == {
        "coherent",
        "stable",
        "red against blue",
        "blue against red",
        "inside 0,0,0.5,1",
        "changing over steps",
        "of most effect",
        "distinct",
    }
    ranked = lists["stable"]
    assert ranked.values == sorted(ranked.values, reverse=True)
    np.testing.assert_allclose(ranked.values, arrays["img/stability"][ranked.features], rtol=1e-4)
    shown = [image for images in lists["distinct"].images for image in images]
    assert len(shown) == len(set(shown)) == len(lists["distinct"].features)
    for feature, images in zip(lists["distinct"].features, lists["distinct"].images, strict=True):
        assert images[0] in open_features(folder).examples().top[feature]


def test_the_same_command_again_changes_no_byte_and_reads_no_activations(folder, capsys):
    words = ("--contrast", "red", "--effect_images", "0", "--permutations", "9")
    assert run(capsys, folder, *words)[0] == 0
    before = files_of(folder)
    assert run(capsys, folder, *words)[0] == 0
    assert files_of(folder) == before
    shutil.rmtree(folder / "embeddings")
    assert run(capsys, folder, *words)[0] == 0  # all columns are there
    assert not (folder / "embeddings").exists()


def test_columns_stay_when_others_are_asked_for(folder, capsys):
    quick = ("--permutations", "0", "--effect_images", "0")
    assert run(capsys, folder, *quick, "--contrast", "red,blue")[0] == 0
    before, _ = read_tensors(folder / FILE)
    before = {name: np.array(array) for name, array in before.items()}
    assert run(capsys, folder, *quick, "--region", "0,0,1,0.5")[0] == 0
    after, _ = read_tensors(folder / FILE)
    changed = {name for name in before if not np.array_equal(before[name], after[name], equal_nan=True)}
    assert changed == {"img/region"}
    assert run(capsys, folder, *quick, "--contrast", "square")[0] == 0
    last, _ = read_tensors(folder / FILE)
    assert not np.array_equal(last["img/contrast"], after["img/contrast"], equal_nan=True)
    said = json.loads((folder / LISTS).read_text())["lists"]["img"]
    assert "square against the rest" in [one["name"] for one in said]


def test_a_run_that_was_stopped_ends_with_the_same_bytes(folder, capsys, monkeypatch):
    words = ("--contrast", "red", "--effect_images", "0", "--permutations", "9")
    whole = shutil.copytree(folder.parents[1], folder.parents[1].parent / "whole") / "features" / "sae"
    assert run(capsys, whole, *words)[0] == 0

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flux_ir.api.select_features.contrast_prompts", stops)
        assert run(capsys, folder, *words)[0] == 130
    assert not np.isnan(read_tensors(folder / FILE)[0]["img/coherence"]).all()
    assert run(capsys, folder, *words)[0] == 0
    assert files_of(folder) == files_of(whole)


def test_coherence_is_that_of_the_mean_tokens_of_the_site(folder, capsys):
    """By hand: centred means over image tokens at the last step."""
    assert run(capsys, folder, "--permutations", "0", "--effect_images", "0")[0] == 0
    source, features = open_source(folder.parents[1] / "captures"), open_features(folder)
    means = torch.stack(
        [source.read(image, "single.6.img", STEPS[-1]).floats().double().mean(dim=0) for image in range(IMAGES)]
    )
    expected = coherence(lambda: features.scores("img"), means - means.mean(dim=0), 48).score
    found, _ = read_tensors(folder / FILE)
    np.testing.assert_allclose(found["img/coherence"], expected, atol=1e-4)
    of_text = coherence(lambda: features.scores("txt"), means - means.mean(dim=0), 48).score
    np.testing.assert_allclose(found["txt/coherence"], of_text, atol=1e-4)


def test_latents_that_were_kept_and_pictures_that_are_encoded_say_nearly_the_same(folder, capsys):
    words = ("--permutations", "0", "--effect_images", "0", "--embeddings", "latents")
    assert run(capsys, folder, *words)[0] == 0
    kept = np.array(read_tensors(folder / FILE)[0]["img/coherence"])
    shutil.rmtree(folder.parents[1] / "captures" / "latents")
    assert run(capsys, folder, *words)[0] == 0
    encoded = np.array(read_tensors(folder / FILE)[0]["img/coherence"])
    both = ~np.isnan(kept)
    assert not np.array_equal(kept[both], encoded[both])
    assert np.corrcoef(kept[both], encoded[both])[0, 1] > 0.9


def test_images_are_compared_by_any_clip(folder, capsys, tmp_path):
    words = ("--permutations", "0", "--effect_images", "0", "--clip", str(save_small_clip(tmp_path)))
    code, _, err = run(capsys, folder, *words)
    assert code == 0, err
    features = open_features(folder)
    tower, preprocessing = load_picture_tower(tmp_path, "cpu", torch.float32), read_preprocessing(tmp_path)
    pixels = [read_pixels(features.picture(image), preprocessing) for image in range(IMAGES)]
    expected = coherence(lambda: features.scores("img"), tower(torch.stack(pixels)), 48).score
    np.testing.assert_allclose(read_tensors(folder / FILE)[0]["img/coherence"], expected, atol=1e-5)


def test_the_state_a_step_began_with_is_read_from_the_shard_or_sampled_again(made):
    source = open_source(made / "captures")
    how = source.sampling(3)
    model = flux_ir.load_model("flux-tiny", dtype="float32")
    steps = list(flux_ir.sample(model, how.prompt, seed=[how.seed], width=how.width, height=how.height, num_steps=3))
    for step in STEPS:  # sampled alone now, and in a batch then
        torch.testing.assert_close(source.state(3, step), steps[step].before[0], rtol=1e-4, atol=1e-4)


def test_python_gives_the_lists(folder):
    found = flux_ir.select_features(folder, permutations=0, effect_images=0, most=3)
    assert set(found) == {"img", "txt"}
    assert {one.name for one in found["img"]} == {"coherent", "changing over steps", "distinct"}
    assert all(len(one.features) <= 3 for one in found["img"])


# ---- Refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--contrast", "violet"), "no prompt holds 'violet'"),
        (("--region", "0,0,2,1"), "a region is left,top,right,bottom in shares of the picture: got 0,0,2,1"),
        (("--region", "0,0,0.01,0.01"), "a region must hold some tokens"),
        (("--other_sae", "SAE"), "is the autoencoder itself"),
        (("--clip", "nowhere"), "--clip must be a folder or a repository of the hub: got 'nowhere'"),
        (("--clip", "x", "--embeddings", "latents"), "images are compared by one embedding"),
        (("--significance", "1"), "--significance must be between 0 and 1: got 1"),
    ],
)
def test_what_cannot_be_selected_by_is_one_line(folder, capsys, words, message):
    words = [str(folder.parents[1] / "saes" / "sae") if word == "SAE" else word for word in words]
    code, _, err = run(capsys, folder, *words, "--effect_images", "0", "--permutations", "0")
    assert code == 2
    assert message in err
    assert err.count("error:") == 1


def test_a_collection_that_has_grown_since_is_one_line(folder, capsys):
    path = folder.parents[1] / "captures" / "collection.json"
    path.write_text(path.read_text() + " ")
    code, _, err = run(capsys, folder)
    assert code == 2
    assert "has changed since" in err


def test_a_folder_without_scores_is_one_line(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert "holds no features" in err
