"""What the pages hold of each picture that some feature shows: its small picture, its facts, and its patches' features.

All three are by the number of the picture, and shared by all features: a picture is rendered once.
"""

import io
import os
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flux_ir.errors import FluxIRError
from flux_ir.features.contents import ScorePart
from flux_ir.features.folder import FeatureFolder
from flux_ir.files import complete_file
from flux_ir.threads import in_order

SHARD = 1024
"""Pictures of a file of facts."""
FOLDER = 1000
"""Pictures of a folder of small pictures, and of patches."""
QUALITY = 80
READERS = 2  # threads: Pillow decodes outside Python's lock

WIDE = 65536
"""Features that have a number of two bytes."""
LARGEST = 65535


def numbered(folder: Path, image: int, suffix: str) -> Path:
    """Where the file of a picture is, in a folder of at most 1,000."""
    return folder / f"{image // FOLDER:03d}" / f"{image:06d}{suffix}"


# Small pictures


def draw_thumbnails(folder: FeatureFolder, target: Path, images: Sequence[int], side_px: int) -> Iterator[int]:
    """Draw the small pictures that are not there yet, the longer side at most so long; gives each picture's number.

    Pictures are never enlarged. Raises FluxIRError naming a picture that cannot be read.
    """
    missing = [image for image in images if not numbered(target, image, ".webp").exists()]
    yield from (image for image in images if image not in set(missing))
    paths = ((image, _picture(folder, image)) for image in missing)
    drawn = in_order(lambda item: (item[0], _thumbnail(item[1], side_px)), paths, READERS, torch_threads=None)
    with closing(drawn):
        for image, small in drawn:
            with complete_file(numbered(target, image, ".webp")) as beside:
                beside.write_bytes(small)
            yield image


def _picture(folder: FeatureFolder, image: int) -> Path:
    path = folder.picture(image)
    if path is None:
        raise FluxIRError(
            f"the picture of generation {folder.images[image].id} is missing: {folder.images[image].picture}",
            hint="bring the captures' pictures back, or write pages without any: --pictures False",
        )
    return path


def _thumbnail(path: Path, side_px: int) -> bytes:
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * side_px, 2 * side_px))  # JPEG gives halves, quarters and eighths for little
            small = picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise FluxIRError(f"{path} must be a picture: {error}", hint="collect that generation again") from error
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    webp = io.BytesIO()
    small.save(webp, format="WEBP", quality=QUALITY, method=4)
    return webp.getvalue()


# Facts


def image_shards(
    folder: FeatureFolder, shown: NDArray[np.bool_], tokens: Sequence[Sequence[str] | None]
) -> Iterator[list[list[Any] | None]]:
    """The facts of all pictures, in lists of 1,024; None for those that no feature shows.

    `tokens` are the strings of each prompt's text tokens, None where they are not known.
    """
    images = folder.images
    for start in range(0, len(images), SHARD):
        rows: list[list[Any] | None] = []
        for row in images[start : start + SHARD]:
            if not shown[row.index]:
                rows.append(None)
                continue
            grid = row.grid or (None, None)
            picture = None if row.picture is None else quote(row.picture)
            seed = None if row.seed is None else str(row.seed)  # JavaScript's numbers have 53 bits
            facts = [row.id, row.prompt, seed, row.width, row.height, *grid, picture]
            rows.append([*facts, tokens[row.index]] if tokens else facts)
        yield rows


def originals(folder: FeatureFolder, pages: Path) -> str | None:
    """The address of the captures' folder as the pages see it; None where it is no folder of this machine."""
    if "://" in folder.captures or not Path(folder.captures).is_dir():
        return None
    return quote(Path(os.path.relpath(folder.captures, pages)).as_posix()) + "/"


# Patches


def patches_of(folder: FeatureFolder, image: int, top: int) -> dict[str, Any]:
    """By stream: the `top` strongest features of every token of a picture at every step, and what they leave out.

    Features and values (65,535 is `scale`) are [steps, tokens, top], the strongest first, 0 where there is none; the
    unexplained share ||x - x_hat||^2 / ||x - mean||^2 is [steps, tokens], NaN where there is no token. All in base64,
    little endian. Tokens are those of the image's grid, or of the text.
    """
    found: dict[str, Any] = {}
    for stream in folder.streams:
        part, (rows, columns) = folder.part_of(image, stream), folder.grid(image, stream)
        found[stream] = _patches(part, image, rows * columns, top, folder.settings.d_sae)
    return found


def _patches(part: ScorePart, image: int, cells: int, top: int, d_sae: int) -> dict[str, Any]:
    at, steps = image - part.images.start, len(part.steps)
    positions = part.positions[at]
    place, feature, value = _entries(part, image)
    order = np.lexsort((feature, -value, place))
    place, feature, value = place[order], feature[order], value[order]
    rank = np.arange(len(place)) - np.searchsorted(place, place)
    kept = rank < top
    place, feature, value, rank = place[kept], feature[kept], value[kept], rank[kept]
    step, token = place // part.tokens, positions[place % part.tokens]
    scale = float(value.max()) if len(value) else 1.0
    features = np.zeros((steps, cells, top), "<u2" if d_sae <= WIDE else "<u4")
    values = np.zeros((steps, cells, top), "<u2")
    features[step, token, rank] = feature
    values[step, token, rank] = np.clip(np.rint(LARGEST * value.astype(np.float64) / scale), 1, LARGEST)
    unexplained = np.full((steps, cells), np.nan, "<f4")
    there = positions >= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        share = part.error[at] / part.norm[at]
    unexplained[:, positions[there]] = share[:, there]
    return {
        "top": top,
        "tokens": cells,
        "scale": float(f"{scale:.6g}"),
        "feature": b64encode(features.tobytes()).decode("ascii"),
        "value": b64encode(values.tobytes()).decode("ascii"),
        "unexplained": b64encode(unexplained.tobytes()).decode("ascii"),
    }


def _entries(part: ScorePart, image: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """All activations on an image: its place among steps and tokens, the feature, the value."""
    rows = part.rows(image)
    entries = slice(int(part.row_ptr[rows.start]), int(part.row_ptr[rows.stop]))
    lengths = np.diff(part.row_ptr[rows.start : rows.stop + 1])
    feature = np.repeat(np.asarray(part.feature[rows], np.int64), lengths)
    return np.asarray(part.place[entries], np.int64), feature, np.asarray(part.value[entries])
