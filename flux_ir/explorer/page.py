"""The page of runs: template, style sheet, script, data and, if asked for, every picture, written as one file."""

import io
import os
from base64 import b64encode
from collections.abc import Iterator, Sequence
from math import ceil, isqrt
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError

from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import Block, PageRun, read_run, run_entry
from flux_ir.explorer.document import filled, joined, policy, safe_json
from flux_ir.files import complete_file, versions
from flux_ir.layout import DECODED_NAME, Lens
from flux_ir.threads import in_order

SCHEMA = 1  # raised when a page's script could no longer read an older page's data
STYLES = ("base.css", "explorer.css")
REGIONS = ("state", "address", "pictures", "head", "grid", "viewer", "curves", "gallery", "main")
SCRIPTS = ("shared.js", "svg.js", *(f"runs/{region}.js" for region in REGIONS))


def write_explorer(output_dir: Path, generation_ids: Sequence[str], target: Path, *, single_file: bool = False) -> Path:
    """Write the page of these runs to `target`, and its thumbnails into a folder beside it; gives `target`.

    With `single_file` all pictures are inside the page. Raises FluxIRError for an unknown run, a run without decoded
    pictures, a broken file, and a target that is not in the output folder.
    """
    if not generation_ids:
        raise FluxIRError("the explorer shows at least one run: got none", hint="name runs with --generation_id")
    if not target.absolute().is_relative_to(output_dir.absolute()) or ".." in target.parts:
        raise FluxIRError(
            f"the page must lie in the folder of the runs, {output_dir}: got {target}",
            hint="nothing outside that folder is ever written",
        )
    beside = Beside(target)
    links: Links = Inside() if single_file else beside
    runs = [read_run(output_dir, generation_id) for generation_id in dict.fromkeys(generation_ids)]
    data = {"schema": SCHEMA, "flux_ir": versions()["flux_ir"], "runs": [_entry(run, links) for run in runs]}
    with complete_file(target) as page, page.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_page(data, links))
    beside.remove_stale()  # after the page: the one before needs them until it is replaced
    return target


def _entry(run: PageRun, links: "Links") -> dict[str, Any]:
    layout = lay_out_tiles(*picture_size(run), len(run.blocks), len(run.steps))
    lenses = {
        lens: {
            "pictures": links.pictures(run, lens),
            "missing": run.missing(lens),
            "bands": [links.band(run, lens, index, jpeg) for index, jpeg in enumerate(draw_bands(run, lens, layout))],
        }
        for lens in run.pictures
    }
    return run_entry(run) | {"picture": links.picture(run), "lenses": lenses, "tiles": layout._asdict()}


def _page(data: dict[str, Any], links: "Links") -> Iterator[str]:
    """The text of the page in order."""
    style, script = joined(STYLES), joined(SCRIPTS)
    slots: dict[str, Iterator[str]] = {
        "policy": iter([policy(style, script)]),
        "style": iter([style]),
        "data": iter([safe_json(data)]),
        "first": links.first(),
        "script": iter([script]),
        "rest": links.rest(),
    }
    return filled("explorer.html", slots)


# ---- How the page finds its pictures: as files beside it, or as text inside it.
# An address in the page's JSON is a relative URL, or `#id` of an element whose text is the picture in base64.


CELL = "{kind}_block_{block}"  # filled in by the page's script, like {step}


class Beside:
    """Relative links to the run folders, and thumbnails in a folder named after the page."""

    def __init__(self, target: Path) -> None:
        self.page_folder = target.parent
        self.files = target.with_name(f"{target.stem}_files")
        self.written: set[Path] = set()

    def picture(self, run: PageRun) -> str | None:
        """The address of the finished picture, if it is still there."""
        path = run.folder.image()
        return self._url(path) if path.exists() else None

    def pictures(self, run: PageRun, lens: Lens) -> str:
        """A pattern for the addresses of all decoded pictures."""
        return f"{self._url(run.folder.decoded(lens))}/{DECODED_NAME}"

    def band(self, run: PageRun, lens: Lens, index: int, jpeg: bytes) -> str:
        """Store one band of thumbnails, and give its address."""
        path = self.files / f"{run.folder.generation_id}_{lens}_{index}.jpg"
        with complete_file(path) as beside:
            beside.write_bytes(jpeg)
        self.written.add(path)
        return self._url(path)

    def first(self) -> Iterator[str]:
        """Elements that the page needs before it can draw anything: none."""
        yield from ()

    def rest(self) -> Iterator[str]:
        """Elements that can wait until the page is drawn: none."""
        yield from ()

    def remove_stale(self) -> None:
        """Delete the thumbnails of an earlier page of this name that the new one does not use."""
        pattern = "[0-9a-f]" * 8 + "_*_*.jpg"
        for path in set(self.files.glob(pattern)) - self.written:
            path.unlink()

    def _url(self, path: Path) -> str:
        return quote(Path(os.path.relpath(path, self.page_folder)).as_posix())


class Inside:
    """Every picture inside the page: one file to send, as large as all of them and a third more."""

    def __init__(self) -> None:
        self.early: list[tuple[str, bytes]] = []
        self.late: list[tuple[PageRun, Lens]] = []

    def picture(self, run: PageRun) -> str | None:
        path = run.folder.image()
        return self._early(run.folder.generation_id, path.read_bytes()) if path.exists() else None

    def pictures(self, run: PageRun, lens: Lens) -> str:
        self.late.append((run, lens))
        return f"#{run.folder.generation_id}_{lens}_step_{{step}}_{CELL}"

    def band(self, run: PageRun, lens: Lens, index: int, jpeg: bytes) -> str:
        return self._early(f"{run.folder.generation_id}_{lens}_{index}", jpeg)

    def first(self) -> Iterator[str]:
        """The thumbnails and the finished pictures."""
        for name, jpeg in self.early:
            yield _element(name, jpeg)

    def rest(self) -> Iterator[str]:
        """The decoded pictures, read one at a time."""
        for run, lens in self.late:
            for (block, step), path in run.pictures[lens].items():
                cell = CELL.format(kind=block.kind, block=block.number)
                yield _element(f"{run.folder.generation_id}_{lens}_step_{step}_{cell}", path.read_bytes())

    def _early(self, name: str, jpeg: bytes) -> str:
        self.early.append((name, jpeg))
        return f"#{name}"


Links = Beside | Inside


def _element(name: str, jpeg: bytes) -> str:
    return f'<script type="text/plain" id="{name}">{b64encode(jpeg).decode("ascii")}</script>\n'


# ---- Thumbnails on a few large pictures: a page of 2,850 cells loads five files, not 2,850.
# Steps run across and blocks down, as in the grid. A sheet is cut into bands of whole rows, so that a browser decodes
# only what it shows.


MOST_TILE_PX = 128  # a cell is at most this wide on screen, or half of it where pixels are fine
SHEET_PIXELS = 8_000_000  # of all bands of a sheet together: 32 MB once decoded
BAND_PIXELS = 2_000_000
READERS = 2  # threads: Pillow decodes outside Python's lock
QUALITY = 82
NOTHING = (128, 128, 128)


class TileLayout(NamedTuple):
    """How the thumbnails of a run lie: tile size [px], and how many rows a band has (the last may have fewer)."""

    tile_width_px: int
    tile_height_px: int
    rows_per_band: int


def lay_out_tiles(width_px: int, height_px: int, rows: int, columns: int) -> TileLayout:
    """The largest tiles, in the shape of the pictures, of which this many fit; never larger than the pictures."""
    longest_px = min(max(width_px, height_px), MOST_TILE_PX, isqrt(SHEET_PIXELS // (rows * columns)))
    scale = longest_px / max(width_px, height_px)
    tile_width_px, tile_height_px = max(1, round(width_px * scale)), max(1, round(height_px * scale))
    most_rows = max(1, BAND_PIXELS // (tile_width_px * tile_height_px * columns))
    bands = ceil(rows / most_rows)
    return TileLayout(tile_width_px, tile_height_px, ceil(rows / bands))


def picture_size(run: PageRun) -> tuple[int, int]:
    """Width and height [px] of the run's decoded pictures, by the first of them."""
    pictures = next(iter(run.pictures.values()))
    path = pictures[min(pictures)]
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, UnidentifiedImageError) as error:
        raise _broken(path, error) from error


def draw_bands(run: PageRun, lens: Lens, layout: TileLayout) -> Iterator[bytes]:
    """The bands of one lens from top to bottom, as JPEG. Raises FluxIRError naming a picture that cannot be read."""
    for start in range(0, len(run.blocks), layout.rows_per_band):
        yield _draw_band(run, lens, layout, run.blocks[start : start + layout.rows_per_band])


def _draw_band(run: PageRun, lens: Lens, layout: TileLayout, blocks: Sequence[Block]) -> bytes:
    size = (layout.tile_width_px, layout.tile_height_px)
    places = [
        (path, (column * size[0], row * size[1]))
        for row, block in enumerate(blocks)
        for column, step in enumerate(run.steps)
        if (path := run.pictures[lens].get((block, step))) is not None
    ]
    band = Image.new("RGB", (size[0] * len(run.steps), size[1] * len(blocks)), NOTHING)
    tiles = in_order(lambda place: _thumbnail(place[0], size), places, READERS, torch_threads=None)
    for (_, corner), tile in zip(places, tiles, strict=True):
        band.paste(tile, corner)
    jpeg = io.BytesIO()
    band.save(jpeg, format="JPEG", quality=QUALITY)
    return jpeg.getvalue()


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        with Image.open(path) as picture:
            # JPEG gives halves, quarters and eighths for little; twice the size, so that LANCZOS mixes pixels.
            picture.draft("RGB", (2 * size[0], 2 * size[1]))
            return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> FluxIRError:
    return FluxIRError(
        f"{path} must be a picture: {error}",
        hint=f"flux-ir lens --generation_id {path.parents[3].name} decodes it again",
    )
