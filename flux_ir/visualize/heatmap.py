"""Where in a picture a feature is active: its values on the grid of tokens, drawn over the picture.

All pictures of a feature are drawn by one scale, so that a weak picture looks weak; a value of 0 leaves the picture as
it is, bit for bit. Values come from files: nothing is sampled again, and no torch is needed.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flux_ir.errors import FluxIRError

Grid = NDArray[np.floating]
"""Values of a feature, [rows, columns] of tokens, never negative."""
Bytes = NDArray[np.uint8]

STOPS = ((70, 20, 160), (180, 30, 150), (238, 68, 72), (255, 150, 0), (255, 228, 20))
"""The colours from just above 0 to the top of the scale, evenly spaced. Lightness grows all the way."""
_PLACES = np.linspace(0, len(STOPS) - 1, 256)
COLOURS = np.stack([np.interp(_PLACES, range(len(STOPS)), channel) for channel in zip(*STOPS, strict=True)], axis=1)
"""The same in 256 levels, [256, 3]."""
OPACITY = 0.8
"""The opacity of the strongest colour."""


def scale_top(values: Grid, percentile: float = 100.0) -> float:
    """The value that gets the strongest colour in all pictures of a feature: its largest, or a percentile.

    The percentile is one of the values above 0: most tokens of a sparse feature are 0, and would pull it to 0.
    Raises FluxIRError if there is no value above 0, and for values that are not finite or negative.
    """
    if not 0 < percentile <= 100:
        raise FluxIRError(f"a percentile must be above 0 and at most 100: got {percentile}", hint="try 99")
    if not np.isfinite(values).all() or (values < 0).any():
        raise FluxIRError("values of a feature must be finite and not negative", hint="score the collection again")
    active = values[values > 0]
    if not active.size:
        raise FluxIRError("a scale needs a value above 0: the feature is silent", hint="choose a feature that is alive")
    return float(np.percentile(active, percentile))


def heat_layer(
    values: Grid, size_px: tuple[int, int], top: float, *, smooth: bool = False, opacity: float = OPACITY
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colours [height, width, 3] in levels of 255 and their opacity [height, width], of a map drawn at a size (width,
    height).

    Blocky: every pixel has the value of the token that its middle lies in. `smooth`: bilinear between the middles of
    tokens. Opacity grows with the square root of the value, so that weak tokens are seen and 0 is transparent.
    """
    width, height = size_px
    rows, columns = values.shape
    if smooth:
        picture = Image.fromarray(np.asarray(values, np.float32))
        spread = np.asarray(picture.resize(size_px, Image.Resampling.BILINEAR), np.float64)
    else:
        row = (np.arange(height) + 0.5) * rows / height
        column = (np.arange(width) + 0.5) * columns / width
        spread = np.asarray(values, np.float64)[row.astype(int)[:, None], column.astype(int)[None, :]]
    share = np.clip(spread / top, 0, 1)
    return COLOURS[np.rint(255 * share).astype(int)], opacity * np.sqrt(share)


def overlay(
    picture: Image.Image, values: Grid, top: float, *, smooth: bool = False, opacity: float = OPACITY
) -> Image.Image:
    """The picture with a feature's map over it, of any aspect. `top` is `scale_top` of all the feature's values."""
    colours, cover = heat_layer(values, picture.size, top, smooth=smooth, opacity=opacity)
    below = np.asarray(picture.convert("RGB"), np.float64)
    return Image.fromarray(np.rint(below + (colours - below) * cover[..., None]).astype(np.uint8))


def legend(
    size_px: tuple[int, int],
    top: float,
    *,
    background: tuple[int, int, int] = (250, 250, 248),
    ink: tuple[int, int, int] = (110, 110, 118),
    opacity: float = OPACITY,
) -> Image.Image:
    """The scale as a strip from 0 to `top`, as it looks over a light and a dark picture, with both numbers below it."""
    width, height = size_px
    text_px = max(8, round(height * 0.45))
    bar = max(2, height - text_px - 3)
    ground = np.full((bar, width, 3), 255.0)
    ground[bar // 2 :] = 40.0
    ramp = (np.arange(width) + 0.5) / width
    colours = COLOURS[np.rint(255 * ramp).astype(int)][None]
    blended = ground + (colours - ground) * (opacity * np.sqrt(ramp))[None, :, None]
    page = Image.new("RGB", size_px, background)
    page.paste(Image.fromarray(np.rint(blended).astype(np.uint8)), (0, 0))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(text_px)
    pen.text((0, height), "0", ink, font, anchor="lb")
    pen.text((width, height), short_number(top), ink, font, anchor="rb")
    return page


def short_number(value: float) -> str:
    """Three digits at most: 0.0123, 4.5, 128, 1.2e+06."""
    return f"{value:.3g}"
