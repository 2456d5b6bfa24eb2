"""The contact sheet, decoded again: where its cells are, what they show, and that every text stays in its place."""

import colorsys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.visualize.sheet import LONGEST_SIDE_PX, MOST_COLUMNS, PAGE, SheetColumn, SheetRow, draw_sheet

COLUMNS, LINES = 5, 3
SIZE = (64, 48)


def colour(column, line):
    """Bright colours far from each other and from the page."""
    number = line * COLUMNS + column
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number / (COLUMNS * LINES), 1.0, 0.9))


def headers(count):
    return [SheetColumn(f"step {step}, t 0.50", str(step)) for step in range(count)]


@pytest.fixture
def picture(tmp_path):
    """Saves a picture of one colour."""

    def save(name, fill, size=SIZE):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", size, fill).save(path)
        return path

    return save


@pytest.fixture
def rows(picture):
    """A grid of pictures, each of a colour of its own."""
    return [
        SheetRow(f"single {line}", [picture(f"{column}.{line}", colour(column, line)) for column in range(COLUMNS)])
        for line in range(LINES)
    ]


def drawn(path):
    with Image.open(path) as page:
        assert page.format == "JPEG"
        return np.asarray(page.convert("RGB")).astype(int)


def box_of(page, fill):
    """Left, top, right and bottom (both exclusive) of what has about this colour; None if nothing has."""
    found = np.abs(page - fill).max(axis=2) < 30
    ys, xs = np.nonzero(found)
    if len(xs) == 0:
        return None
    box = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    assert found[box[1] : box[3], box[0] : box[2]].mean() > 0.98, "the colour is found elsewhere too"
    return box


def inked(page):
    return np.abs(page - PAGE).max(axis=2) > 60


def test_steps_run_across_and_blocks_down(rows, tmp_path):
    size = draw_sheet("a title", "a subtitle", headers(COLUMNS), rows, tmp_path / "sheet.jpg")
    page = drawn(tmp_path / "sheet.jpg")
    assert size == (page.shape[1], page.shape[0])
    boxes = {(column, line): box_of(page, colour(column, line)) for column in range(COLUMNS) for line in range(LINES)}
    for (column, line), (left, top, right, bottom) in boxes.items():
        assert (right - left, bottom - top) == SIZE
        assert left == boxes[column, 0][0]
        assert top == boxes[0, line][1]
        if column:
            assert left > boxes[column - 1, line][2]
        if line:
            assert top > boxes[column, line - 1][3]
    assert boxes[COLUMNS - 1, LINES - 1][2] <= size[0]
    assert boxes[COLUMNS - 1, LINES - 1][3] <= size[1]


def test_every_column_and_row_has_a_label_beside_its_cells(rows, tmp_path):
    draw_sheet("", "", headers(COLUMNS), rows, tmp_path / "sheet.jpg")
    page = drawn(tmp_path / "sheet.jpg")
    ink, first = inked(page), box_of(page, colour(0, 0))
    for column in range(COLUMNS):
        left, _, right, _ = box_of(page, colour(column, 0))
        assert ink[: first[1], left:right].any()
    for line in range(LINES):
        _, top, _, bottom = box_of(page, colour(0, line))
        assert ink[top:bottom, : first[0]].any()
        assert not ink[bottom : bottom + 2, : first[0]].any()


def test_a_missing_picture_leaves_a_gap(rows, tmp_path):
    rows[1].pictures[2] = None
    draw_sheet("", "", headers(COLUMNS), rows, tmp_path / "sheet.jpg")
    page = drawn(tmp_path / "sheet.jpg")
    assert box_of(page, colour(2, 1)) is None
    left, _, right, _ = box_of(page, colour(2, 0))
    _, top, _, bottom = box_of(page, colour(1, 1))
    assert np.abs(page[top + 4 : bottom - 4, left + 4 : right - 4] - PAGE).max() < 12


def test_large_pictures_shrink_and_small_ones_do_not_grow(picture, tmp_path):
    for side_px, cell_px in ((1024, 192), (200, 192), (16, 16)):
        rows = [SheetRow("single 0", [picture("p", (255, 0, 0), (side_px, side_px))])]
        draw_sheet("", "", headers(1), rows, tmp_path / "sheet.jpg")
        left, top, right, bottom = box_of(drawn(tmp_path / "sheet.jpg"), (255, 0, 0))
        assert (right - left, bottom - top) == (cell_px, cell_px)


def test_pictures_keep_their_proportions(picture, tmp_path):
    rows = [SheetRow("single 0", [picture("p", (255, 0, 0), (1536, 512))])]
    draw_sheet("", "", headers(1), rows, tmp_path / "sheet.jpg")
    left, top, right, bottom = box_of(drawn(tmp_path / "sheet.jpg"), (255, 0, 0))
    assert (right - left, bottom - top) == (192, 64)


def test_jpegs_much_larger_than_their_cells_show_the_same(tmp_path):
    halves = Image.new("RGB", (1024, 1024), (255, 0, 0))
    halves.paste((0, 0, 255), (512, 0, 1024, 1024))
    halves.save(tmp_path / "p.jpg", quality=95, subsampling=0)
    draw_sheet("", "", headers(1), [SheetRow("single 0", [tmp_path / "p.jpg"])], tmp_path / "sheet.jpg")
    page = drawn(tmp_path / "sheet.jpg")
    red, blue = box_of(page, (255, 0, 0)), box_of(page, (0, 0, 255))
    assert red[3] - red[1] == blue[3] - blue[1] == 192
    assert red[2] - red[0] == pytest.approx(96, abs=2)
    assert blue[2] - red[0] == 192


@pytest.mark.parametrize("title", ["word " * 10_000, "w" * 50_000, "many\n\n lines\t" * 50])
def test_long_titles_are_cut_at_the_margin(rows, tmp_path, title):
    draw_sheet(title, title, headers(COLUMNS), rows, tmp_path / "sheet.jpg")
    page = drawn(tmp_path / "sheet.jpg")
    top = box_of(page, colour(0, 0))[1]
    ink = inked(page)[: top - 20]
    ends = np.nonzero(ink.any(axis=0))[0].max()
    assert page.shape[1] - 40 < ends < page.shape[1] - 2


def test_a_title_that_fits_is_left_as_it_is(rows, tmp_path):
    for title in ("a red circle", "a red circle ..."):
        draw_sheet(title, "", headers(COLUMNS), rows, tmp_path / f"{len(title)}.jpg")
    short, dotted = (inked(drawn(tmp_path / f"{length}.jpg"))[:25].any(axis=0).sum() for length in (12, 16))
    assert 40 < short < dotted


def test_one_narrow_column_still_has_room_for_a_title(picture, tmp_path):
    rows = [SheetRow("single 0", [picture("p", (255, 0, 0), (16, 16))])]
    width, _ = draw_sheet("a large red circle on white", "flux-tiny", headers(1), rows, tmp_path / "sheet.jpg")
    ends = np.nonzero(inked(drawn(tmp_path / "sheet.jpg"))[:16].any(axis=0))[0].max()
    assert 120 < ends < width - 100


@pytest.mark.parametrize(("blocks", "steps", "size"), [(57, 50, (96, 96)), (57, 2, (64, 512)), (3, MOST_COLUMNS, SIZE)])
def test_the_largest_sheets_stay_readable_by_any_viewer(picture, tmp_path, blocks, steps, size):
    path = picture("p", (255, 0, 0), size)
    rows = [SheetRow(f"single {block}", [path] * steps) for block in range(blocks)]
    width, height = draw_sheet("a title", "a subtitle", headers(steps), rows, tmp_path / "sheet.jpg")
    assert max(width, height) <= LONGEST_SIDE_PX
    assert drawn(tmp_path / "sheet.jpg").shape == (height, width, 3)


@pytest.mark.parametrize("side_px", [96, 40, 12])
def test_headers_of_narrow_columns_do_not_run_into_each_other(picture, tmp_path, side_px):
    rows = [SheetRow("single 0", [picture("p", (255, 0, 0), (side_px, side_px))] * 12)]
    columns = [SheetColumn(f"step {step + 20}, t 0.50", str(step)) for step in range(12)]
    draw_sheet("", "", columns, rows, tmp_path / "sheet.jpg")
    page = drawn(tmp_path / "sheet.jpg")
    red = np.abs(page - (255, 0, 0)).max(axis=2) < 30
    top = np.nonzero(red.any(axis=1))[0].min()
    cells = np.nonzero(np.diff(np.r_[0, red[top + side_px // 2].astype(int), 0]))[0].reshape(-1, 2)
    assert len(cells) == 12
    ink = inked(page)[: top - 1]
    for (left, right), (following, _) in pairwise(cells):
        assert ink[:, left:right].any()
        assert not ink[:, right:following].any()


def test_nothing_to_show_is_refused(picture, tmp_path):
    empty = [SheetRow("single 0", [None, None])]
    for columns, rows in ((headers(2), empty), (headers(2), []), ([], [SheetRow("single 0", [])])):
        with pytest.raises(FluxIRError, match="at least one picture"):
            draw_sheet("", "", columns, rows, tmp_path / "sheet.jpg")
    many = [SheetRow("single 0", [picture("p", (255, 0, 0))] * (MOST_COLUMNS + 1))]
    with pytest.raises(FluxIRError, match=f"at most {MOST_COLUMNS} columns: got {MOST_COLUMNS + 1}"):
        draw_sheet("", "", headers(MOST_COLUMNS + 1), many, tmp_path / "sheet.jpg")
    assert not list(tmp_path.glob("sheet*"))


def test_a_broken_picture_is_an_error_and_leaves_no_sheet(rows, tmp_path):
    rows[2].pictures[4].write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify image"):
        draw_sheet("", "", headers(COLUMNS), rows, tmp_path / "sheet.jpg")
    assert not list(tmp_path.glob("sheet*"))


def test_the_same_pictures_give_the_same_bytes(rows, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        draw_sheet("a title", "", headers(COLUMNS), rows, tmp_path / name)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_a_subtitle_that_is_a_little_too_long_is_drawn_smaller_and_whole(picture, tmp_path):
    rows = [SheetRow("double 0", [picture(str(step), (255, 0, 0), (128, 128)) for step in range(4)])]
    for lens in ("euler", "eulex"):
        subtitle = f"flux-tiny, seed 2014090147: the state each block would go to ({lens})"
        draw_sheet("a red circle", subtitle, headers(4), rows, tmp_path / f"{lens}.png")
    assert (tmp_path / "euler.png").read_bytes() != (tmp_path / "eulex.png").read_bytes()
