"""Regions: a rectangle, a picture, a map and numbers become tokens; what lies outside is refused."""

import numpy as np
import pytest
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.steering.regions import Grid, Region, region_of

GRID = Grid(width=48, height=64)


def on(region, stream="img", tokens=12):
    return np.flatnonzero(region.mask(stream, tokens, GRID)).tolist()


@pytest.mark.parametrize(
    ("rectangle", "tokens"),
    [
        ((0, 0, 16, 16), [0]),
        ((16, 16, 32, 32), [4]),
        ((15, 15, 17, 17), [0, 1, 3, 4]),
        ((47, 63, 48, 64), [11]),
        ((0, 0, 48, 64), list(range(12))),
    ],
)
def test_a_rectangle_has_every_token_that_it_touches(rectangle, tokens):
    assert on(Region(rectangle=rectangle)) == tokens


def test_a_picture_and_a_map_have_the_tokens_above_their_threshold(tmp_path):
    values = np.zeros((64, 48), dtype=np.uint8)
    values[:16, 16:32] = 255
    values[48:, :8] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    np.save(tmp_path / "map.npy", values / 255)
    np.save(tmp_path / "small.npy", np.arange(12).reshape(4, 3))
    assert on(Region(image=tmp_path / "mask.png")) == [1]
    assert on(Region(image=tmp_path / "mask.png", above=0.4)) == [1, 9]
    assert on(Region(map=tmp_path / "map.npy", above=0.4)) == [1, 9]
    assert on(Region(map=tmp_path / "small.npy", above=8)) == [9, 10, 11]


def test_tokens_are_of_the_stream_the_site_is_in():
    assert on(Region(tokens=(2, 0))) == [0, 2]
    assert on(Region(tokens=(6,)), "txt", 7) == [6]
    assert on(Region(tokens=())) == []


def test_a_region_is_json_and_back(tmp_path):
    for region in (Region(rectangle=(0, 0, 8, 8)), Region(tokens=(1,)), Region(image=str(tmp_path / "a"), above=0.1)):
        assert region_of(region.to_json()) == region


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got none of them"),
        ({"tokens": (1,), "rectangle": (0, 0, 1, 1)}, "got rectangle, tokens"),
        ({"rectangle": (5, 0, 5, 1)}, "has at least one"),
        ({"rectangle": (-1, 0, 5, 1)}, "has at least one"),
        ({"tokens": (-1,)}, "counted from 0"),
    ],
)
def test_what_is_no_region_is_refused(fields, message):
    with pytest.raises(FluxIRError, match=message):
        Region(**fields)


def test_files_that_do_not_fit_are_refused(tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "square.png")
    (tmp_path / "text.png").write_text("no picture")
    np.save(tmp_path / "odd.npy", np.zeros((5, 3)))
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    wrong = [
        (Region(image=tmp_path / "square.png"), "as wide and high as the picture"),
        (Region(image=tmp_path / "text.png"), "cannot read the picture of a region"),
        (Region(image=tmp_path / "none.png"), "cannot read the picture of a region"),
        (Region(map=tmp_path / "odd.npy"), r"must be finite numbers \[4, 3\]"),
        (Region(map=tmp_path / "nan.npy"), "not all of them finite"),
        (Region(map=tmp_path / "none.npy"), "cannot read the map"),
        (Region(rectangle=(0, 0, 49, 64)), "lies within the picture of 48 x 64 px"),
        (Region(tokens=(12,)), "has 12 tokens"),
    ]
    for region, message in wrong:
        with pytest.raises(FluxIRError, match=message):
            on(region)
    with pytest.raises(FluxIRError, match="no region of text tokens"):
        on(Region(rectangle=(0, 0, 16, 16)), "txt", 7)
