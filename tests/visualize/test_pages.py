"""Contact sheets in pages: everything is on one of them, once, with its headers."""

import pytest
from PIL import Image

from flux_ir.errors import FluxIRError
from flux_ir.visualize.frames import Cell, Frame
from flux_ir.visualize.pages import LONGEST_PAGE_PX, write_pages
from flux_ir.visualize.pictures import PictureReader
from flux_ir.visualize.sheet import LONGEST_SIDE_PX


def make_frames(folder, steps, doubles, singles, *, size=(64, 64), generations=1):
    """Frames whose colours tell step, block and generation."""
    frames = []
    for step in range(steps):
        for kind, count in (("double", doubles), ("single", singles)):
            for block in range(count):
                paths = [folder / f"{step}_{kind}_{block}_{place}.png" for place in range(generations)]
                for place, path in enumerate(paths):
                    colour = colour_of(Cell(step, kind, block), place)
                    Image.new("RGB", size, colour).save(path, compress_level=0)
                frames.append(Frame(Cell(step, kind, block), tuple(paths)))
    return frames


def colour_of(cell, place=0):
    return (
        4 * cell.step,
        3 * cell.block + (128 if cell.kind == "single" else 0),
        255 - 20 * place,
    )  # never grey, as text is


def pages_of(frames, target, *, skip_broken=False):
    return list(write_pages("a title", "a subtitle", frames, PictureReader(skip_broken=skip_broken), target))


def colours_of(path):
    with Image.open(path) as page:
        assert page.format == "PNG"
        return {colour for _, colour in page.convert("RGB").getcolors(maxcolors=2**24)}


def test_a_small_grid_is_one_page_of_the_name_asked_for(tmp_path):
    frames = make_frames(tmp_path, 3, 2, 4)
    target = tmp_path / "sheet.png"
    ((path, width, height),) = pages_of(frames, target)
    assert path == target
    with Image.open(path) as page:
        assert page.size == (width, height)
    assert {colour_of(frame.cell) for frame in frames} <= colours_of(path)


def test_steps_run_across_and_blocks_down(tmp_path):
    ((path, *_),) = pages_of(make_frames(tmp_path, 3, 2, 4), tmp_path / "sheet.png")
    with Image.open(path) as page:
        where = {}
        for y in range(page.height):
            for x in range(page.width):
                where.setdefault(page.getpixel((x, y)), (x, y))
    at = {cell: where[colour_of(cell)] for cell in (Cell(0, "double", 0), Cell(2, "double", 0), Cell(0, "single", 3))}
    assert at[Cell(0, "double", 0)][1] == at[Cell(2, "double", 0)][1]
    assert at[Cell(0, "double", 0)][0] == at[Cell(0, "single", 3)][0]
    assert at[Cell(0, "double", 0)] < at[Cell(2, "double", 0)]
    assert at[Cell(0, "double", 0)] < at[Cell(0, "single", 3)]


def test_a_large_grid_is_paged_and_every_picture_is_on_one_page(tmp_path):
    frames = make_frames(tmp_path, 26, 5, 22, size=(192, 192))
    reversed_order = sorted(frames, reverse=True)
    pages = pages_of(reversed_order, tmp_path / "sheet.png")
    assert [path.name for path, *_ in pages] == [f"sheet_page_{n}_of_4.png" for n in range(1, 5)]
    assert all(max(size) <= LONGEST_SIDE_PX for _, *size in pages)
    on_pages = [colours_of(path) for path, *_ in pages]
    for frame in frames:
        assert sum(colour_of(frame.cell) in colours for colours in on_pages) == 1, frame.cell


def test_tall_pictures_get_more_pages(tmp_path):
    pages = pages_of(make_frames(tmp_path, 1, 0, 9, size=(192, 192 * 5)), tmp_path / "sheet.png")
    assert len(pages) == 3
    assert all(height < LONGEST_PAGE_PX + 400 for _, _, height in pages)


def test_generations_stand_next_to_each_other(tmp_path):
    frames = make_frames(tmp_path, 3, 1, 0, generations=2)
    ((path, *_),) = pages_of(frames, tmp_path / "sheet.png")
    wanted = [colour_of(frame.cell, place) for frame in frames for place in (0, 1)]
    with Image.open(path) as page:
        line = [page.getpixel((x, page.height - 20)) for x in range(page.width)]
    assert [colour for colour in dict.fromkeys(line) if colour in wanted] == wanted


def test_a_pair_is_never_torn_between_pages(tmp_path):
    frames = make_frames(tmp_path, 30, 1, 0, size=(192, 192), generations=2)
    pages = pages_of(frames, tmp_path / "sheet.png")
    assert len(pages) == 3
    for path, *_ in pages:
        found = colours_of(path)
        for frame in frames:
            assert (colour_of(frame.cell, 0) in found) == (colour_of(frame.cell, 1) in found)


def test_generations_of_other_proportions_keep_them(tmp_path):
    frames = make_frames(tmp_path, 1, 1, 0, size=(64, 64), generations=2)
    Image.new("RGB", (64, 32), colour_of(frames[0].cell, 1)).save(frames[0].pictures[1])
    ((path, *_),) = pages_of(frames, tmp_path / "sheet.png")
    with Image.open(path) as page:
        counts = {colour: count for count, colour in page.getcolors(maxcolors=2**24)}
    assert counts[colour_of(frames[0].cell, 0)] == 64 * 64
    assert counts[colour_of(frames[0].cell, 1)] == 64 * 32


def test_a_broken_picture_is_named(tmp_path):
    frames = make_frames(tmp_path, 2, 2, 0)
    frames[1].pictures[0].write_bytes(b"")
    with pytest.raises(FluxIRError, match=frames[1].pictures[0].name):
        pages_of(frames, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_the_place_of_a_skipped_picture_stays_empty(tmp_path):
    frames = make_frames(tmp_path, 2, 2, 0)
    frames[1].pictures[0].unlink()
    ((path, *_),) = pages_of(frames, tmp_path / "sheet.png", skip_broken=True)
    colours = colours_of(path)
    assert [colour_of(frame.cell) in colours for frame in frames] == [True, False, True, True]


def test_broken_pictures_alone_make_no_sheet(tmp_path):
    frames = make_frames(tmp_path, 1, 2, 0)
    for frame in frames:
        frame.pictures[0].unlink()
    with pytest.raises(FluxIRError, match="every one was left out"):
        pages_of(frames, tmp_path / "sheet.png", skip_broken=True)
