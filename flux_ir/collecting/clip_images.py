"""CLIP's activations of a folder of pictures, as arrays that training reads: [images, tokens, d] in shards.

A shard is a fixed slice of the sorted names and is written whole, so the same command goes on where it was stopped and
memory does not grow with the number of pictures.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.activations.tokens import CLIP_CAPTIONS, CLIP_IMAGES, CLIP_SETTINGS_FILE
from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file, write_json
from flux_ir.models.clip import ClipVision, Preprocessing, TokenChoice, broken_image, choose_tokens, read_pixels
from flux_ir.models.headers import read_header
from flux_ir.models.text import TextEncoder

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHARD_BYTES = 128 * 2**20  # a shard is in memory while it is filled
INDEX_FILE = "index.jsonl"
TENSOR = "activations"
READERS = 4  # threads that decode pictures while the network computes


@dataclass(frozen=True)
class ClipCollection:
    """What is collected, and where it goes. `names` are paths below `images`, sorted, with slashes."""

    images: Path
    names: Sequence[str]
    captions: Sequence[str] | None
    clip: str
    """The checkpoint, as the user named it."""
    tokens: TokenChoice
    dtype: torch.dtype
    batch_size: int
    output_dir: Path
    shard_bytes: int = SHARD_BYTES

    def shards(self, bytes_per_image: int) -> list[Sequence[int]]:
        """The numbers of the pictures of every shard: whole batches, at most `shard_bytes` where one batch is less."""
        batches = max(1, self.shard_bytes // (bytes_per_image * self.batch_size))
        size = batches * self.batch_size
        return [range(first, min(first + size, len(self.names))) for first in range(0, len(self.names), size)]

    def file(self, kind: str, shard: int) -> Path:
        """Where a shard goes."""
        return self.output_dir / kind / f"{shard:06d}.safetensors"

    def settings(self) -> dict[str, Any]:
        """Everything that the bytes of the arrays depend on, as JSON values."""
        return {
            "clip": self.clip,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "images": len(self.names),
            "images_sha256": _digest(self.names),
            "captions_sha256": None if self.captions is None else _digest(self.captions),
            "shard_bytes": self.shard_bytes,
        }


class Networks(NamedTuple):
    """What computes: the picture half and its pixels, and the text half where there are captions."""

    vision: ClipVision
    preprocessing: Preprocessing
    text: TextEncoder | None


class Collected(NamedTuple):
    """How far it is: pictures done so far, those of them that earlier runs had done, and captions that were cut."""

    images: int
    earlier: int
    cut_captions: int


def image_names(folder: Path) -> list[str]:
    """Every picture below the folder, as sorted paths with slashes. Raises FluxIRError if there is none."""
    if not folder.is_dir():
        raise FluxIRError(f"--images must be a folder: got {folder}", hint="check the path")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if not names:
        raise FluxIRError(
            f"{folder} must hold pictures: there is no file that ends in {', '.join(IMAGE_SUFFIXES)}",
            hint="name the folder of pictures with --images",
        )
    return names


def check_images(folder: Path, names: Sequence[str]) -> None:
    """Opens the header of every picture. Raises FluxIRError that names the broken ones: none is left out silently."""
    broken: list[tuple[str, Exception]] = []
    for name in names:
        try:
            with Image.open(folder / name):
                pass
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append((name, error))
    if len(broken) == 1:
        raise broken_image(folder / broken[0][0], broken[0][1])
    if broken:
        told = ", ".join(name for name, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise FluxIRError(
            f"{len(broken)} of {len(names)} files in {folder} are no pictures that can be read: {told}",
            hint="mend them or take them out of the folder",
        )


def collect_images(collection: ClipCollection, networks: Networks) -> Iterator[Collected]:
    """Write every shard that is not there yet, then the index. Yields after every batch, and for shards found done.

    Raises FluxIRError for a picture that cannot be read (shards that are finished stay), and for a folder that holds a
    collection with other settings.
    """
    _same_settings(collection)
    choice, vision = collection.tokens, networks.vision
    tokens = vision.tokens(choice)
    images, earlier, cut = 0, 0, 0
    shards = collection.shards(tokens * vision.d * collection.dtype.itemsize)
    for number, members in enumerate(shards):
        if _is_done(collection, networks, number, len(members)):
            images, earlier = images + len(members), earlier + len(members)
            yield Collected(images, earlier, cut)
            continue
        arrays = {CLIP_IMAGES: torch.empty(len(members), tokens, vision.d, dtype=collection.dtype)}
        if networks.text is not None:
            arrays[CLIP_CAPTIONS] = torch.empty(len(members), 1, _text_width(networks.text), dtype=collection.dtype)
        row = 0
        for batch, pixels in _batches(collection, networks.preprocessing, members):
            rows = slice(row, row + len(batch))
            cut += _fill(collection, networks, arrays, rows, batch, pixels)
            row, images = rows.stop, images + len(batch)
            if row < len(members):
                yield Collected(images, earlier, cut)
        _write(collection, number, arrays)
        yield Collected(images, earlier, cut)
    _write_index(collection, shards)


@torch.no_grad()
def _fill(
    collection: ClipCollection,
    networks: Networks,
    arrays: dict[str, Tensor],
    rows: slice,
    batch: Sequence[int],
    pixels: Tensor,
) -> int:
    """Compute one batch into its rows. Returns how many captions were cut."""
    arrays[CLIP_IMAGES][rows] = choose_tokens(networks.vision(pixels), collection.tokens).to("cpu", collection.dtype)
    if networks.text is None or collection.captions is None:
        return 0
    captions = [collection.captions[image] for image in batch]
    arrays[CLIP_CAPTIONS][rows] = networks.text(captions)[:, None].to("cpu", collection.dtype)
    lengths = networks.text.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
    return sum(len(ids) > networks.text.max_tokens for ids in lengths)


def _batches(
    collection: ClipCollection, preprocessing: Preprocessing, members: Sequence[int]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The pictures of a shard, batch by batch: the next one is decoded by threads while this one is computed."""
    read = partial(read_pixels, preprocessing=preprocessing)
    with ThreadPoolExecutor(READERS, "pictures") as pool:
        waiting: tuple[Sequence[int], list[Future[Tensor]]] | None = None
        try:
            for first in range(0, len(members), collection.batch_size):
                batch = members[first : first + collection.batch_size]
                submitted = [pool.submit(read, collection.images / collection.names[image]) for image in batch]
                if waiting is not None:
                    yield waiting[0], torch.stack([future.result() for future in waiting[1]])
                waiting = batch, submitted
            if waiting is not None:
                yield waiting[0], torch.stack([future.result() for future in waiting[1]])
        finally:
            pool.shutdown(cancel_futures=True)


def _write(collection: ClipCollection, shard: int, arrays: dict[str, Tensor]) -> None:
    for kind in sorted(arrays):  # captions first: a shard of pictures that exists has its captions
        with complete_file(collection.file(kind, shard)) as beside:
            # One entry at most: safetensors writes several in an order that changes from file to file.
            save_file({TENSOR: arrays[kind]}, beside, metadata={"clip": collection.clip})


def _is_done(collection: ClipCollection, networks: Networks, shard: int, images: int) -> bool:
    """Whether the shard's files are there and whole. A broken one is moved aside, and all of the shard made again."""
    kinds = [CLIP_IMAGES, *([CLIP_CAPTIONS] if networks.text is not None else [])]
    done = True
    for path in [collection.file(kind, shard) for kind in kinds]:
        if not path.exists():
            done = False
            continue
        try:
            whole = read_header(path)[TENSOR].shape[0] == images
        except (FluxIRError, KeyError):
            whole = False
        if not whole:
            path.replace(path.with_name(f"{path.name}.broken"))
            done = False
    return done


def _same_settings(collection: ClipCollection) -> None:
    path, settings = collection.output_dir / CLIP_SETTINGS_FILE, collection.settings()
    if not path.exists():
        write_json(path, settings)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        shown = "; ".join(f"{name} is {found.get(name)} there and {settings[name]} here" for name in differing)
        raise FluxIRError(
            f"{collection.output_dir} holds a collection with other settings: {shown}",
            hint="use the same settings and the same pictures, or another --output_dir",
        )


def _write_index(collection: ClipCollection, shards: Sequence[Sequence[int]]) -> None:
    with complete_file(collection.output_dir / INDEX_FILE) as beside, beside.open("w", encoding="utf-8") as file:
        for shard, members in enumerate(shards):
            for row, image in enumerate(members):
                line = {
                    "image": collection.names[image],
                    "shard": collection.file(CLIP_IMAGES, shard).relative_to(collection.output_dir).as_posix(),
                    "row": row,
                }
                if collection.captions is not None:
                    line["caption"] = collection.captions[image]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _text_width(text: TextEncoder) -> int:
    return int(text.model.config.hidden_size)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
