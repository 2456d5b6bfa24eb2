"""Contact sheets of features: a feature a line, its pictures beside it with its map over them, by one scale a line."""

from collections.abc import Sequence
from io import BytesIO
from math import isnan
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.visualize.heatmap import OPACITY, legend, overlay, short_number

PAGE, INK, FAINT, RULE = (250, 250, 248), (30, 30, 34), (110, 110, 118), (226, 226, 222)
TITLE_PX, NAME_PX, TEXT_PX, SMALL_PX, TINY_PX = 24, 19, 14, 12, 11
MARGIN_PX, GAP_PX, PANEL_PX = 24, 8, 220
LEGEND_PX = (150, 26)
MOST_LINES = 200
"""More would make a picture that few programs open."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class SheetPicture(NamedTuple):
    """One picture of a feature."""

    picture: Image.Image | None
    """None: there is no picture, or the place stays empty."""
    values: NDArray[np.floating] | None
    """[rows, columns]: the map; None: none is drawn."""
    value: str
    """Below the picture."""
    caption: str
    """Below that, on two lines, cut where it has no room."""


class FeatureLine(NamedTuple):
    """One feature."""

    name: str
    label: str
    """What it means, in a few words; empty: not known."""
    numbers: Sequence[str]
    """What is known of it, a line each."""
    top: float | None
    """The value with the strongest colour in all its pictures; None: no maps, so no legend."""
    examples: Sequence[SheetPicture]


def draw_feature_sheet(
    title: str,
    subtitle: str,
    lines: Sequence[FeatureLine],
    path: Path,
    *,
    cell_px: int = 128,
    smooth: bool = False,
    opacity: float = OPACITY,
    plain: bool = False,
) -> tuple[int, int]:
    """Write the sheet to `path` as PNG, and give its width and height [px].

    `cell_px` is the longer side of a picture; `plain` shows every picture without its map too, above the one with it.
    The same lines give the same bytes. Raises FluxIRError without lines, and with more than `MOST_LINES`.
    """
    if not 1 <= len(lines) <= MOST_LINES:
        raise FluxIRError(
            f"a sheet shows 1 to {MOST_LINES} features: got {len(lines)}", hint="choose some with --features"
        )
    cell = _cell(lines, cell_px)
    columns = max(len(line.examples) for line in lines)
    stacked = 2 if plain else 1
    line_px = max(stacked * (cell[1] + 2) + _captions_px(lines), _panel_px(lines)) + 2 * GAP_PX
    top_px = MARGIN_PX + TITLE_PX + SMALL_PX + 3 * GAP_PX
    size = (
        2 * MARGIN_PX + PANEL_PX + columns * (cell[0] + GAP_PX),
        top_px + len(lines) * (line_px + 1) + MARGIN_PX - GAP_PX,
    )
    page = Image.new("RGB", size, PAGE)
    pen = ImageDraw.Draw(page)
    room = size[0] - 2 * MARGIN_PX
    pen.text((MARGIN_PX, MARGIN_PX), _cut(title, _font(TITLE_PX), room), INK, _font(TITLE_PX))
    below = (MARGIN_PX, MARGIN_PX + TITLE_PX + GAP_PX)
    pen.text(below, _cut(subtitle, _font(TEXT_PX), room), FAINT, _font(TEXT_PX))
    for number, line in enumerate(lines):
        y = top_px + number * (line_px + 1)
        pen.line([(MARGIN_PX, y), (size[0] - MARGIN_PX, y)], RULE)
        _draw_panel(page, pen, line, MARGIN_PX, y + GAP_PX, opacity)
        for column, example in enumerate(line.examples):
            x = MARGIN_PX + PANEL_PX + column * (cell[0] + GAP_PX)
            _draw_example(page, pen, example, line.top, (x, y + GAP_PX), cell, smooth, opacity, plain)
    encoded = BytesIO()
    page.save(encoded, format="PNG", optimize=True)
    with complete_file(path) as beside:
        beside.write_bytes(encoded.getbuffer())
    return size


def _cell(lines: Sequence[FeatureLine], longest_px: int) -> tuple[int, int]:
    """Width and height of all cells: the form of the first picture."""
    first = next((e.picture for line in lines for e in line.examples if e.picture is not None), None)
    if first is None:
        return longest_px, longest_px
    scale = longest_px / max(first.size)
    return max(1, round(first.width * scale)), max(1, round(first.height * scale))


def _panel_px(lines: Sequence[FeatureLine]) -> int:
    most = max(len(line.numbers) for line in lines)
    has_legend = any(line.top is not None for line in lines)
    return NAME_PX + 6 + 2 * (TEXT_PX + 3) + most * (SMALL_PX + 4) + 4 + (LEGEND_PX[1] + 8 if has_legend else 0)


def _captions_px(lines: Sequence[FeatureLine]) -> int:
    says = any(example.caption for line in lines for example in line.examples)
    return SMALL_PX + 6 + (2 * (TINY_PX + 2) if says else 0)


def _draw_panel(page: Image.Image, pen: ImageDraw.ImageDraw, line: FeatureLine, x: int, y: int, opacity: float) -> None:
    """Name, label, numbers and legend of a feature, one below the other."""
    room = PANEL_PX - 2 * GAP_PX
    pen.text((x, y), _cut(line.name, _font(NAME_PX), room), INK, _font(NAME_PX))
    y += NAME_PX + 6
    for text in _wrapped(line.label, _font(TEXT_PX), room, 2):
        pen.text((x, y), text, INK, _font(TEXT_PX))
        y += TEXT_PX + 3
    y += 4
    for text in line.numbers:
        pen.text((x, y), _cut(text, _font(SMALL_PX), room), FAINT, _font(SMALL_PX))
        y += SMALL_PX + 4
    if line.top is not None:
        page.paste(legend(LEGEND_PX, line.top, background=PAGE, ink=FAINT, opacity=opacity), (x, y + 6))


def _draw_example(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    example: SheetPicture,
    top: float | None,
    corner: tuple[int, int],
    cell: tuple[int, int],
    smooth: bool,  # noqa: FBT001 (a private function of one caller)
    opacity: float,
    plain: bool,  # noqa: FBT001
) -> None:
    x, y = corner
    if example.picture is not None:
        fitted = ImageOps.contain(example.picture.convert("RGB"), cell, Image.Resampling.LANCZOS)
        left, above = x + (cell[0] - fitted.width) // 2, (cell[1] - fitted.height) // 2
        if plain:
            page.paste(fitted, (left, y + above))
            y += cell[1] + 2
        if example.values is not None and top is not None:
            fitted = overlay(fitted, example.values, top, smooth=smooth, opacity=opacity)
        page.paste(fitted, (left, y + above))
    y += cell[1] + 3
    pen.text((x, y), _cut(example.value, _font(SMALL_PX), cell[0]), INK, _font(SMALL_PX))
    y += SMALL_PX + 3
    for text in _wrapped(example.caption, _font(TINY_PX), cell[0], 2):
        pen.text((x, y), text, FAINT, _font(TINY_PX))
        y += TINY_PX + 2


def number_lines(numbers: Sequence[tuple[str, float, str]]) -> list[str]:
    """Numbers as a panel says them: name, value and unit; those that are not known (NaN) are left out."""
    return [f"{name} {short_number(value)}{unit}" for name, value, unit in numbers if not isnan(value)]


def _font(size_px: int) -> Font:
    return ImageFont.load_default(size_px)


def _cut(text: str, font: Font, room_px: float) -> str:
    """The text on one line, or as much of its beginning as there is room for."""
    line = " ".join(text.split())
    if font.getlength(line) <= room_px:
        return line
    while line and font.getlength(f"{line}…") > room_px:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _wrapped(text: str, font: Font, room_px: float, most: int) -> list[str]:
    """The text on at most so many lines, broken between words; the last is cut where it must be."""
    lines, words = list[str](), text.split()
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= room_px:
            count += 1
        lines.append(_cut(" ".join(words[:count]), font, room_px))
        words = words[count:]
    return [*lines, _cut(" ".join(words), font, room_px)] if words else lines
