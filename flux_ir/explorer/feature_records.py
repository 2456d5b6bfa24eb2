"""Records: what the page of one feature shows besides the numbers of the list, in shards of 64 features.

A record is JSON of at most about 8 kB. Its maps are as fine as fits: of every step on the full grid; of the step of the
largest value; then on grids twice, four and eight times as coarse. `docs/file-formats.md` says what is in it.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.explorer.document import ascii_json
from flux_ir.features.contents import ScorePart
from flux_ir.features.folder import FeatureFolder
from flux_ir.sites import Stream

SHARD = 64
BATCH = 1024
"""Features whose examples are read in one sweep over the scores: 50,000 examples, some 10 MB of activations."""
RECORD_BYTES = 8000

Kind = Literal["top", "quantile", "random", "silent"]


class Fineness(NamedTuple):
    """How fine the maps of a record are."""

    every_step: bool
    pool: int
    """Tokens across and down that one cell of the maps stands for."""


FINENESS = (Fineness(True, 1), *(Fineness(False, pool) for pool in (1, 2, 4, 8)))


@dataclass(frozen=True)
class Group:
    """Examples of one kind of every feature: [d_sae, n]. An image of -1 is none."""

    kind: Kind
    image: NDArray[np.integer[Any]]
    value: NDArray[np.float32]
    """The largest on the image; of those it is silent on, how alike they are."""
    token: NDArray[Any]
    """Position of the largest value in the stream."""
    step: NDArray[Any]
    """Its step, by the sampler's number."""
    low: NDArray[np.float64] | None = None
    """[d_sae]: the least value of a quantile; NaN: no bound."""
    high: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Panels:
    """What the page of a feature shows beside the pictures, [d_sae] or [d_sae, ...]."""

    largest: NDArray[np.floating[Any]]
    """The largest activation: the one scale of all maps of the feature."""
    histogram: NDArray[np.int64]
    step_frequency: NDArray[np.float64]
    step_mean: NDArray[np.float64]
    rows: Mapping[str, Mapping[int, Sequence[Sequence[Any]]]]
    """Lists by their name in the record, then by feature: words, tokens, nearest, together, draws, steering. A name is
    there if its stage has been run."""
    labels: Mapping[int, Mapping[str, Any]]


def shard_records(
    folder: FeatureFolder, stream: Stream, groups: Sequence[Group], panels: Panels, *, limit: int = RECORD_BYTES
) -> Iterator[list[str]]:
    """The records of all features, in lists of 64, each as JSON."""
    for start in range(0, folder.settings.d_sae, BATCH):
        features = range(start, min(start + BATCH, folder.settings.d_sae))
        examples = flattened(groups, features)
        maps: list[list[str]] = [[] for _ in examples.image]  # parts of the records, filled once their size is known
        records = [
            _panels_of(panels, feature)
            | {"pool": 1, "groups": list(_described(groups, feature, examples, place, maps))}
            for place, feature in enumerate(features)
        ]
        room = limit - np.array([len(ascii_json(record)) for record in records], np.int64)
        scale = panels.largest[features.start : features.stop]
        for record, pool in zip(records, fill_maps(maps, folder, stream, examples, scale, room), strict=True):
            record["pool"] = int(pool)
        for first in range(0, len(records), SHARD):
            yield [ascii_json(record) for record in records[first : first + SHARD]]


class RecordExamples(NamedTuple):
    """Examples of several features, [n] each, in the order of the records: by feature, then by group."""

    owner: NDArray[np.int64]
    """Which of the features, counted from 0."""
    group: NDArray[np.int64]
    feature: NDArray[np.int64]
    image: NDArray[np.int64]
    value: NDArray[np.float32]
    token: NDArray[Any]
    step: NDArray[Any]
    has_map: NDArray[np.bool_]


def flattened(groups: Sequence[Group], features: range) -> RecordExamples:
    """The examples of some features, the absent ones left out."""
    rows = slice(features.start, features.stop)
    image = np.concatenate([group.image[rows] for group in groups], axis=1)
    owner, place = np.nonzero(image >= 0)
    group = np.repeat(np.arange(len(groups)), [group.image.shape[1] for group in groups])[place]
    value, token, step = (
        np.concatenate([getattr(group, name)[rows] for group in groups], axis=1)[owner, place]
        for name in ("value", "token", "step")
    )
    has_map = np.array([group.kind != "silent" for group in groups], np.bool_)[group]
    chosen = image[owner, place].astype(np.int64)
    return RecordExamples(owner, group, owner + features.start, chosen, value, token, step, has_map)


def fill_maps(
    maps: Sequence[list[str]],
    folder: FeatureFolder,
    stream: Stream,
    examples: RecordExamples,
    scale: NDArray[np.floating[Any]],
    room: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Put into `maps`, by example, maps as fine as there is room for [bytes, by feature]; gives each feature's pool.

    `scale` [features] is what the strongest value of a map stands for. An example has a map per step of the folder, or
    one of its own step, or none.
    """
    images, which = np.unique(examples.image, return_inverse=True)
    shapes = np.array([folder.grid(int(image), stream) for image in images], np.int64).reshape(-1, 2)[which]
    grids = Grids(shapes[:, 0], shapes[:, 1])
    own_step = np.searchsorted(folder.steps, examples.step)
    mapped = np.flatnonzero(examples.has_map)
    entries = read_entries(folder, stream, examples.feature[mapped], examples.image[mapped])
    entries = entries._replace(example=mapped[entries.example])
    pools, waiting = np.ones(len(room), np.int64), np.ones(len(room), np.bool_)
    # All features try each fineness together, since sums over arrays are quicker than a loop over features; those whose
    # maps fit are done, and only the others are made coarser.
    for number, (every_step, pool) in enumerate(FINENESS):
        here = waiting[examples.owner]
        kept = quantised(entries.of(here, None if every_step else own_step), scale[examples.owner], grids, pool)
        found = {
            int(example): [EMPTY_MAP] * (len(folder.steps) if every_step else 1) for example in mapped[here[mapped]]
        }
        pooled = grids.pooled(pool)
        for example, step, text in encode_maps(kept, pooled.rows * pooled.columns, len(folder.steps)):
            found[example][step if every_step else 0] = text
        sizes = np.zeros(len(room), np.int64)
        texts = np.array([sum(len(text) + 3 for text in texts) for texts in found.values()], np.int64)
        np.add.at(sizes, examples.owner[list(found)], texts)
        fits = waiting & ((sizes <= room) | (number == len(FINENESS) - 1))
        for example, texts_of in found.items():
            if fits[examples.owner[example]]:
                maps[example].extend(texts_of)
        pools[fits] = pool
        waiting &= ~fits
        if not waiting.any():
            break
    return pools


def _panels_of(panels: Panels, feature: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "scale": _rounded(panels.largest[feature]),
        "histogram": panels.histogram[feature].tolist(),
        "profile": {
            "frequency": [_rounded(share) for share in panels.step_frequency[feature]],
            "mean": [_rounded(mean) for mean in panels.step_mean[feature]],
        },
        "label": panels.labels.get(feature),
    }
    for name, by_feature in panels.rows.items():
        rows = by_feature.get(feature, ())
        record[name] = [[_rounded(part) if isinstance(part, float) else part for part in row] for row in rows]
    return record


def _described(
    groups: Sequence[Group],
    feature: int,
    examples: RecordExamples,
    place: int,
    maps: Sequence[list[str]],
) -> Iterator[dict[str, Any]]:
    """The groups of one feature, as the record has them."""
    first, last = np.searchsorted(examples.owner, [place, place + 1])
    for number, group in enumerate(groups):
        chosen = [int(at) for at in np.flatnonzero(examples.group[first:last] == number) + first]
        low, high = (None if bound is None else _rounded(bound[feature]) for bound in (group.low, group.high))
        rows = [
            [
                int(examples.image[at]),
                _rounded(examples.value[at]),
                int(examples.token[at]),
                int(examples.step[at]),
                maps[at],
            ]
            for at in chosen
        ]
        yield {"kind": group.kind, "low": low, "high": high, "examples": rows}


def _rounded(number: float | np.floating[Any]) -> float | None:
    """Four digits, as many as the page shows; None where it is not finite."""
    return float(f"{number:.4g}") if np.isfinite(number) else None


# ---- Maps of examples as the pages hold them: a byte per token, short where a feature is sparse.
# A map is in base64. Its first byte says which of two forms follows, whichever is shorter: 1, a byte for every cell of
# the grid; 0, pairs of a gap and a value, where the gap counts the cells of value 0 that are passed over (a pair with
# the value 0 only makes a gap longer than 255). 255 is the feature's largest activation, and what is above 0 is at
# least 1.


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
