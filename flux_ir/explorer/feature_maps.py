"""The maps of examples as the pages hold them: a byte per token, short where a feature is sparse.

A map is in base64. Its first byte says which of two forms follows, whichever is shorter: 1, a byte for every cell of
the grid; 0, pairs of a gap and a value, where the gap counts the cells of value 0 that are passed over (a pair with the
value 0 only makes a gap longer than 255). 255 is the feature's largest activation, and what is above 0 is at least 1.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.features.contents import ScorePart
from flux_ir.features.folder import FeatureFolder
from flux_ir.sites import Stream

LARGEST = 255
SPARSE, DENSE = b"\x00", b"\x01"


class Entries(NamedTuple):
    """What is above 0 on the maps of n examples. Entries are sorted by example, step and cell, and none is twice."""

    example: NDArray[np.int64]
    step: NDArray[np.int64]
    """The number of the step among the folder's steps."""
    cell: NDArray[np.int64]
    """Row times columns plus column on the image's grid; of text, the position."""
    value: NDArray[np.float32]

    def of(self, examples: NDArray[np.bool_], step: NDArray[np.int64] | None = None) -> "Entries":
        """Those of some examples, and of one step of each if it is given."""
        kept = examples[self.example]
        if step is not None:
            kept &= self.step == step[self.example]
        return self.at(kept)

    def at(self, places: NDArray[Any]) -> "Entries":
        return Entries(self.example[places], self.step[places], self.cell[places], self.value[places])


def read_entries(
    folder: FeatureFolder, stream: Stream, feature: NDArray[np.int64], image: NDArray[np.int64]
) -> Entries:
    """The activations of features on images, [examples] each, read part by part in the order of the images."""
    found: list[list[NDArray[Any]]] = [[], [], [], []]
    by_image = np.argsort(image, kind="stable")
    images = image[by_image]
    starts = np.flatnonzero(np.r_[True, images[1:] != images[:-1]]) if len(images) else np.array([], np.int64)
    for first, last in zip(starts, np.r_[starts[1:], len(images)] if len(images) else starts, strict=True):
        number, examples = int(images[first]), by_image[first:last]
        part = folder.part_of(number, stream)
        entries, lengths = _entries_on(part, number, feature[examples])
        place = part.place[entries].astype(np.int64)
        positions = part.positions[number - part.images.start]
        found[0].append(np.repeat(examples, lengths))
        found[1].append(place // part.tokens)
        found[2].append(positions[place % part.tokens].astype(np.int64))
        found[3].append(np.asarray(part.value[entries]))
    example, step, cell, value = (np.concatenate(pieces) if pieces else np.array([], np.int64) for pieces in found)
    order = np.lexsort((cell, step, example))
    return Entries(example[order], step[order], cell[order], value[order].astype(np.float32))


def _entries_on(
    part: ScorePart, image: int, features: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The entries of several features on an image, one after the other, and how many each has."""
    rows = part.rows(image)
    there = np.asarray(part.feature[rows], np.int64)
    at = np.minimum(np.searchsorted(there, features), len(there) - 1)
    if not len(there):
        return np.array([], np.int64), np.zeros(len(features), np.int64)
    start = part.row_ptr[rows.start + at]
    lengths = np.where(there[at] == features, part.row_ptr[rows.start + at + 1] - start, 0)
    return _ranges(start, lengths), lengths


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... for each, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


class Grids(NamedTuple):
    """Rows and columns of the maps of examples, [n] each."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    def pooled(self, pool: int) -> "Grids":
        return Grids(-(-self.rows // pool), -(-self.columns // pool))


def quantised(entries: Entries, scale: NDArray[np.floating[Any]], grids: Grids, pool: int) -> Entries:
    """Entries whose values are bytes, of grids `pool` times as coarse: of several tokens the largest.

    `scale` [examples] is what 255 stands for.
    """
    level = np.rint(LARGEST * entries.value.astype(np.float64) / scale[entries.example])
    value = np.clip(level, 1, LARGEST).astype(np.float32)
    if pool == 1:
        return entries._replace(value=value)
    columns = grids.columns[entries.example]
    row, column = entries.cell // columns // pool, entries.cell % columns // pool
    cell = row * grids.pooled(pool).columns[entries.example] + column
    order = np.lexsort((cell, entries.step, entries.example))
    moved = Entries(entries.example[order], entries.step[order], cell[order], value[order])
    changed = [array[1:] != array[:-1] for array in moved[:3]]
    starts = np.flatnonzero(np.r_[True, changed[0] | changed[1] | changed[2]]) if len(order) else order
    largest = np.maximum.reduceat(moved.value, starts) if len(order) else moved.value
    return moved.at(starts)._replace(value=largest)


def encode_maps(entries: Entries, cells: NDArray[np.int64], steps: int) -> Iterator[tuple[int, int, str]]:
    """(example, step, text) of every map that has an entry, in order. `cells` [examples]; values are bytes."""
    if not len(entries.cell):
        return
    key = entries.example * steps + entries.step
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    stops = np.r_[starts[1:], len(key)]
    before = np.r_[-1, entries.cell[:-1]]
    before[starts] = -1
    gaps = entries.cell - before - 1
    value = entries.value.astype(np.uint8)
    pairs = np.stack([gaps.clip(0, LARGEST).astype(np.uint8), value], axis=1)
    has_long_gap = np.maximum.reduceat(gaps, starts) > LARGEST
    for start, stop, is_long in zip(starts.tolist(), stops.tolist(), has_long_gap.tolist(), strict=True):
        example = int(entries.example[start])
        if 2 * (stop - start) >= cells[example]:
            grid = np.zeros(cells[example], np.uint8)
            grid[entries.cell[start:stop]] = value[start:stop]
            content = DENSE + grid.tobytes()
        elif is_long:
            content = SPARSE + _long_pairs(gaps[start:stop].tolist(), value[start:stop].tolist())
        else:
            content = SPARSE + pairs[start:stop].tobytes()
        yield example, int(entries.step[start]), b64encode(content).decode("ascii")


def _long_pairs(gaps: Sequence[int], values: Sequence[int]) -> bytes:
    found = bytearray()
    for gap, value in zip(gaps, values, strict=True):
        while gap > LARGEST:  # a pair passes over its gap and then one cell more, the one its value is of
            found += bytes((LARGEST, 0))
            gap -= LARGEST + 1
        found += bytes((gap, value))
    return bytes(found)


EMPTY_MAP = b64encode(SPARSE).decode("ascii")
"""A map without any activation: of a step at which the feature is silent."""
