"""The sheet of features: each line's pictures with its map over them by its own scale, texts in their places."""

import numpy as np
import pytest
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.visualize.feature_sheet import (
    GAP_PX,
    MARGIN_PX,
    PAGE,
    PANEL_PX,
    FeatureLine,
    SheetPicture,
    draw_feature_sheet,
    number_lines,
)
from flux_ir.visualize.heatmap import overlay

SIZE, CELL = (48, 32), 96  # cells are 96 x 64
MAP = np.array([[0.0, 1.0, 2.0], [4.0, 0.0, 3.0]])


def picture(shade):
    return Image.new("RGB", SIZE, (shade, 255 - shade, 40))


def line(number, *, examples=3, label="a label", top=4.0):
    own = [
        SheetPicture(picture(30 * number + column), MAP, f"{column}.5", "a red circle") for column in range(examples)
    ]
    return FeatureLine(f"feature {number}", label, ["largest 4", "coherence 0.5"], top, own)


def drawn(path):
    with Image.open(path) as page:
        assert page.format == "PNG"
        return np.asarray(page.convert("RGB"))


def cells_of(page, expected):
    """Where a picture stands on the page, to the pixel: all left upper corners."""
    height, width = expected.shape[:2]
    corners = np.argwhere((page[: 1 - height or None, : 1 - width or None] == expected[0, 0]).all(axis=2))
    return [(x, y) for y, x in corners.tolist() if np.array_equal(page[y : y + height, x : x + width], expected)]


@pytest.mark.parametrize("smooth", [False, True])
def test_every_picture_has_its_map_over_it_by_the_scale_of_its_line(tmp_path, smooth):
    lines = [line(1), line(2, top=8.0)]
    size = draw_feature_sheet("a title", "a subtitle", lines, tmp_path / "sheet.png", cell_px=CELL, smooth=smooth)
    page = drawn(tmp_path / "sheet.png")
    assert page.shape == (size[1], size[0], 3)
    rows = []
    for own in lines:
        for column, example in enumerate(own.examples):
            fitted = example.picture.resize((96, 64), Image.Resampling.LANCZOS)
            (corner,) = cells_of(page, np.asarray(overlay(fitted, MAP, own.top, smooth=smooth)))
            assert corner[0] == MARGIN_PX + PANEL_PX + column * (96 + GAP_PX)
            rows.append(corner[1])
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4] == rows[5]


def test_plain_pictures_stand_above_those_with_maps(tmp_path):
    draw_feature_sheet("t", "s", [line(1)], tmp_path / "sheet.png", cell_px=CELL, plain=True)
    page = drawn(tmp_path / "sheet.png")
    plain = picture(31).resize((96, 64))
    ((x, y),) = cells_of(page, np.asarray(plain))
    ((x2, y2),) = cells_of(page, np.asarray(overlay(plain, MAP, 4.0)))
    assert x == x2
    assert y2 == y + 66


def test_pictures_of_other_forms_keep_theirs_in_the_middle_of_the_cell(tmp_path):
    tall = Image.new("RGB", (20, 40), (10, 200, 10))
    examples = [SheetPicture(picture(5), None, "1", ""), SheetPicture(tall, None, "2", "")]
    draw_feature_sheet("t", "s", [FeatureLine("f", "", [], None, examples)], tmp_path / "sheet.png", cell_px=CELL)
    page = drawn(tmp_path / "sheet.png")
    found = (page == (10, 200, 10)).all(axis=2)
    ys, xs = np.nonzero(found)
    assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == (32, 64)
    left = MARGIN_PX + PANEL_PX + 96 + GAP_PX
    assert xs.min() == left + 32


def test_what_is_not_known_leaves_its_place_empty(tmp_path):
    """No picture, no map, no scale, no label."""
    lonely = FeatureLine("feature 7", "", [], None, [SheetPicture(None, None, "", "")])
    draw_feature_sheet("t", "s", [lonely, line(1, examples=1)], tmp_path / "sheet.png", cell_px=CELL)
    page = drawn(tmp_path / "sheet.png")
    (corner,) = cells_of(page, np.asarray(overlay(picture(30).resize((96, 64)), MAP, 4.0)))
    above = page[MARGIN_PX + 60 : corner[1] - 3 * GAP_PX, corner[0] : corner[0] + 96]
    assert (above == PAGE).all(axis=2).mean() > 0.95  # but for the rule between the lines


def test_long_texts_are_cut_where_their_room_ends(tmp_path):
    long = "a very long text that goes on and on " * 9
    own = [SheetPicture(picture(9), MAP, long, long)]
    wide = FeatureLine(long, long, [long], 4.0, own)
    draw_feature_sheet(long, long, [wide], tmp_path / "sheet.png", cell_px=CELL)
    page = drawn(tmp_path / "sheet.png").astype(int)
    inked = np.abs(page - PAGE).max(axis=2) > 60
    assert not inked[:, : MARGIN_PX - 1].any()
    assert not inked[:, -MARGIN_PX + GAP_PX :].any()
    body = inked[100:, MARGIN_PX + PANEL_PX - GAP_PX : MARGIN_PX + PANEL_PX]
    assert not body.any()


def test_the_same_lines_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_feature_sheet("t", "s", [line(1)], tmp_path / name, cell_px=CELL)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_numbers_that_are_not_known_are_left_out():
    numbers = [("active on", 12.345, " % of images"), ("coherence", float("nan"), ""), ("stability", 0.5, "")]
    assert number_lines(numbers) == ["active on 12.3 % of images", "stability 0.5"]


@pytest.mark.parametrize("count", [0, 201])
def test_a_sheet_has_a_line_and_not_too_many(tmp_path, count):
    with pytest.raises(FluxIRError, match=f"a sheet shows 1 to 200 features: got {count}"):
        draw_feature_sheet("t", "s", [line(1, examples=1)] * count, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
