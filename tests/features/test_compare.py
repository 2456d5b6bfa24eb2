"""Two folders of features: the same generations, activations against brute force, what has moved, CKA, the command."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.sparse import csc_array

import flux_ir
from flux_ir.activations.source import open_source
from flux_ir.commands.main import main
from flux_ir.errors import FluxIRError
from flux_ir.features.compare import (
    align,
    common_generations,
    image_scores,
    paired_change,
    paired_steps,
    token_values,
)
from flux_ir.features.folder import open_features
from flux_ir.sae.files.folder import save_sae
from flux_ir.sites import Site
from tests.activations.conftest import write_collection
from tests.features.conftest import FEATURES, STEPS, dense_of, save_small_sae, say_sizes

MOVED, LOST = 7, 11
ORDER = np.random.default_rng(0).permutation(FEATURES)


def score(root, name, sae, captures):
    return flux_ir.score_features(root / "saes" / sae, root / captures, name=name, output_dir=root / "features")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """60 images of 20 prompts, and the same of a "model" that draws more of one feature; one autoencoder three times:
    as it is, with its features under other numbers, and a fresh one.
    """
    root = tmp_path_factory.mktemp("compared")
    for name in ("base", "tuned"):
        settings = {"version": 2, "settings": {"model": "tiny", "checkpoint": name}}
        write_collection(
            root / name, 10, per_shard=6, images_per_prompt=3, sites=("double.0.img", "double.1.img"), img_tokens=12,
            settings=settings,
        )  # fmt: skip
        say_sizes(root / name, 64, 48)
    sae = flux_ir.load_sae(save_small_sae(root / "saes" / "one", "double.0.img"))
    save_small_sae(root / "saes" / "fresh", "double.0.img", seed=1)
    for path in sorted((root / "tuned" / "shards").iterdir()):
        tensors, metadata = load_file(path), _metadata(path)
        tensors["double.0.img/step_0"][:, 3] += (6 * sae.W_dec[MOVED]).bfloat16()
        save_file({key: tensors[key] for key in tensors}, path, metadata)
    turned = flux_ir.load_sae(root / "saes" / "one")
    with torch.no_grad():
        for weight in (turned.W_dec, turned.encoder, turned.b_enc):
            weight.copy_(weight[ORDER].clone())
    save_sae(turned, root / "saes" / "turned")
    for name, sae_name, captures in (
        ("one", "one", "base"),
        ("turned", "turned", "base"),
        ("tuned", "one", "tuned"),
        ("fresh", "fresh", "base"),
    ):
        score(root, name, sae_name, captures)
    return root


def _metadata(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.fixture
def folders(sides, tmp_path):
    """A copy to write comparisons into."""
    shutil.copytree(sides / "features", tmp_path / "features")
    for name in ("saes", "base", "tuned"):
        (tmp_path / name).symlink_to(sides / name)
    return tmp_path / "features"


# ---- What is read


def test_scores_and_tokens_are_those_of_brute_force_in_any_order(small):
    folder = open_features(small / "features" / "img")
    z = dense_of(small / "saes" / "img", small / "captures", "double.0.img", "img").z
    images = np.array([4, 0, 9])
    np.testing.assert_allclose(
        image_scores(folder, "img", images).toarray(), z[images].max(axis=(1, 2)), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        image_scores(folder, "img", images, mean=True).toarray(), z[images].mean(axis=(1, 2)), rtol=1e-5, atol=1e-7
    )
    every = token_values(folder, "img", images, STEPS[::-1]).toarray().reshape(3, 2, 12, FEATURES)
    np.testing.assert_allclose(every, z[images][:, ::-1], rtol=1e-5, atol=1e-7)


def test_generations_are_the_same_by_prompt_seed_and_size(small, sides):
    a = open_features(sides / "features" / "one")
    same = common_generations(a, open_features(sides / "features" / "tuned"))
    assert same.a.tolist() == same.b.tolist() == list(range(60))
    assert same.groups.tolist() == [image // 3 for image in range(60)]
    some = common_generations(a, open_features(small / "features" / "img"))
    assert some.a.tolist() == [0, 1, 3]  # the prompts 0, 0 and 1; to other seeds the two have other prompts
    assert same.thinned(4).a.tolist() == [0, 20, 39, 59]


def test_steps_are_paired_where_they_are_equal_or_alone(small):
    folder = open_features(small / "features" / "img")
    assert paired_steps(folder, folder) == [(0, 0), (2, 2)]


# ---- What has moved


def test_a_change_has_the_p_of_all_signs_of_its_prompts():
    draw = np.random.default_rng(0)
    a, b = (draw.random((24, 3)) * (draw.random((24, 3)) < 0.6) for _ in range(2))
    b[:, 2] = a[:, 2]
    groups = np.arange(24) // 3
    found = paired_change(csc_array(a), csc_array(b), groups, permutations=20_000, seed=0)
    each = (b - a).reshape(8, 3, 3).sum(1)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(signs @ each) >= np.abs(each.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(found.p, exact, atol=0.015)
    assert (found.p[2], found.z[2]) == (1, 0)
    np.testing.assert_allclose(found.a, a.mean(0))
    np.testing.assert_allclose(found.z[:2], each[:, :2].sum(0) / np.sqrt((each[:, :2] ** 2).sum(0)))


def test_images_of_a_prompt_are_no_independent_draws():
    """Prompts differ, images of one do not: of chance alone, p-values stay even, where counting images would not."""
    draw, small = np.random.default_rng(1), 0
    for _ in range(200):
        a = np.repeat(draw.normal(size=(16, 1)), 4, axis=0) + 5
        b = np.repeat(draw.normal(size=(16, 1)), 4, axis=0) + 5
        groups = np.repeat(np.arange(16), 4)
        small += paired_change(csc_array(a), csc_array(b), groups, permutations=199, seed=2).p[0] <= 0.05
    assert 2 <= small <= 20


# ---- The activations


def test_cka_of_a_site_with_itself_is_one_and_of_independent_ones_about_zero(sides):
    source, common = open_source(sides / "base"), common_generations(*[open_features(sides / "features" / "one")] * 2)
    one, other = Site.parse("double.0.img"), Site.parse("double.1.img")
    same = align((source, source), (one, one), common, (0, 0), seed=0)
    assert same.cka == pytest.approx(1, abs=1e-9)
    assert abs(same.permuted) < 0.05
    assert same.tokens == 60 * 12
    assert abs(align((source, source), (one, other), common, (0, 0), seed=0).cka) < 0.05


# ---- The whole


def test_the_same_features_are_found_under_other_numbers(folders):
    for by in ("decoder", "activations"):
        found = flux_ir.compare_features(folders / "one", folders / "turned", by=by, name=by)
        pairs = found.content["pairs"]
        assert min(pairs["likeness"]) == pytest.approx(1, abs=1e-5)
        assert all(ORDER[b] == a for a, b in found.matched)
        assert len(found.matched) == found.content["a"]["compared"] > 30
        assert found.content["a"]["unmatched"] == []
        assert 3 not in pairs["a"]  # it is dead
        assert found.content["cka"] == []  # the activations are the same
        assert all(q is None or q > 0.05 for q in found.content["changes"]["mean"]["q"])
    tokens = flux_ir.compare_features(folders / "one", folders / "turned", level="token", name="tokens")
    assert all(ORDER[b] == a for a, b in tokens.matched)
    assert len(tokens.matched) > 30


def test_a_fresh_autoencoder_has_none_of_them_by_direction(folders):
    found = flux_ir.compare_features(folders / "one", folders / "fresh", by="decoder", min_likeness=0)
    assert found.content["null"]["draws"] > 10
    assert len(found.matched) <= 2
    assert len(found.content["b"]["unmatched"]) >= found.content["b"]["compared"] - 2
    same = flux_ir.compare_features(folders / "one", folders / "turned", by="decoder", min_likeness=1)
    assert len(same.matched) < len(same.content["pairs"]["a"])  # beyond the null, but rounding keeps some below 1


def test_what_a_model_moves_is_listed_first_and_what_it_does_not_is_not(folders, capsys):
    words = ["compare-features", "--features", str(folders / "one"), "--other", str(folders / "tuned")]
    assert main([*words, "--by", "decoder"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((folders / "one" / "compare" / "tuned" / "compare.json").read_text())
    change = content["changes"]["mean"]
    place = content["pairs"]["a"].index(MOVED)
    assert content["pairs"]["b"][place] == MOVED
    assert max(change["z"], key=abs) == change["z"][place] > 0
    assert change["b"][place] > change["a"][place]
    assert change["q"][place] < 0.01
    assert "matched features differ in their mean activation" in printed
    assert [one["step_a"] for one in content["cka"]] == list(STEPS)
    assert 0.5 < content["cka"][0]["cka"] < 1 == pytest.approx(content["cka"][1]["cka"])
    assert "CKA of step 2 and 2: 1.000" in printed
    assert Image.open(folders / "one" / "compare" / "tuned" / "compare.png").width > 500


def test_a_comparison_is_not_made_twice_and_the_same_one_has_the_same_bytes(folders):
    notes = []
    first = flux_ir.compare_features(folders / "one", folders / "fresh", permutations=99)
    again = first.path.with_name("again.json")
    first.path.rename(again)
    flux_ir.compare_features(folders / "one", folders / "fresh", permutations=99)
    assert first.path.read_bytes() == again.read_bytes()
    flux_ir.compare_features(folders / "one", folders / "fresh", permutations=99, progress=notes.append)
    assert [note.text for note in notes] == [f"the comparison in {first.path.parent} is complete"]
    changed = flux_ir.compare_features(folders / "one", folders / "fresh", permutations=98)
    assert changed.content["digest"] != json.loads(again.read_text())["digest"]


def test_a_comparison_with_another_folder_of_the_same_name_is_not_written_over(folders, tmp_path):
    first = flux_ir.compare_features(folders / "one", folders / "fresh", permutations=99)
    before = first.path.read_bytes()
    namesake = shutil.copytree(folders / "tuned", tmp_path / "elsewhere" / "fresh")
    with pytest.raises(FluxIRError, match=r"compare.fresh holds a comparison with another folder fresh") as told:
        flux_ir.compare_features(folders / "one", namesake, permutations=99)
    assert "--name" in told.value.hint
    assert first.path.read_bytes() == before
    named = flux_ir.compare_features(folders / "one", namesake, permutations=99, name="namesake")
    assert named.path.parent == first.path.parents[1] / "namesake"


def test_other_generations_and_other_widths_are_one_clear_line(folders, small, tmp_path):
    write_collection(tmp_path / "others", 2, sites=("double.0.img",), img_tokens=12)  # of no known size
    other = score(tmp_path, "others", "one", "others")
    with pytest.raises(FluxIRError, match="share fewer than two") as told:
        flux_ir.compare_features(folders / "one", other.path, by="activations")
    assert "--by decoder" in told.value.hint
    found = flux_ir.compare_features(folders / "one", other.path, min_images=2)  # auto: by decoder
    assert found.content["by"] == "decoder"
    assert found.content["changes"] == {}
    assert found.path.with_name("compare.png").is_file()
    np.save(tmp_path / "narrow.npy", np.random.default_rng(0).normal(size=(30, 4, 16)).astype(np.float32))
    save_small_sae(tmp_path / "narrow", None, d=16, steps=None, model=None)
    narrow = flux_ir.score_features(tmp_path / "narrow", tmp_path / "narrow.npy", output_dir=tmp_path / "features")
    with pytest.raises(FluxIRError, match=r"of one width: .*one has 64 and .*narrow has 16"):
        flux_ir.compare_features(folders / "one", narrow.path, by="decoder")
    with pytest.raises(FluxIRError, match="share fewer than two") as told:
        flux_ir.compare_features(folders / "one", narrow.path)
    assert "--by decoder" not in told.value.hint


def test_what_cannot_be_compared_is_said(folders, capsys):
    one, tuned = folders / "one", folders / "tuned"
    for words, message in (
        ({"stream": "txt"}, "holds features of img tokens: got --stream txt"),
        ({"min_images": 61}, "active on 61 images or more"),
        ({"name": "../x"}, "--name is the name of one folder"),
        ({"permutations": 0}, "--permutations must be at least 1"),
        ({"min_likeness": 1.5}, "--min_likeness is at most 1"),
    ):
        with pytest.raises(FluxIRError, match=message):
            flux_ir.compare_features(one, tuned, **words)
    assert main(["compare-features", "--features", str(folders), "--other", str(tuned)]) == 2
    assert "holds no features" in capsys.readouterr().err
