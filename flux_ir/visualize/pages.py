"""Contact sheets in pages: whatever does not fit one sheet at a readable size goes on to the next, headers and all."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

from flux_ir.errors import FluxIRError
from flux_ir.visualize.frames import Frame
from flux_ir.visualize.pictures import PictureReader
from flux_ir.visualize.sheet import MOST_CELL_PX, SheetColumn, SheetRow, draw_sheet

T = TypeVar("T")

LONGEST_PAGE_PX = 4800  # of cells, before labels and titles: 24 pictures of the largest size
_GAP_PX = 8


class Page(NamedTuple):
    """One sheet: its place in the sequence, and the steps and blocks on it."""

    number: int
    of: int
    steps: list[int]
    blocks: list[str]

    def file(self, path: Path) -> Path:
        """Where it goes: `path` itself if it is the only one."""
        return path if self.of == 1 else path.with_stem(f"{path.stem}_page_{self.number}_of_{self.of}")


def write_pages(
    title: str, subtitle: str, frames: Sequence[Frame], reader: PictureReader, path: Path
) -> Iterator[tuple[Path, int, int]]:
    """Write one PNG per page, and give the name, width and height [px] of each as it is finished.

    Steps run across, in rising order, and blocks down. Where frames have several pictures, they stand next to each
    other under the letters A, B. Raises FluxIRError naming the file if a picture is missing or broken, unless the
    reader skips such: then its place stays empty.
    """
    grid = {(frame.cell.step, frame.cell.label): frame.pictures for frame in frames}
    width, height = _size_of_first(grid, reader)
    for page in _paginate(frames, width, height):
        pictures = [[grid[step, block] for step in page.steps] for block in page.blocks]
        rows = [
            SheetRow(block, [path if reader.read(path, draft_px=8) else None for cell in line for path in cell])
            for block, line in zip(page.blocks, pictures, strict=True)
        ]
        if not any(picture for row in rows for picture in row.pictures):
            continue
        numbered = subtitle if page.of == 1 else f"page {page.number} of {page.of}; {subtitle}"
        columns = _columns(page.steps, generations=len(frames[0].pictures))
        yield (page.file(path), *draw_sheet(title, numbered, columns, rows, page.file(path)))


def _size_of_first(grid: dict[tuple[int, str], tuple[Path, ...]], reader: PictureReader) -> tuple[int, int]:
    for pictures in grid.values():
        for path in pictures:
            if (picture := reader.read(path)) is not None:
                return picture.size
    raise FluxIRError("a contact sheet needs at least one picture: every one was left out", hint="decode again")


def _paginate(frames: Sequence[Frame], width_px: int, height_px: int) -> list[Page]:
    """All pages, those with the first blocks before those with the next; each about as full as the others."""
    cell_width_px = min(width_px, MOST_CELL_PX)
    cell_height_px = max(1, round(cell_width_px * height_px / width_px))
    most_columns = LONGEST_PAGE_PX // (cell_width_px + _GAP_PX) // len(frames[0].pictures)
    steps = sorted({frame.cell.step for frame in frames})
    in_depth_order = sorted((frame.cell for frame in frames), key=lambda cell: (cell.kind, cell.block))
    blocks = list(dict.fromkeys(cell.label for cell in in_depth_order))
    places = [
        (some_steps, some_blocks)
        for some_blocks in _even_parts(blocks, LONGEST_PAGE_PX // (cell_height_px + _GAP_PX))
        for some_steps in _even_parts(steps, most_columns)
    ]
    return [Page(number, len(places), *place) for number, place in enumerate(places, start=1)]


def _even_parts(items: Sequence[T], most: int) -> list[list[T]]:
    """The items in as few parts of at most `most` as there can be, equally long but for one."""
    parts = math.ceil(len(items) / max(1, most))
    ends = [round(len(items) * part / parts) for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(ends)]


def _columns(steps: Sequence[int], *, generations: int) -> list[SheetColumn]:
    letters = "ABCDEFGH"[:generations] if generations > 1 else ""
    if not letters:
        return [SheetColumn(f"step {step}", str(step)) for step in steps]
    return [SheetColumn(f"step {step} {letter}", f"{step}{letter}") for step in steps for letter in letters]
