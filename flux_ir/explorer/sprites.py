"""Thumbnails of a run on a few large pictures: a page of 2,850 cells loads five files, not 2,850.

Steps run across and blocks down, as in the grid. A sheet is cut into bands of whole rows, so that a browser
decodes only what it shows.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil, isqrt
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import Block, Lens, Run

MOST_TILE_PX = 128  # a cell is at most this wide on screen, or half of it where pixels are fine
SHEET_PIXELS = 8_000_000  # of all bands of a sheet together: 32 MB once decoded
BAND_PIXELS = 2_000_000
READERS = 2  # threads: Pillow decodes outside Python's lock
QUALITY = 82
NOTHING = (128, 128, 128)


class Plan(NamedTuple):
    """How the thumbnails of a run lie: tile size [px], and how many rows a band has (the last may have fewer)."""

    tile_width_px: int
    tile_height_px: int
    rows_per_band: int


def plan_sheet(width_px: int, height_px: int, rows: int, columns: int) -> Plan:
    """The largest tiles, in the shape of the pictures, of which this many fit; never larger than the pictures."""
    longest_px = min(max(width_px, height_px), MOST_TILE_PX, isqrt(SHEET_PIXELS // (rows * columns)))
    scale = longest_px / max(width_px, height_px)
    tile_width_px, tile_height_px = max(1, round(width_px * scale)), max(1, round(height_px * scale))
    most_rows = max(1, BAND_PIXELS // (tile_width_px * tile_height_px * columns))
    bands = ceil(rows / most_rows)
    return Plan(tile_width_px, tile_height_px, ceil(rows / bands))


def picture_size(run: Run) -> tuple[int, int]:
    """Width and height [px] of the run's decoded pictures, by the first of them."""
    pictures = next(iter(run.pictures.values()))
    path = pictures[min(pictures)]
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, UnidentifiedImageError) as error:
        raise _broken(path, error) from error


def draw_bands(run: Run, lens: Lens, plan: Plan) -> Iterator[bytes]:
    """The bands of one lens from top to bottom, as JPEG. Raises FluxIRError naming a picture that cannot be read."""
    for start in range(0, len(run.blocks), plan.rows_per_band):
        yield _draw_band(run, lens, plan, run.blocks[start : start + plan.rows_per_band])


def _draw_band(run: Run, lens: Lens, plan: Plan, blocks: Sequence[Block]) -> bytes:
    size = (plan.tile_width_px, plan.tile_height_px)
    places = [
        (path, (column * size[0], row * size[1]))
        for row, block in enumerate(blocks)
        for column, step in enumerate(run.steps)
        if (path := run.pictures[lens].get((block, step))) is not None
    ]
    band = Image.new("RGB", (size[0] * len(run.steps), size[1] * len(blocks)), NOTHING)
    with ThreadPoolExecutor(READERS, thread_name_prefix="thumbnail") as pool:
        tiles = pool.map(lambda place: _thumbnail(place[0], size), places)
        for (_, corner), tile in zip(places, tiles, strict=True):
            band.paste(tile, corner)
    jpeg = io.BytesIO()
    band.save(jpeg, format="JPEG", quality=QUALITY)
    return jpeg.getvalue()


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * size[0], 2 * size[1]))  # JPEG gives halves, quarters and eighths for little
            return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> FluxIRError:
    return FluxIRError(
        f"{path} must be a picture: {error}",
        hint=f"flux-ir lens --generation_id {path.parents[3].name} decodes it again",
    )
