"""The contact sheet: every block at every step on one page, steps across, blocks down, the whole story at once."""

from bisect import bisect_left
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file

PAGE, INK, FAINT = (250, 250, 248), (30, 30, 34), (110, 110, 118)
LONGEST_SIDE_PX = 6000  # JPEG viewers stay comfortable; cells shrink to fit
MOST_CELL_PX = 192
MOST_COLUMNS = 150  # with more, cells would be too small to see anything: leave some out
LEAST_PAGE_PX = 480  # a single narrow column still has room for its title
LEAST_TEXT_PX, MOST_TEXT_PX = 11, 22
SMALLEST_PRINT_PX = 8  # of column headers over narrow cells

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class SheetColumn(NamedTuple):
    """One step: its header, and the short one used where the columns are too narrow for it."""

    header: str
    short: str


class SheetRow(NamedTuple):
    """One block: its label and its picture per step (None where there is none)."""

    label: str
    pictures: list[Path | None]


def draw_sheet(
    title: str, subtitle: str, columns: Sequence[SheetColumn], rows: Sequence[SheetRow], path: Path
) -> tuple[int, int]:
    """Write the sheet to `path`, as PNG if it is named so and else as JPEG, and give its width and height [px].

    Raises FluxIRError if there is nothing to show, or more than `MOST_COLUMNS`.
    """
    found = [picture for row in rows for picture in row.pictures if picture is not None]
    if not found or not columns:
        raise FluxIRError("a contact sheet needs at least one picture: got none", hint="decode the capture first")
    if len(columns) > MOST_COLUMNS:
        raise FluxIRError(
            f"a contact sheet has at most {MOST_COLUMNS} columns: got {len(columns)}", hint="leave some steps out"
        )
    with Image.open(found[0]) as first:
        cell = _cell_size(first.width, first.height, len(columns), len(rows))
    frame = _Frame.around(cell, len(columns), [row.label for row in rows])
    page = Image.new("RGB", (frame.width_px, frame.height_px), PAGE)
    _write_titles(ImageDraw.Draw(page), frame, title, subtitle)
    _write_labels(ImageDraw.Draw(page), frame, columns, rows)
    for line, row in enumerate(rows):
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                _paste(page, picture, frame.corner(column, line), cell)
    encoded = BytesIO()  # encoded before it is written: a full disk shows as one, not as an error of the encoder
    if path.suffix == ".png":
        page.save(encoded, format="PNG")
    else:
        page.save(encoded, format="JPEG", quality=92, subsampling=0)
    with complete_file(path) as beside:
        beside.write_bytes(encoded.getbuffer())
    return page.size


class _Frame(NamedTuple):
    """Where things stand on the page [px]."""

    cell_width_px: int
    cell_height_px: int
    left_px: int
    top_px: int
    gap_px: int
    text_px: int
    width_px: int
    height_px: int
    title_font: Font
    font: Font

    @classmethod
    def around(cls, cell: tuple[int, int], columns: int, labels: Sequence[str]) -> "_Frame":
        """The frame for this many cells, its margins as wide as the labels need."""
        cell_width_px, cell_height_px = cell
        text_px = max(LEAST_TEXT_PX, min(MOST_TEXT_PX, cell_height_px // 6))
        font = ImageFont.load_default(text_px)
        gap_px = max(2, text_px // 3)
        left_px = round(max(font.getlength(label) for label in labels)) + 2 * gap_px
        top_px = round(text_px * 4.8)
        return cls(
            cell_width_px,
            cell_height_px,
            left_px,
            top_px,
            gap_px,
            text_px,
            width_px=max(LEAST_PAGE_PX, left_px + columns * (cell_width_px + gap_px)),
            height_px=top_px + len(labels) * (cell_height_px + gap_px),
            title_font=ImageFont.load_default(round(text_px * 1.2)),
            font=font,
        )

    def corner(self, column: int, line: int) -> tuple[int, int]:
        """The top left corner of a cell."""
        x = self.left_px + column * (self.cell_width_px + self.gap_px)
        return x, self.top_px + line * (self.cell_height_px + self.gap_px)


def _cell_size(natural_width_px: int, natural_height_px: int, columns: int, lines: int) -> tuple[int, int]:
    """As large as the page allows, never larger than the pictures are."""
    aspect = natural_height_px / natural_width_px
    fits_px = min(LONGEST_SIDE_PX / columns, LONGEST_SIDE_PX / (lines * aspect)) * 0.9  # the rest is for gaps
    width_px = max(1, int(min(natural_width_px, MOST_CELL_PX, fits_px)))
    return width_px, max(1, round(width_px * aspect))


def _headers(columns: Sequence[SheetColumn], frame: _Frame) -> tuple[list[str], Font]:
    """The headers and the largest font in which all of them fit their columns; the short ones if there is none."""
    headers = [column.header for column in columns]
    for size_px in range(frame.text_px, SMALLEST_PRINT_PX - 1, -1):
        font = ImageFont.load_default(size_px)
        if max(font.getlength(header) for header in headers) <= frame.cell_width_px:
            return headers, font
    return [column.short for column in columns], ImageFont.load_default(SMALLEST_PRINT_PX)


def _write_titles(pen: ImageDraw.ImageDraw, frame: _Frame, title: str, subtitle: str) -> None:
    room_px = frame.width_px - 2 * frame.gap_px
    pen.text((frame.gap_px, frame.gap_px), _fitted(title, frame.title_font, room_px), INK, frame.title_font)
    below_title = (frame.gap_px, frame.gap_px + 1.5 * frame.text_px)
    fonts = [ImageFont.load_default(size_px) for size_px in range(frame.text_px, SMALLEST_PRINT_PX - 1, -1)]
    line = " ".join(subtitle.split())
    font = next((font for font in fonts if font.getlength(line) <= room_px), frame.font)
    pen.text(below_title, _fitted(line, font, room_px), FAINT, font)


def _write_labels(
    pen: ImageDraw.ImageDraw, frame: _Frame, columns: Sequence[SheetColumn], rows: Sequence[SheetRow]
) -> None:
    headers, font = _headers(columns, frame)
    for column, header in enumerate(headers):
        x, _ = frame.corner(column, 0)
        pen.text((x + frame.cell_width_px / 2, frame.top_px - frame.gap_px), header, FAINT, font, anchor="mb")
    for line, row in enumerate(rows):
        _, y = frame.corner(0, line)
        end = (frame.left_px - frame.gap_px, y + frame.cell_height_px / 2)
        pen.text(end, row.label, INK, frame.font, anchor="rm")


def _paste(page: Image.Image, path: Path, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """A picture in the middle of its cell, in its own proportions: two runs on one sheet may differ in them."""
    with Image.open(path) as picture:
        picture.draft("RGB", size)  # a JPEG much larger than its cell is decoded at a fraction of its size
        fitted = ImageOps.contain(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    (x, y), (width, height) = corner, size
    page.paste(fitted, (x + (width - fitted.width) // 2, y + (height - fitted.height) // 2))


def _fitted(text: str, font: Font, room_px: float) -> str:
    """`text` on one line, cut with an ellipsis where it would need more room."""
    line = " ".join(text.split())
    if font.getlength(line) <= room_px:
        return line
    too_long = bisect_left(range(len(line)), True, key=lambda end: font.getlength(f"{line[:end]}...") > room_px)
    return f"{line[: max(0, too_long - 1)]}..."
