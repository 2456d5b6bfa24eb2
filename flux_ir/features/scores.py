"""One pass over stored activations: what every feature does on every token, image, step and place.

Parts of up to 256 generations are computed one by one, in any order and by any process, and each is complete or absent;
the table is the sum over all parts in their order. So a run may be killed at any moment: the same command resumes it
and ends with the same bytes.

Memory holds two parts (100 MB each at 64 features per token), the autoencoder, and per feature 64 bins, at most 256
places and a few sums: 3 kB, which is 200 MB for 65,536 features. The number of images does not matter.
Next: `table`, which adds the parts up.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flux_ir.errors import FluxIRError
from flux_ir.features.contents import FeatureSettings, FeatureTable
from flux_ir.features.folder import FeatureFolder, write_tensors
from flux_ir.features.scoring import Sample, Scoring, StreamTokens
from flux_ir.features.table import Sums, counts_of, unexplained
from flux_ir.sae.kernels.choose import sparse_decode
from flux_ir.sites import Stream
from flux_ir.threads import in_order

CHUNK_TOKENS = 8192
"""Tokens encoded before they are sorted into rows. Bits may depend on it, so no flag changes it."""
DENSE_ENTRIES, CACHED_ENTRIES, CACHED_TOKENS = 1 << 26, 1 << 21, 2048
"""Limits of a batch. `DENSE_ENTRIES` of a dense [tokens, d_sae] matrix are 256 MB. On a CPU a batch stays near the
size of the cache: `CACHED_TOKENS` tokens, and `CACHED_ENTRIES` of such a matrix, which TopK does not make (for 1,536
features 19 instead of 25 microseconds a token)."""


def missing_parts(folder: FeatureFolder, stream: Stream) -> list[int]:
    """The numbers of the parts that are not there, or were made with other settings."""
    return [number for number in range(folder.parts) if not _is_made(folder, stream, number)]


def _is_made(folder: FeatureFolder, stream: Stream, number: int) -> bool:
    if not folder.part_file(stream, number).is_file():
        return False
    try:
        folder.part(stream, number)
    except FluxIRError:
        return False
    return True


class _Encoded(NamedTuple):
    """The features of some images of one stream in the order they were computed: by step, then by token."""

    number: int
    images: range
    at: NDArray[np.int64]
    """[entries]: index of the image times (steps x tokens), plus `ScorePart.place`."""
    feature: NDArray[np.int64]
    value: NDArray[np.float32]
    error: NDArray[np.float32]
    norm: NDArray[np.float32]
    positions: NDArray[np.int32]
    centred: NDArray[np.float64]


def make_parts(
    scoring: Scoring, folder: FeatureFolder, sample: Sample, stream: Stream, numbers: Sequence[int]
) -> Generator[int, None, None]:
    """Computes these parts and writes them; yields the number of each when its file is there.

    The autoencoder runs in this thread; others sort its entries, and one more writes.
    """
    workers = 1 if scoring.device.type == "cpu" else 4
    pieces = _encode(scoring, folder, sample, stream, numbers)
    with closing(in_order(lambda made: (made.number, _sorted(scoring.settings, made)), pieces, workers,
                          torch_threads=None)) as found:  # fmt: skip
        joined = _joined(folder, found)
        write = in_order(lambda part: _write_part(folder, stream, *part), joined, 1, torch_threads=None)
        with closing(write) as written:
            yield from written


def _encode(
    scoring: Scoring, folder: FeatureFolder, sample: Sample, stream: Stream, numbers: Sequence[int]
) -> Iterator[_Encoded]:
    """The images of these parts, a few at a time, through the autoencoder."""
    settings, tokens = scoring.settings, scoring.settings.tokens[stream]
    means = sample.mean[stream].to(scoring.device)
    most = max(1, CHUNK_TOKENS // (len(settings.steps) * tokens))
    at_once = max(1, min(CHUNK_TOKENS, DENSE_ENTRIES // settings.d_sae))
    if scoring.device.type == "cpu":
        at_once = min(at_once, CACHED_TOKENS)
        if settings.architecture != "topk":
            at_once = max(1, min(at_once, CACHED_ENTRIES // settings.d_sae))
    for number in numbers:
        first = number * folder.part_images
        for images in scoring.runs(range(first, min(first + folder.part_images, settings.images)), most):
            entries = _Entries(len(images), len(settings.steps), tokens, settings.d_in)
            for at, step in enumerate(settings.steps):
                read = scoring.read(images, step, stream)
                entries.begin(at, read)
                rows = read.rows(scoring.device)
                for batch in torch.split(rows, at_once):
                    codes = scoring.sae.encode_sparse(batch)
                    x_hat = sparse_decode(codes.values, codes.indices, scoring.sae.W_dec, scoring.sae.b_dec)
                    centred = batch - means[at]
                    entries.add(
                        codes.values.cpu().numpy(),
                        codes.indices.cpu().numpy(),
                        torch.linalg.vector_norm(x_hat.sub_(batch), dim=1).square_().cpu().numpy(),
                        torch.linalg.vector_norm(centred, dim=1).square_().cpu().numpy(),
                        centred.sum(0).cpu().numpy(),
                    )
            yield entries.taken(number, images)


class _Entries:
    """Collects the entries of some images of one stream, batch by batch."""

    def __init__(self, images: int, steps: int, tokens: int, d_in: int) -> None:
        self.shape = (images, steps, tokens)
        self.error, self.norm = (np.zeros(images * steps * tokens, np.float32) for _ in range(2))
        self.positions = np.full((images, tokens), -1, np.int32)
        self.centred = np.zeros((steps, d_in))
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def begin(self, step: int, read: StreamTokens) -> None:
        """Begin a step, by its index among those that are scored: its tokens are added next, in their order."""
        self.positions[:, : read.positions.shape[1]] = np.where(read.counted, read.positions, -1)
        image, token = np.nonzero(read.counted)
        _, steps, tokens = self.shape
        self._step, self._next_tokens = step, (image * steps + step) * tokens + token

    def add(
        self,
        values: NDArray[np.float32],
        indices: NDArray[np.int64],
        error: NDArray[np.float32],
        norm: NDArray[np.float32],
        centred: NDArray[np.float32],
    ) -> None:
        """Add the next tokens of this step."""
        at, self._next_tokens = self._next_tokens[: len(values)], self._next_tokens[len(values) :]
        self.error[at], self.norm[at] = error, norm
        self.centred[self._step] += centred
        entries = np.flatnonzero(values)
        self._parts.append((at[entries // values.shape[1]], indices.ravel()[entries], values.ravel()[entries]))

    def taken(self, number: int, images: range) -> _Encoded:
        """All that was added. `number` is that of the part."""
        at, feature, value = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        error, norm = self.error.reshape(self.shape), self.norm.reshape(self.shape)
        return _Encoded(number, images, at, feature, value, error, norm, self.positions, self.centred)


class _Rows(NamedTuple):
    """A piece of a part: some images, their rows and entries in order."""

    counts: NDArray[np.int64]
    """[images]: rows of each."""
    lengths: NDArray[np.int64]
    """[rows]: entries of each."""
    tensors: Mapping[str, NDArray[Any]]


def _sorted(settings: FeatureSettings, made: _Encoded) -> _Rows:
    """Entries sorted by image and feature, and S of each row. Within a row they keep their order: by step, then token.

    The key packs image and feature into the high bits of an integer and the entry's own index into the low ones: a
    plain sort of these is several times as fast as an argsort.
    """
    entries, places = len(made.value), len(settings.steps) * made.positions.shape[1]
    bits = max(entries, 1).bit_length()
    order = np.sort(((made.at // places * settings.d_sae + made.feature) << bits) | np.arange(entries))
    key, order = order >> bits, order & ((1 << bits) - 1)
    value, place = made.value[order], made.at[order] % places
    starts = _starts(key)
    lengths = np.diff(starts, append=entries)
    image, feature = np.divmod(key[starts], settings.d_sae)
    tensors = _row_scores(settings, made, value, place, starts, lengths, image)
    tensors |= {
        "feature": feature.astype(np.uint16 if settings.d_sae <= 1 << 16 else np.int32),
        "place": place.astype(np.uint16 if places <= 1 << 16 else np.int32),
        "value": value,
        "error": made.error,
        "norm": made.norm,
        "positions": made.positions,
        "centred": made.centred,
    }
    return _Rows(np.bincount(image, minlength=len(made.images)), lengths, tensors)


def _row_scores(
    settings: FeatureSettings,
    made: _Encoded,
    value: NDArray[np.float32],
    place: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    image: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """S of each row, its mean, and the token and step of the first of its largest values."""
    if not len(starts):
        empty = np.zeros(0, np.float32)
        return {"max": empty, "mean": empty, "at_token": empty.astype(np.int32), "at_step": empty.astype(np.int16)}
    largest = np.maximum.reduceat(value, starts)
    row = np.repeat(np.arange(len(starts)), lengths)
    largest_at = np.flatnonzero(value == largest[row])
    first = largest_at[_starts(row[largest_at])]
    step, token = np.divmod(place[first], made.positions.shape[1])
    counted = (made.positions >= 0).sum(1) * len(settings.steps)
    return {
        "max": largest,
        "mean": (np.add.reduceat(value.astype(np.float64), starts) / counted[image]).astype(np.float32),
        "at_token": made.positions[image, token],
        "at_step": np.array(settings.steps, np.int16)[step],
    }


def _starts(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of equal keys begins."""
    return np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1]) if len(key) else np.zeros(0, np.int64)


def _joined(folder: FeatureFolder, found: Iterable[tuple[int, _Rows]]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Pieces put together to whole parts."""
    waiting: list[_Rows] = []
    images = 0
    for number, piece in found:
        waiting.append(piece)
        images += len(piece.counts)
        if images < min(folder.part_images, folder.settings.images - number * folder.part_images):
            continue
        tensors = {
            name: np.concatenate([part.tensors[name] for part in waiting])
            for name in piece.tensors
            if name != "centred"
        }
        tensors["centred"] = np.sum([part.tensors["centred"] for part in waiting], axis=0)
        for name, counts in (("image_ptr", "counts"), ("row_ptr", "lengths")):
            counted = np.concatenate([getattr(part, counts) for part in waiting])
            tensors[name] = np.concatenate([[0], np.cumsum(counted)]).astype(np.int64)
        waiting, images = [], 0
        yield number, tensors


def _write_part(folder: FeatureFolder, stream: Stream, number: int, tensors: dict[str, NDArray[Any]]) -> int:
    settings, first = folder.settings, number * folder.part_images
    ids = [row.id for row in folder.images[first : first + len(tensors["positions"])]]
    metadata: dict[str, Any] = {"settings": settings.digest, "stream": stream, "steps": list(settings.steps)}
    metadata |= {"first_image": first, "ids": ids}
    write_tensors(folder.part_file(stream, number), tensors, metadata)
    return number


def make_table(folder: FeatureFolder, sample: Sample, decoder_norms: NDArray[np.float64]) -> FeatureFolder:
    """Adds up all parts, writes table.safetensors and marks the stage as done, with counts and FVU."""
    sums, counts, columns = dict[Stream, Sums](), dict[str, Any](), dict[str, NDArray[Any]]()
    for stream in folder.streams:
        sums[stream] = Sums(folder.settings, stream, sample.edges)
        for part in folder.scores(stream):
            sums[stream].add(part, folder.images[part.images.start : part.images.stop])
        table = sums[stream].table(decoder_norms)
        counts[stream] = counts_of(sums[stream], table)
        columns |= {f"{stream}/{field.name}": getattr(table, field.name) for field in fields(FeatureTable)}
    write_tensors(folder.path / "table.safetensors", columns, {"settings": folder.settings.digest})
    fvu = unexplained(sums, sample.mean, folder.steps)
    return folder.mark_done("score", {}, facts={"counts": counts, "fvu": fvu})
