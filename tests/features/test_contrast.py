"""Features found by contrast, against loops over dense activations: prompts, regions, steps."""

import numpy as np
import pytest

from flux_ir.errors import FluxIRError
from flux_ir.features.contents import ImageRow
from flux_ir.features.contrast import (
    contrast_prompts,
    contrast_region,
    region_mask,
    sides_of,
    step_variance,
)
from tests.features.dense import parts_of

F, TOKENS, STEPS = 7, 6, 3
PROMPTS = [
    "a red circle",
    "a blue circle",
    "a Red square, large",
    "a blue square, large",
    "a predator",
    "a red star and a blue star",
]


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def images_of(prompts, repeats=1):
    return [
        ImageRow(number, f"{number:08x}", prompt, number, 48, 32, (2, 3), None, None)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(repeats))
    ]


def activations(draw, images):
    shape = (images, STEPS, TOKENS, F)
    return (draw.random(shape) * (draw.random(shape) < 0.2)).astype(np.float32)


# ---- Prompts


def test_words_are_matched_whole_and_prompts_with_both_take_no_part():
    sides = sides_of(images_of(PROMPTS), ["red", "BLUE"])
    assert sides.deltas == [([0, 2], [1, 3])]
    assert (sides.name, sides.left_out, sides.paired) == ("red against BLUE", 1, False)
    rest = sides_of(images_of(PROMPTS), ["red"])
    assert rest.deltas == [([0, 2, 5], [1, 3, 4])]
    assert (rest.name, rest.left_out) == ("red against the rest", 0)


def test_each_seed_of_the_prompts_is_a_delta_of_its_own():
    sides = sides_of(images_of(PROMPTS[:2], repeats=3), ["red", "blue"])
    assert sides.deltas == [([0], [3]), ([1], [4]), ([2], [5])]
    assert sides.prompt.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_numbers_are_those_of_the_definition(draw, repeats):
    images = images_of(PROMPTS, repeats)
    z = activations(draw, len(images))
    S = z.max(axis=(1, 2)).astype(float)
    sides = sides_of(images, ["red", "blue"])
    found = contrast_prompts(parts_of(z, part=4), sides, F)
    first = [row.index for row in images if row.prompt in (PROMPTS[0], PROMPTS[2])]
    second = [row.index for row in images if row.prompt in (PROMPTS[1], PROMPTS[3])]
    np.testing.assert_allclose(found.difference, S[first].mean(axis=0) - S[second].mean(axis=0), atol=1e-12)
    deltas = [S[first[s::repeats]].mean(axis=0) - S[second[s::repeats]].mean(axis=0) for s in range(repeats)]
    score = np.abs(deltas).mean(axis=0) * np.abs(np.sign(deltas).mean(axis=0))
    np.testing.assert_allclose(found.score, score, atol=1e-12)
    assert np.isnan(found.p).all()


def test_pairs_of_two_lists_are_compared_one_by_one(draw, tmp_path):
    images = images_of(PROMPTS, 2)
    (tmp_path / "red.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[2]}\n")
    (tmp_path / "blue.txt").write_text(f"{PROMPTS[1]}\n{PROMPTS[3]}\n")
    sides = sides_of(images, [str(tmp_path / "red.txt"), str(tmp_path / "blue.txt")])
    assert sides.deltas == [([0], [2]), ([1], [3]), ([4], [6]), ([5], [7])]
    assert (sides.units.tolist(), sides.paired, sides.name) == ([0, 0, 1, 1], True, "red against blue")
    z = activations(draw, len(images))
    S = z.max(axis=(1, 2)).astype(float)
    found = contrast_prompts(parts_of(z), sides, F, permutations=63)
    deltas = np.array([S[one[0]] - S[other[0]] for one, other in sides.deltas])
    np.testing.assert_allclose(found.score, np.abs(deltas).mean(axis=0) * np.abs(np.sign(deltas).mean(axis=0)))
    np.testing.assert_allclose(found.difference, deltas.mean(axis=0), atol=1e-12)
    assert (found.p > 0.3).all()  # two pairs have four signs, and two of these are as far from 0 as any


def test_p_tells_a_feature_of_the_word_from_those_of_nothing(draw):
    images = images_of([f"a {'red' if n % 2 else 'blue'} thing {n}" for n in range(40)], repeats=2)
    S = draw.random((80, F)) * (draw.random((80, F)) < 0.5)
    S[:, 0] = [("red" in row.prompt) * (1 + draw.random()) for row in images]
    found = contrast_prompts(parts_of(S), sides_of(images, ["red"]), F, permutations=199)
    assert found.p[0] == pytest.approx(1 / 200)
    assert 0.2 < found.p[1:].mean() < 0.8
    assert found.difference[0] > 1
    again = contrast_prompts(parts_of(S, part=80), sides_of(images, ["red"]), F, permutations=199)
    np.testing.assert_array_equal(found.p, again.p)


def test_images_of_one_prompt_are_exchanged_together(draw):
    """Twenty images, but two prompts: there is nothing to be significant with."""
    images = images_of(["a red thing", "a blue thing"], repeats=10)
    S = np.array([[1.0 if "red" in row.prompt else 0.0] for row in images])
    found = contrast_prompts(parts_of(S), sides_of(images, ["red"]), 1, permutations=99)
    assert found.difference[0] == pytest.approx(1)
    assert found.p[0] == 1


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        (["green"], "no prompt holds 'green'"),
        (["a"], "a against the rest has 6 and 0 prompts"),
        (["red", "red"], "has 0 and 0 prompts"),
        (["red", "blue", "a"], "one side or two: got 3"),
        (["missing.txt"], "there is no list of prompts missing.txt"),
    ],
)
def test_contrasts_without_two_sides_are_refused(contrast, message):
    with pytest.raises(FluxIRError, match=message):
        sides_of(images_of(PROMPTS), contrast)


def test_lists_with_prompts_that_were_not_collected_are_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a green circle\na red circle\n")
    with pytest.raises(FluxIRError, match=r"1 prompt of .* were not collected, such as 'a green circle'"):
        sides_of(images_of(PROMPTS), [str(tmp_path / "list.txt")])


# ---- Regions


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ((0, 0, 0.5, 1), [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ((0, 0.5, 1, 1), [[0, 0, 0, 0], [1, 1, 1, 1]]),
        ((0.3, 0.2, 0.8, 0.7), [[0, 1, 1, 0], [0, 0, 0, 0]]),
    ],
)
def test_a_region_has_the_tokens_whose_middles_lie_in_it(region, expected):
    assert region_mask(region, 2, 4).astype(int).tolist() == expected


@pytest.mark.parametrize("region", [(0, 0, 1, 1), (0.5, 0, 0.5, 1), (0, 0, 2, 1), (0, 0, 1), (0.9, 0.9, 0.99, 0.99)])
def test_regions_that_are_none_are_refused(region):
    with pytest.raises(FluxIRError, match="region"):
        region_mask(region, 2, 4)


def test_a_region_is_contrasted_with_the_rest_of_the_picture(draw):
    """Images on two grids; of one, half of the tokens were kept; of another, none of the region."""
    z = activations(draw, 5)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (5, 1))
    positions[1] = [5, 3, 1, -1, -1, -1]
    z[1, :, 3:] = 0
    positions[4] = [2, 5, -1, -1, -1, -1]
    z[4, :, 2:] = 0
    masks = {number: region_mask((0, 0, 0.5, 1), 2, 3) for number in (0, 1, 4)}
    masks |= {2: region_mask((0, 0, 0.5, 1), 3, 2), 3: None}
    found = contrast_region(parts_of(z, part=2, positions=positions), masks.get, F)
    expected = []
    for image in (0, 1, 2):
        inside, outside = [], []
        for token, position in enumerate(positions[image]):
            if position >= 0:
                (inside if masks[image].ravel()[position] else outside).append(z[image, :, token].astype(float))
        expected.append(np.mean(inside, axis=(0, 1)) - np.mean(outside, axis=(0, 1)))
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-6)
    assert np.isnan(contrast_region(parts_of(z), lambda image: None, F)).all()


# ---- Steps


def test_the_variance_over_steps_is_that_of_the_largest_of_each(draw):
    z = activations(draw, 5)
    z[..., 2] = 0
    z[..., 3] = 1.5  # the same at all steps
    found = step_variance(parts_of(z, part=2), F)
    expected = z.max(axis=2).astype(float).var(axis=1).mean(axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found[2] == found[3] == 0
    assert expected[0] > 0
