"""Examples against brute force, in any cut of the data; rows of distinct prompts; look-alikes that are silent."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flux_ir
from flux_ir.errors import FluxIRError
from flux_ir.features.examples import SKETCH, Best, ScoreRows, chance, prompt_numbers, rarity
from flux_ir.features.folder import open_features
from tests.features.conftest import dense_of

SLOTS = 3


def rows_of(slot, image, value, prompts):
    image = np.array(image, np.int64)
    value = np.array(value, np.float32)
    zeros = np.zeros(len(image))
    return ScoreRows(
        np.array(slot, np.int64), image, prompts[image], value, zeros.astype(np.int32), zeros.astype(np.int16)
    )


def brute_force(found, most):
    """Per slot: the largest value of each prompt, ties to the first image; then the largest of those, likewise."""
    lists = []
    for slot in range(SLOTS):
        rows = [
            (-v, i, p)
            for f, i, p, v in zip(found.feature, found.image, found.prompt, found.value, strict=True)
            if f == slot
        ]
        best = {}
        for value, image, prompt in sorted(rows):
            best.setdefault(prompt, (value, image))
        lists.append([image for _, image in sorted(best.values())][:most])
    return lists


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_of_many_pieces_are_those_of_all_rows(data):
    images = data.draw(st.integers(1, 12))
    prompts = np.array(data.draw(st.lists(st.integers(0, 4), min_size=images, max_size=images)))
    pairs = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, images - 1))
    keys = data.draw(st.lists(pairs, unique=True, max_size=30))
    values = data.draw(st.lists(st.integers(1, 4), min_size=len(keys), max_size=len(keys)))  # many ties
    most = data.draw(st.integers(1, 5))
    found = rows_of([k[0] for k in keys], [k[1] for k in keys], values, prompts)
    piece = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys))), np.int64)
    lists = []
    for number in range(4):
        best = Best(SLOTS, most)
        own = ScoreRows(*(column[piece == number] for column in found))
        best.add(own.feature, -own.value.astype(np.float64), own)
        lists.append(best)
    merged = Best(SLOTS, most)
    for best in lists[:2]:
        merged.merge(best.columns())
    for number in (2, 3):
        own = ScoreRows(*(column[piece == number] for column in found))
        merged.add(own.feature, -own.value.astype(np.float64), own)
    expected = brute_force(found, most)
    assert [[image for image in row if image >= 0] for row in merged.image.tolist()] == expected


@pytest.fixture(scope="module", params=[("img", "double.0.img", "img"), ("whole", "single.1", "txt")])
def case(small, request, tmp_path_factory):
    """A scored folder with its examples, and S by brute force: [images, features]. A copy: others read the first."""
    name, site, stream = request.param
    own = shutil.copytree(small, tmp_path_factory.mktemp("examples") / "small")
    folder = flux_ir.find_examples(
        own / "features" / name, top=4, quantiles=2, per_quantile=3, random=3, silent=3, seed=5
    )
    z = dense_of(small / "saes" / name, small / "captures", site, stream).z
    return folder, stream, z, np.nanmax(z, axis=(1, 2))


def test_the_strongest_are_exact_with_their_places(case):
    folder, stream, z, s = case
    found, prompts = folder.examples(stream), [row.prompt for row in folder.images]
    for feature in range(s.shape[1]):
        best = {}
        for image in sorted(np.flatnonzero(s[:, feature]), key=lambda i: (-s[i, feature], i)):
            best.setdefault(prompts[image], image)
        expected = [*best.values()][:4]
        assert found.top[feature].tolist() == expected + [-1] * (4 - len(expected))
        for at, image in enumerate(expected):
            assert found.top_value[feature, at] == pytest.approx(s[image, feature], rel=1e-5)
            step, token = folder.steps.index(found.top_step[feature, at]), found.top_token[feature, at]
            assert z[image, step, token, feature] == s[image, feature]


def test_shares_are_cut_by_s_and_random_ones_are_drawn_from_all(case):
    folder, stream, _, s = case
    found, prompts = folder.examples(stream), [row.prompt for row in folder.images]
    numbers = prompt_numbers(prompts)
    for feature in range(s.shape[1]):
        active = np.flatnonzero(s[:, feature])
        share = (s[active, feature, None] < found.quantile_edges[feature]).sum(1)
        assert found.quantile_count[feature].tolist() == np.bincount(share, minlength=2).tolist()
        assert abs(int(np.diff(found.quantile_count[feature])[0])) <= 3
        for at in (0, 1):
            chosen = found.quantile[feature, at][found.quantile[feature, at] >= 0]
            assert set(chosen) <= set(active[share == at])
            assert len(chosen) == min(3, len({prompts[image] for image in active[share == at]}))
        drawn = chance(5, np.full(len(active), feature), numbers[active])
        expected = {}
        for image in active[np.lexsort((active, drawn))]:
            expected.setdefault(prompts[image], image)
        expected = [*expected.values()][:3]
        assert found.random[feature].tolist() == expected + [-1] * (3 - len(expected))


def test_look_alikes_are_silent_and_the_nearest(case):
    folder, stream, _, s = case
    found, prompts, table = folder.examples(stream), [row.prompt for row in folder.images], folder.table(stream)
    weights = rarity(table, len(s)).astype(float)
    signs = np.random.default_rng(5).integers(0, 2, (s.shape[1], SKETCH), np.int8) * 2.0 - 1
    sketch = (s * weights) @ signs
    for feature in range(s.shape[1]):
        if not table.alive[feature]:
            assert (found.silent[feature] == -1).all()
            continue
        top = found.top[feature][found.top[feature] >= 0]
        own = sketch[top] - (s[top, feature] * weights[feature])[:, None] * signs[feature]
        like = (own / np.linalg.norm(own, axis=1, keepdims=True)).sum(0)
        cosine = sketch @ like / np.linalg.norm(sketch, axis=1) / np.linalg.norm(like)
        best = {}
        for image in sorted(np.flatnonzero(s[:, feature] == 0), key=lambda i: -cosine[i]):
            best.setdefault(prompts[image], image)
        expected = [*best.values()][:3]
        assert found.silent[feature].tolist() == expected + [-1] * (3 - len(expected))
        np.testing.assert_allclose(found.silent_value[feature, : len(expected)], cosine[expected], atol=1e-5)


def test_the_same_again_changes_nothing_and_other_settings_are_looked_for_anew(small, tmp_path):
    import shutil

    folder = shutil.copytree(small / "features" / "img", tmp_path / "img")
    flux_ir.find_examples(folder, top=2)
    before = (folder / "examples.safetensors").read_bytes(), (folder / "features.json").read_bytes()
    flux_ir.find_examples(folder, top=2)
    assert ((folder / "examples.safetensors").read_bytes(), (folder / "features.json").read_bytes()) == before
    flux_ir.find_examples(folder, top=3)
    assert open_features(folder).examples().top.shape[1] == 3
    flux_ir.find_examples(folder, top=2)
    assert ((folder / "examples.safetensors").read_bytes(), (folder / "features.json").read_bytes()) == before


def test_numbers_below_one_and_folders_that_are_not_scored_are_refused(small, tmp_path):
    with pytest.raises(FluxIRError, match="--silent must be at least 1: got 0"):
        flux_ir.find_examples(small / "features" / "img", silent=0)
    with pytest.raises(FluxIRError, match="holds no features"):
        flux_ir.find_examples(tmp_path)
