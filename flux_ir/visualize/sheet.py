"""The contact sheet: every block at every step on one page, steps across, blocks down, the whole story at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file

PAGE, INK, FAINT = (250, 250, 248), (30, 30, 34), (110, 110, 118)
LONGEST_SIDE_PX = 6000  # JPEG viewers stay comfortable; cells shrink to fit
LEAST_CELL_PX, MOST_CELL_PX = 24, 192


class Row(NamedTuple):
    """One block: its label and its picture per step (None where there is none)."""

    label: str
    pictures: list[Path | None]


def draw_sheet(title: str, subtitle: str, steps: Sequence[str], rows: Sequence[Row], path: Path) -> tuple[int, int]:
    """Write the sheet as JPEG to `path` and give its width and height [px].

    `steps` are the column headers. Raises FluxIRError if there is nothing to show.
    """
    found = [picture for row in rows for picture in row.pictures if picture is not None]
    if not found or not steps:
        raise FluxIRError("a contact sheet needs at least one picture: got none", hint="decode the capture first")
    with Image.open(found[0]) as first:
        aspect = first.height / first.width
        natural_px = first.width
    cell_px = _cell_width(natural_px, aspect, len(steps), len(rows))
    frame = _Frame.around(cell_px, round(cell_px * aspect), len(steps), [row.label for row in rows])
    page = Image.new("RGB", (frame.width_px, frame.height_px), PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((frame.gap_px, frame.gap_px), _fitted(title, frame.title_font, frame.width_px), INK, frame.title_font)
    below_title = (frame.gap_px, frame.gap_px + 1.5 * frame.text_px)
    pen.text(below_title, _fitted(subtitle, frame.font, frame.width_px), FAINT, frame.font)
    for column, step in enumerate(steps):
        x, _ = frame.corner(column, 0)
        pen.text((x + cell_px / 2, frame.top_px - frame.gap_px), step, FAINT, frame.font, anchor="mb")
    for line, row in enumerate(rows):
        _, y = frame.corner(0, line)
        pen.text((frame.left_px - frame.gap_px, y + frame.cell_height_px / 2), row.label, INK, frame.font, anchor="rm")
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                _paste(page, picture, frame.corner(column, line), (cell_px, frame.cell_height_px))
    with complete_file(path) as beside:
        page.save(beside, format="JPEG", quality=92, subsampling=0)
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
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    title_font: ImageFont.FreeTypeFont | ImageFont.ImageFont

    @classmethod
    def around(cls, cell_width_px: int, cell_height_px: int, columns: int, labels: list[str]) -> "_Frame":
        """The frame for this many cells, its margins as wide as the labels need."""
        text_px = max(11, min(22, cell_height_px // 6))
        font, title_font = ImageFont.load_default(text_px), ImageFont.load_default(round(text_px * 1.2))
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
            width_px=left_px + columns * (cell_width_px + gap_px),
            height_px=top_px + len(labels) * (cell_height_px + gap_px),
            font=font,
            title_font=title_font,
        )

    def corner(self, column: int, line: int) -> tuple[int, int]:
        """The top left corner of a cell."""
        x = self.left_px + column * (self.cell_width_px + self.gap_px)
        return x, self.top_px + line * (self.cell_height_px + self.gap_px)


def _cell_width(natural_px: int, aspect: float, columns: int, lines: int) -> int:
    """As large as the page allows, never larger than the pictures are."""
    fits_px = min(LONGEST_SIDE_PX / columns, LONGEST_SIDE_PX / (lines * aspect)) * 0.9
    return max(LEAST_CELL_PX, round(min(natural_px, MOST_CELL_PX, fits_px)))


def _paste(page: Image.Image, path: Path, corner: tuple[int, int], size: tuple[int, int]) -> None:
    with Image.open(path) as picture:
        page.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), corner)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """`text` on one line, cut with an ellipsis where it would leave the page."""
    line = " ".join(text.split())
    room_px = width_px - 2 * font.getlength("x")
    if font.getlength(line) <= room_px:
        return line
    while line and font.getlength(line + "...") > room_px:
        line = line[:-1]
    return line + "..."
