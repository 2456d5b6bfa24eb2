"""Captions in a translucent box that always fit, whatever the size of the picture.

The size of the text and the form of the sentence are settled once per film, for the widest of its captions, so that
nothing jumps between frames. The font is the one inside Pillow: no system font is looked for.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

READABLE_PX = 16  # a picture on which no caption of this size fits on one line is tiny, and is enlarged,
COMFORTABLE_PX = 24  # until one of this size does: so captions cover little of it
LEAST_PX = 10  # before the text gets smaller than this, the sentence is wrapped, then abbreviated
MOST_ENLARGED_PX = 1024  # no longer side is enlarged beyond this
LEAST_LABEL_CHARS = 12  # a label's text shrinks until so many fit, and is cut after those that do

_LIGHT_LEFT = 0.35  # of the picture under the box: white text has a contrast of at least 7 to 1 on it
_SHADE = [round(value * _LIGHT_LEFT) for value in range(256)] * 3
_RULER = ImageDraw.Draw(Image.new("L", (1, 1)))

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Box(NamedTuple):
    """A box for text: its left, top, right and bottom edge on the picture, and where in it the text begins [px]."""

    edges: tuple[int, int, int, int]
    text_corner: tuple[int, int]
    text_px: int


class CaptionStyle(NamedTuple):
    """How all captions of a film are drawn: which form of the sentence, and in which box."""

    form: int
    box: Box


def fit_captions(captions: Sequence[Sequence[str]], width_px: int, height_px: int, font_size: int) -> CaptionStyle:
    """The style in which every one of these captions fits a picture of this size, at `font_size` px if it can.

    Each caption is given in several forms, from the fullest to the tersest. The first form that is readable is used, or
    else the one that can be largest.
    """
    forms = [_widest(forms) for forms in zip(*captions, strict=True)]
    sizes = [_largest_size(text, width_px, height_px, font_size) for text in forms]
    readable = min(font_size, LEAST_PX)
    form = next((index for index, size in enumerate(sizes) if size >= readable), sizes.index(max(sizes)))
    return CaptionStyle(form, _box(forms[form], max(1, sizes[form])))


def enlargement(captions: Sequence[Sequence[str]], width_px: int, height_px: int, font_size: int) -> int:
    """The smallest whole factor by which a picture must grow so that its captions can be read; 1 for most."""
    widest = _widest([forms[0] for forms in captions])
    if _largest_size(widest, width_px, height_px, font_size) >= min(font_size, READABLE_PX):
        return 1
    needed_width_px, needed_height_px = _room(widest, min(font_size, COMFORTABLE_PX))
    wanted = max(math.ceil(needed_width_px / width_px), math.ceil(needed_height_px / height_px))
    return max(1, min(wanted, MOST_ENLARGED_PX // max(width_px, height_px)))


def draw_caption(picture: Image.Image, caption: Sequence[str], style: CaptionStyle) -> None:
    """Draw a caption, given in all its forms, into the picture's top left corner."""
    _draw(picture, caption[style.form], style.box)


def fit_label(text: str, panel: tuple[int, int, int, int], font_size: int) -> tuple[str, Box]:
    """A text on one line along the bottom of a panel (left, top, right, bottom [px]), cut where it must be."""
    left, top, right, bottom = panel
    width, height = right - left, bottom - top
    size = max(1, _largest_size("m" * LEAST_LABEL_CHARS, width, height, font_size))
    line = _cut(" ".join(text.split()), width, size)
    size = max(1, _largest_size(line, width, height, size))  # some scripts are higher than others
    return line, _moved(_box(line, size), left, bottom - _room(line, size)[1])


def draw_label(picture: Image.Image, line: str, box: Box) -> None:
    """Draw a line that `fit_label` has fitted."""
    _draw(picture, line, box)


def shade(picture: Image.Image) -> Image.Image:
    """The picture as it shows through a box."""
    return picture.point(_SHADE)


def _draw(picture: Image.Image, text: str, box: Box) -> None:
    picture.paste(shade(picture.crop(box.edges)), box.edges[:2])
    pen = ImageDraw.Draw(picture)
    pen.multiline_text(box.text_corner, text, (255, 255, 255), _font(box.text_px), spacing=_spacing(box.text_px))


def _cut(line: str, width_px: int, size: int) -> str:
    """The line, or as much of its beginning as there is room for."""
    if _room(line, size)[0] <= width_px:
        return line
    kept = bisect_left(range(1, len(line)), True, key=lambda kept: _room(line[:kept] + "…", size)[0] > width_px)
    return line[:kept] + "…"


def _box(text: str, size: int) -> Box:
    """The box of a text in the top left corner of a picture."""
    left, top, _, _ = _extent(text, size)
    margin, padding = _margin(size), _padding(size)
    width, height = _room(text, size)
    edges = (margin, margin, width - margin, height - margin)
    return Box(edges, (margin + padding - left, margin + padding - top), size)


def _moved(box: Box, dx: int, dy: int) -> Box:
    (left, top, right, bottom), (x, y), size = box
    return Box((left + dx, top + dy, right + dx, bottom + dy), (x + dx, y + dy), size)


def _room(text: str, size: int) -> tuple[int, int]:
    """Width and height that the text takes with its box and the margin around it [px]."""
    left, top, right, bottom = _extent(text, size)
    around = 2 * (_margin(size) + _padding(size))
    return right - left + around, bottom - top + around


def _extent(text: str, size: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = _RULER.multiline_textbbox((0, 0), text, _font(size), spacing=_spacing(size))
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _largest_size(text: str, width_px: int, height_px: int, most: int) -> int:
    """The largest size of text up to `most` that leaves room for its box; 0 if none does."""

    def too_large(size: int) -> bool:
        width, height = _room(text, size)
        return width > width_px or height > height_px

    return bisect_left(range(1, most + 1), True, key=too_large)


def _widest(texts: Sequence[str]) -> str:
    """A text as wide as the widest of these, whatever their digits: all digits are taken for the widest one."""
    digit = max("0123456789", key=lambda digit: _font(100).getlength(digit))
    canonical = {re.sub(r"\d", digit, text) for text in texts}
    return max(canonical, key=lambda text: _extent(text, 100)[2])


def _margin(size: int) -> int:
    return size // 3


def _padding(size: int) -> int:
    return max(1, size // 3)


def _spacing(size: int) -> int:
    return max(1, size // 5)


@lru_cache(maxsize=64)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)
