"""CLIP's activations of pictures and of their captions: a collection, in shards as those of FLUX.

A shard is a fixed run of the source's pictures, with the keys `clip.image` [images, tokens, d] and, where there are
captions, `clip.text` [images, 1, d]. It is filled in memory and written whole, so the same command goes on where it was
stopped, and memory does not grow with the number of pictures.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.shard_source import CLIP_IMAGE, CLIP_TEXT
from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter, read_shard
from flux_ir.collecting.collection import (
    COLLECTION,
    INDEX,
    VERSION,
    as_lines,
    check_same,
    publish_json,
    publish_statistics,
    stored_description,
    versions_of,
)
from flux_ir.collecting.image_sources import ImageSource, Picture
from flux_ir.collecting.shard_notes import (
    ShardNotes,
    Statistics,
    facts_of_path,
    file_is_intact,
    merge_statistics,
    notes_content,
    notes_name,
    read_notes,
    shard_name,
)
from flux_ir.collecting.storage import Storage, one_job_at
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.files import disk_error
from flux_ir.models.clip import ClipVision, Preprocessing, TokenChoice, choose_tokens, read_pixels, tokens_of
from flux_ir.models.text import TextEncoder
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.threads import in_order

MOST_SHARD_BYTES = 64 * 10**6
"""Fewer than of FLUX's shards: these are in memory while they are filled."""
MOST_SHARD_IMAGES = 4096
"""More than of FLUX's shards, for a class token is small. This is the most work that an interruption costs."""
OLD_SETTINGS = "clip.json"
READERS = 4  # threads that decode pictures while the network computes


class Networks(NamedTuple):
    """CLIP: the picture half and how pixels are prepared for it, and the text half where there are captions."""

    vision: ClipVision
    preprocessing: Preprocessing
    text: TextEncoder | None


class ClipProgress(NamedTuple):
    """How far it is: pictures done so far, those of them that earlier runs had done, and captions that were cut."""

    images: int
    earlier: int
    cut_captions: int


@dataclass(frozen=True)
class ClipSettings:
    """What is collected of every picture."""

    clip: str
    """The checkpoint, as the user named it."""
    weights: str
    """A digest of its files."""
    tokens: TokenChoice
    dtype: torch.dtype
    """The dtype that the network computes in."""
    store_dtype: torch.dtype
    batch_size: int


class ClipCollection:
    """The folder of a collection of CLIP's activations, and what belongs into it."""

    def __init__(self, storage: Storage, settings: ClipSettings, source: ImageSource, networks: Networks) -> None:
        self.storage, self.settings, self.source, self.networks = storage, settings, source, networks
        vision = networks.vision
        self._shapes = {CLIP_IMAGE: (tokens_of(vision.params, settings.tokens), vision.params.hidden_size)}
        if networks.text is not None:
            self._shapes[CLIP_TEXT] = (1, networks.text.d)
        size = sum(tokens * d for tokens, d in self._shapes.values()) * settings.store_dtype.itemsize
        self.shard_images = max(1, min(MOST_SHARD_IMAGES, MOST_SHARD_BYTES // size))

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.source) // self.shard_images)

    def images_of(self, shard: int) -> range:
        """The numbers of a shard's pictures."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, len(self.source)))

    def described(self) -> dict[str, Any]:
        """The settings as `collection.json` keeps them: everything that the bits of the files depend on."""
        settings = self.settings
        return {
            "clip": settings.clip,
            "weights": settings.weights,
            "tokens": settings.tokens,
            "dtype": str(settings.dtype).removeprefix("torch."),
            "store_dtype": str(settings.store_dtype).removeprefix("torch."),
            "batch_size": settings.batch_size,
            **self.source.described(),
        }

    def collect(self) -> Iterator[ClipProgress]:
        """Writes every shard that is not there yet, then index and statistics. Yields after batches and found shards.

        Raises FluxIRError for a picture that cannot be read (shards that are finished stay), for values that are not
        finite, and for a folder that holds a collection with other settings.
        """
        with one_job_at(self.storage, Ranks()):
            self._describe()
            self.storage.clear_scratch(everyones=True)
            images = earlier = cut = 0
            pictures: Iterator[Picture] = iter(())
            position = -1
            for number in range(self.shards):
                members = self.images_of(number)
                if self._is_intact(number):
                    images, earlier = images + len(members), earlier + len(members)
                    yield ClipProgress(images, earlier, cut)
                    continue
                self.storage.remove(INDEX)
                if position != members.start:  # the source is read once, in order, unless shards are there
                    pictures = self.source.pictures(members.start)
                position = members.stop
                for done, cut_now in self._make(number, list(members), pictures):
                    images, cut = images + done, cut + cut_now
                    yield ClipProgress(images, earlier, cut)
            self._merge()
            self.storage.clear_scratch(everyones=True)

    def _describe(self) -> None:
        described = self.described()
        stored = stored_description(self.storage)
        if stored is not None:
            check_same(self.storage, stored, described)
            return
        if self.storage.exists(OLD_SETTINGS):
            raise FluxIRError(
                f"{self.storage.where} holds arrays of CLIP as they were before shards ({OLD_SETTINGS}), which can be "
                "trained on but not gone on with",
                hint="collect into another --output_dir",
            )
        value = {
            "version": VERSION,
            "kind": "clip",
            "settings": described,
            "generations": len(self.source),
            "images_per_shard": self.shard_images,
            "shards": self.shards,
            "versions": versions_of(next(self.networks.vision.parameters()).device),
        }
        publish_json(self.storage, value, COLLECTION)

    def _is_intact(self, number: int) -> bool:
        notes = read_notes(self.storage, number)
        return notes is not None and file_is_intact(self.storage, shard_name(number), notes.file, checksums=True)

    def _make(self, number: int, members: Sequence[int], pictures: Iterator[Picture]) -> Iterator[tuple[int, int]]:
        """Computes and publishes a shard; yields, batch by batch, how many pictures it had and captions were cut.

        Of the last batch when the shard is there, so that what is reported as done is never lost.
        """
        arrays = {
            key: torch.empty(len(members), tokens, d, dtype=self.settings.store_dtype)
            for key, (tokens, d) in self._shapes.items()
        }
        statistics: Statistics = {key: SiteStatistics(d) for key, (_, d) in self._shapes.items()}
        ids: list[str] = []
        captions: list[str] = []
        done: tuple[int, int] | None = None
        for batch, pixels in _batches(islice(pictures, len(members)), self.settings.batch_size, self.networks):
            if done is not None:
                yield done
            rows = slice(len(ids), len(ids) + len(batch))
            cut = self._fill(arrays, rows, batch, pixels)
            for key, array in arrays.items():
                _check_finite(key, array[rows], batch)
                statistics[key].add(array[rows])
            ids += [picture.id for picture in batch]
            captions += [picture.caption or "" for picture in batch]
            done = len(batch), cut
        self._publish(number, arrays, ids, captions, statistics)
        if done is not None:
            yield done

    @torch.no_grad()
    def _fill(self, arrays: dict[str, Tensor], rows: slice, batch: Sequence[Picture], pixels: Tensor) -> int:
        """Computes one batch into its rows. Returns how many captions were cut."""
        networks, settings = self.networks, self.settings
        values = choose_tokens(networks.vision(pixels), settings.tokens)
        arrays[CLIP_IMAGE][rows] = values.to("cpu", settings.store_dtype)
        if networks.text is None:
            return 0
        captions = [picture.caption or "" for picture in batch]
        arrays[CLIP_TEXT][rows] = networks.text(captions)[:, None].to("cpu", settings.store_dtype)
        return sum(len(ids) > networks.text.max_tokens for ids in networks.text.tokenizer.numbers(captions))

    def _publish(
        self, number: int, arrays: dict[str, Tensor], ids: list[str], captions: list[str], statistics: Statistics
    ) -> None:
        tensors = {key: ShardTensor(array.dtype, tuple(array.shape)) for key, array in arrays.items()}
        layout = ShardLayout(tensors, {"ids": ids, "prompts": captions}, {"model": self.settings.clip})
        path = self.storage.scratch(".safetensors")
        try:
            with ShardWriter(path, layout) as writer:
                for key, array in arrays.items():
                    writer.write(key, 0, array)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(path, error) from error
        notes = ShardNotes(facts_of_path(path), [], {}, statistics)
        self.storage.publish(notes_content(notes), notes_name(number))
        self.storage.publish(path, shard_name(number))

    def _merge(self) -> None:
        statistics: Statistics = {}
        index = self.storage.scratch(".jsonl")
        with index.open("wb") as lines:
            for number in range(self.shards):
                notes = read_notes(self.storage, number)
                assert notes is not None  # it was just looked at, or written
                merge_statistics(statistics, notes.statistics)
                said = read_shard(self.storage.local(shard_name(number))).metadata
                lines.write(as_lines(_rows(number, said["ids"], said["prompts"] if self.networks.text else None)))
        publish_statistics(self.storage, statistics)
        self.storage.publish(index, INDEX)


def _rows(number: int, ids: Sequence[str], captions: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for row, image in enumerate(ids):
        caption = {} if captions is None else {"prompt": captions[row]}
        yield {"id": image, **caption, "shard": shard_name(number), "row": row}


def _batches(
    pictures: Iterator[Picture], batch_size: int, networks: Networks
) -> Iterator[tuple[list[Picture], Tensor]]:
    """The pictures, batch by batch: the next one is decoded by threads while this one is computed."""
    work = partial(_read, networks.preprocessing)
    with closing(in_order(work, pictures, READERS, most=2 * batch_size, torch_threads=None)) as read:
        while batch := list(islice(read, batch_size)):
            yield [picture for picture, _ in batch], torch.stack([pixels for _, pixels in batch])


def _read(preprocessing: Preprocessing, picture: Picture) -> tuple[Picture, Tensor]:
    return picture, read_pixels(picture.content, preprocessing, where=picture.where)


def _check_finite(key: str, values: Tensor, batch: Sequence[Picture]) -> None:
    if not values.isfinite().all():
        bad = next(picture for picture, own in zip(batch, values, strict=True) if not own.isfinite().all())
        raise FluxIRError(
            f"values that are kept must be finite: {key} holds NaN or infinity, first for {bad.where}",
            hint="look for weights that are not finite, or keep more digits: --store_dtype float32",
        )
