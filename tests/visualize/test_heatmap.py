"""Maps over pictures: exact to the pixel on known maps of any aspect, one scale for all, nothing where nothing is."""

import numpy as np
import pytest
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.visualize.heatmap import COLOURS, heat_layer, legend, overlay, scale_top

MAP = np.array([[0.0, 1.0, 4.0], [2.0, 8.0, 0.0]])
GREY = (100, 120, 140)


def blended(value, top, opacity, below=GREY):
    """One pixel by the definition."""
    share = min(value / top, 1.0)
    colour = COLOURS[round(255 * share)]
    return [round(b + (c - b) * opacity * share**0.5) for b, c in zip(below, colour, strict=True)]


@pytest.mark.parametrize("size", [(30, 20), (3, 2), (31, 17), (9, 40)])
def test_every_pixel_of_a_blocky_overlay_is_that_of_the_token_its_middle_lies_in(size):
    drawn = np.asarray(overlay(Image.new("RGB", size, GREY), MAP, 4.0, opacity=0.8))
    width, height = size
    assert drawn.shape == (height, width, 3)
    for y in range(height):
        for x in range(width):
            value = MAP[int((y + 0.5) * 2 / height), int((x + 0.5) * 3 / width)]
            assert drawn[y, x].tolist() == blended(value, 4.0, 0.8)


def test_a_smooth_overlay_has_the_values_at_the_middles_of_tokens_and_goes_straight_between_them():
    """5 pixels a token: the third of them is the middle."""
    colours, cover = heat_layer(MAP, (15, 10), 8.0, smooth=True, opacity=1.0)
    share = cover**2
    np.testing.assert_allclose(share[2::5, 2::5] * 8, MAP, atol=1e-6)
    np.testing.assert_allclose(share[2, 2:8] * 8, np.linspace(0, 1, 6), atol=1e-6)
    np.testing.assert_allclose(share[2:8, 7] * 8, np.linspace(1, 8, 6), atol=1e-5)
    assert np.array_equal(colours, COLOURS[np.rint(255 * share).astype(int)])


@pytest.mark.parametrize("smooth", [False, True])
def test_where_a_feature_is_silent_the_picture_keeps_its_bits(smooth):
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    untouched = overlay(picture, np.zeros((2, 3)), 1.0, smooth=smooth)
    assert np.array_equal(np.asarray(untouched), np.asarray(picture))
    partly = np.asarray(overlay(picture, MAP, 8.0))
    assert np.array_equal(partly[:20, :20], np.asarray(picture)[:20, :20])
    assert not np.array_equal(partly, np.asarray(picture))


def test_equal_values_look_equal_in_every_picture_of_a_feature():
    """Another picture's map with other neighbours, by the same scale: no picture is stretched to its own largest."""
    weak = np.array([[0.0, 1.0]])
    colours, cover = heat_layer(MAP, (3, 2), 8.0)
    assert heat_layer(weak, (2, 1), 8.0)[1][0, 1] == cover[0, 1]
    assert np.array_equal(heat_layer(weak, (2, 1), 8.0)[0][0, 1], colours[0, 1])


def test_a_percentile_is_one_of_the_active_values_and_changes_the_picture():
    values = np.concatenate([np.zeros(10_000), np.arange(1.0, 101.0)])  # 1 % is active
    assert scale_top(values) == 100
    assert scale_top(values, 50) == pytest.approx(50.5)
    picture = Image.new("RGB", (3, 2), GREY)
    full, clipped = (np.asarray(overlay(picture, MAP, scale_top(MAP, percentile))) for percentile in (100, 50))
    assert not np.array_equal(full, clipped)
    assert clipped[0, 2].tolist() == clipped[1, 1].tolist()  # 4 and 8 are both above the median, 3
    assert full[0, 2].tolist() != full[1, 1].tolist()


def test_stronger_is_lighter_and_covers_more():
    lightness = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) >= 0).all()
    _, cover = heat_layer(np.linspace(0, 1, 50)[None], (50, 1), 1.0)
    assert (np.diff(cover[0]) > 0).all()
    assert cover.max() <= 1


def test_the_legend_runs_from_nothing_to_the_top_and_says_both():
    strip = legend((120, 30), 12.34)
    assert strip.size == (120, 30)
    pixels = np.asarray(strip).astype(int)
    assert pixels[0, 0].tolist() == pytest.approx([255, 255, 255], abs=20)
    assert np.abs(pixels[0, -1] - COLOURS[-1]).max() < 80
    inked = np.abs(pixels - [250, 250, 248]).max(axis=2) > 60
    below = inked[20:]
    assert below[:, :10].any()
    assert below[:, 90:].any()
    assert not below[:, 30:60].any()
    assert not np.array_equal(pixels, np.asarray(legend((120, 30), 56.7)))


@pytest.mark.parametrize(
    ("values", "percentile", "message"),
    [
        ([[0.0, 0.0]], 100, "a scale needs a value above 0: the feature is silent"),
        ([[1.0, float("nan")]], 100, "values of a feature must be finite"),
        ([[1.0, -1.0]], 100, "not negative"),
        ([[1.0, 2.0]], 0, "a percentile must be above 0 and at most 100: got 0"),
    ],
)
def test_what_has_no_scale_is_refused(values, percentile, message):
    with pytest.raises(FluxIRError, match=message):
        scale_top(np.array(values), percentile)
