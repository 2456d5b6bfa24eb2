"""Records: what the page of one feature shows besides the numbers of the list, in shards of 64 features.

A record is JSON of at most about 8 kB. Its maps are as fine as fits: of every step on the full grid; of the step of the
largest value; then on grids twice, four and eight times as coarse. `docs/file-formats.md` says what is in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.explorer.feature_maps import EMPTY_MAP, Grids, encode_maps, quantised, read_entries
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
    """The records of 64 features after the other, each as JSON."""
    for start in range(0, folder.settings.d_sae, BATCH):
        features = range(start, min(start + BATCH, folder.settings.d_sae))
        examples = flattened(groups, features)
        maps: list[list[str]] = [[] for _ in examples.image]  # parts of the records, filled once their size is known
        records = [
            _panels_of(panels, feature)
            | {"pool": 1, "groups": list(_described(groups, feature, examples, place, maps))}
            for place, feature in enumerate(features)
        ]
        room = limit - np.array([len(_json(record)) for record in records], np.int64)
        scale = panels.largest[features.start : features.stop]
        for record, pool in zip(records, fill_maps(maps, folder, stream, examples, scale, room), strict=True):
            record["pool"] = int(pool)
        for first in range(0, len(records), SHARD):
            yield [_json(record) for record in records[first : first + SHARD]]


class Examples(NamedTuple):
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


def flattened(groups: Sequence[Group], features: range) -> Examples:
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
    return Examples(owner, group, owner + features.start, chosen, value, token, step, has_map)


def fill_maps(
    maps: Sequence[list[str]],
    folder: FeatureFolder,
    stream: Stream,
    examples: Examples,
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
    examples: Examples,
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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
