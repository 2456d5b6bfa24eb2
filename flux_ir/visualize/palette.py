"""256 colours for a whole film: chosen once, from all of its pictures, so that no colour flickers between frames.

Between the colours of the palette, pixels are mixed in a pattern that stands still (ordered dithering), as strong as
the palette is coarse: gradients stay smooth, and where the picture does not change, the film does not either. Error
diffusion mixes better, but there it flickers (`benchmarks/animate_colours.py`).
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageStat

from flux_ir.errors import FluxIRError

COLOURS = 256
SAMPLED_PIXELS = 150_000  # of all frames together; choosing from more takes long and changes little

_GREYS = [round(255 * shade / 7) for shade in range(8)]  # captions are white on a dark box, with soft edges
_TILE_PX = 8


class Palette(NamedTuple):
    """The colours, as an image that `Image.quantize` takes, and how strongly to mix them [levels of 255]."""

    colours: Image.Image
    dither: int

    def apply(self, frame: Image.Image) -> Image.Image:
        """The RGB frame in these colours."""
        if self.dither:
            frame = ImageChops.add(frame, _pattern(frame.size, self.dither), scale=1, offset=-self.dither)
        return frame.quantize(palette=self.colours, dither=Image.Dither.NONE)


def thumbnail_side(thumbnails: int) -> int:
    """How large thumbnails for `film_palette` should be [px]: the more there are, the smaller."""
    return max(8, min(128, math.isqrt(SAMPLED_PIXELS // max(1, thumbnails))))


def film_palette(thumbnails: Iterable[Image.Image]) -> Palette:
    """The palette for a film. `thumbnails` are square and equally large, one or more per frame.

    Raises FluxIRError if there are none.
    """
    small = list(thumbnails)
    if not small:
        raise FluxIRError(
            "a film needs at least one frame: every picture was left out", hint="decode the capture again"
        )
    side = small[0].width
    mosaic = Image.new("RGB", (side, side * len(small)))
    for index, thumbnail in enumerate(small):
        mosaic.paste(thumbnail, (0, index * side))
    # Median cut alone has no bright colours: it takes averages. The k-means steps after it move them outwards.
    chosen = mosaic.quantize(COLOURS - len(_GREYS), Image.Quantize.MEDIANCUT, kmeans=1)
    colours = Image.new("P", (1, 1))
    colours.putpalette((chosen.getpalette("RGB") or []) + [grey for grey in _GREYS for _ in "RGB"])
    return Palette(colours, round(_coarseness(mosaic, colours)))


def _coarseness(mosaic: Image.Image, colours: Image.Image) -> float:
    """How far pixels are from their nearest colour [levels of 255]: root mean square, averaged over the channels."""
    nearest = mosaic.quantize(palette=colours, dither=Image.Dither.NONE).convert("RGB")
    return sum(ImageStat.Stat(ImageChops.difference(mosaic, nearest)).rms) / 3


@lru_cache(maxsize=1)
def _pattern(size_px: tuple[int, int], most: int) -> Image.Image:
    """Bayer's matrix over a whole frame, from 0 to twice `most`."""
    tile = Image.new("L", (_TILE_PX, _TILE_PX))
    highest = _TILE_PX**2 - 1
    tile.putdata([round(2 * most * rank / highest) for row in _bayer(_TILE_PX) for rank in row])
    width, height = size_px
    line, page = Image.new("L", (width, _TILE_PX)), Image.new("L", size_px)
    for left in range(0, width, _TILE_PX):
        line.paste(tile, (left, 0))
    for top in range(0, height, _TILE_PX):
        page.paste(line, (0, top))
    return Image.merge("RGB", [page] * 3)


def _bayer(side: int) -> list[list[int]]:
    """The matrix of ranks in which neighbours differ most (Bayer, 1973)."""
    if side == 1:
        return [[0]]
    half, quarter = side // 2, _bayer(side // 2)
    corner = [[0, 2], [3, 1]]
    return [[4 * quarter[y % half][x % half] + corner[y // half][x // half] for x in range(side)] for y in range(side)]
