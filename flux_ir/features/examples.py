"""Pictures that say what a feature means: the strongest, weaker ones, random ones, and look-alikes it is silent on.

Everything comes from S, which is read twice, a part at a time. Memory holds the examples found so far, a sketch of 256
numbers for each image, and a part. No two images of a row have one prompt, and every draw follows from the seed, the
feature and the prompt, so that nothing depends on parts or processes.

    top        the N images with the largest S
    quantile   the images it fires on, by S in Q equal shares, the strongest first: M of each share at random
    random     R of the images it fires on, at random
    silent     L of the images it never fires on that are most like its strongest ones, by what else fires on them
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from flux_ir.errors import FluxIRError
from flux_ir.features.contents import FeatureTable, ScorePart
from flux_ir.features.folder import FeatureFolder
from flux_ir.sites import Stream

SKETCH = 256
"""Numbers of an image's sketch: a random projection of what fires on it, which nearly keeps cosines."""
ALIKE = 8
"""Look-alikes of a feature are like the mean of this many of its strongest images, at most."""
AT_ONCE, ENTRIES_AT_ONCE = 4096, 1 << 21
"""Features, and pairs of an image and a feature, that are compared at a time."""
BINS_PER_OCTAVE, OCTAVES = 16, 16
"""The histogram of S that the shares are cut by begins at the lowest edge of the table's histograms."""

FILE = "examples.safetensors"

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How many there are of each kind, and the seed of the draws."""

    top: int = 24
    quantiles: int = 5
    per_quantile: int = 8
    random: int = 8
    silent: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name == "seed" else 1):
                raise FluxIRError(f"--{name} must be at least {int(name != 'seed')}: got {value}", hint="raise it")


class ScoreRows(NamedTuple):
    """Some rows of S as columns, [rows] each: a feature, an image it fires on, and the largest activation there."""

    feature: Ints
    image: Ints
    prompt: Ints
    value: NDArray[np.float32]
    token: NDArray[np.int32]
    step: NDArray[np.int16]


class Pass(NamedTuple):
    """What a pass over S fills: attributes of `Search`."""

    lists: Sequence[str]
    """Each a `Best`."""
    sums: Sequence[str]
    """Arrays that are 0 where a process has read nothing."""


FIRST_PASS = Pass(lists=("top", "random"), sums=("histogram", "sketches"))
SECOND_PASS = Pass(lists=("quantile", "silent"), sums=("in_quantile",))


class Best:
    """For each slot the few images that come first: by priority, then by number, one of each prompt.

    Taking the best of bests gives the best of all, so lists may be merged in any order.
    """

    COLUMNS = ("priority", "image", "prompt", "value", "token", "step")

    def __init__(self, slots: int, most: int) -> None:
        self.most = most
        self.priority = np.full((slots, most), np.inf)
        self.image, self.prompt = (np.full((slots, most), -1, np.int64) for _ in range(2))
        self.value = np.zeros((slots, most), np.float32)
        self.token = np.full((slots, most), -1, np.int32)
        self.step = np.full((slots, most), -1, np.int16)

    def add(self, slot: Ints, priority: Floats, found: ScoreRows) -> None:
        """Add rows, each to its slot; the smallest priority comes first."""
        last, worst = self.priority[:, -1][slot], self.image[:, -1][slot]
        near = np.flatnonzero((priority < last) | ((priority == last) & (found.image < worst)))
        if not len(near):
            return
        slots, local = np.unique(slot[near], return_inverse=True)
        columns: dict[str, NDArray[Any]] = {"priority": priority[near]}
        columns |= {name: getattr(found, name)[near] for name in self.COLUMNS[1:]}
        is_taken = self.image[slots] >= 0
        row = np.concatenate([np.nonzero(is_taken)[0], local])
        columns = {name: np.concatenate([getattr(self, name)[slots][is_taken], new]) for name, new in columns.items()}
        kept = _first_of_each(row, columns["prompt"], columns["priority"], columns["image"])
        order = kept[np.lexsort((columns["image"][kept], columns["priority"][kept], row[kept]))]
        row = row[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        order, row, rank = (part[rank < self.most] for part in (order, row, rank))
        for name, column in columns.items():
            rows = np.full((len(slots), self.most), _EMPTY[name], column.dtype)
            rows[row, rank] = column[order]
            getattr(self, name)[slots] = rows

    def merge(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Add what `columns` of another list gave."""
        slot = np.nonzero(columns["image"] >= 0)
        image, prompt, value, token, step = (columns[name][slot] for name in self.COLUMNS[1:])
        self.add(slot[0], columns["priority"][slot], ScoreRows(slot[0], image, prompt, value, token, step))

    def columns(self) -> dict[str, NDArray[Any]]:
        """Everything, [slots, most] each; -1 where there is no image."""
        return {name: getattr(self, name) for name in self.COLUMNS}


_EMPTY: Mapping[str, float] = {"priority": math.inf, "image": -1, "prompt": -1, "value": 0, "token": -1, "step": -1}


def _first_of_each(slot: Ints, prompt: Ints, priority: Floats, image: Ints) -> Ints:
    """The rows that come first among those of their slot and prompt."""
    order = np.lexsort((image, priority, prompt, slot))
    new = (np.diff(slot[order], prepend=-1) != 0) | (np.diff(prompt[order], prepend=-1) != 0)
    return order[new]


class Search:
    """The search for the examples of one stream, over some of its parts.

    `first` reads each part, `between_passes` makes what the second pass needs of it, and `second` reads each part
    again. After each pass, what several processes found is put together with `merge`.
    """

    def __init__(self, folder: FeatureFolder, stream: Stream, settings: ExampleSettings) -> None:
        self.folder, self.stream, self.settings = folder, stream, settings
        self.features, self.table = folder.settings.d_sae, folder.table(stream)
        self.prompts = prompt_numbers([row.prompt for row in folder.images])
        self.top, self.random = Best(self.features, settings.top), Best(self.features, settings.random)
        self.quantile = Best(self.features * settings.quantiles, settings.per_quantile)
        self.silent = Best(self.features, settings.silent)
        self.histogram = np.zeros((self.features, OCTAVES * BINS_PER_OCTAVE), np.int64)
        self.in_quantile = np.zeros((self.features, settings.quantiles), np.int64)
        self.sketches = np.zeros((folder.settings.images, SKETCH), np.float32)
        self.weights = rarity(self.table, folder.settings.images)
        signs = np.random.default_rng(settings.seed).integers(0, 2, (self.features, SKETCH), np.int8)
        self.directions = torch.from_numpy(signs.astype(np.float32) * 2 - 1) * torch.from_numpy(self.weights)[:, None]

    def first(self, part: ScorePart) -> None:
        """Strongest and random images, the histogram of S, and the sketch of each image."""
        rows = self._rows(part)
        self.top.add(rows.feature, -rows.value.astype(np.float64), rows)
        self.random.add(rows.feature, chance(self.settings.seed, rows.feature, rows.prompt), rows)
        np.add.at(self.histogram, (rows.feature, self._bin(rows.value)), 1)
        ends = torch.from_numpy(part.image_ptr[:-1].copy())
        weights = torch.from_numpy(np.array(part.max))
        features = torch.from_numpy(rows.feature)
        sums = F.embedding_bag(features, self.directions, ends, mode="sum", per_sample_weights=weights)
        self.sketches[part.images.start : part.images.stop] = sums.numpy()

    def between_passes(self) -> None:
        """The edges of the shares, and for each feature the direction that the sketches of its look-alikes have.

        That is the mean of its strongest images' sketches, each without what the feature itself adds to it.
        """
        self.edges = self._quantile_edges()
        self.lengths = np.linalg.norm(self.sketches, axis=1)
        self.alike = np.zeros((self.features, SKETCH), np.float32)
        for start in range(0, self.features, AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            strongest, value = self.top.image[rows, :ALIKE], self.top.value[rows, :ALIKE, None]
            own = value * self.directions[rows, None].numpy()
            alike = self.sketches[strongest] - own
            alike /= np.maximum(np.linalg.norm(alike, axis=2, keepdims=True), 1e-30)
            self.alike[rows] = (alike * (strongest >= 0)[..., None]).sum(1)
        self.alike /= np.maximum(np.linalg.norm(self.alike, axis=1, keepdims=True), 1e-30)

    def second(self, part: ScorePart) -> None:
        """Images of each share, and look-alikes on which features are silent."""
        rows = self._rows(part)
        share = (rows.value[:, None] < self.edges[rows.feature]).sum(1)
        np.add.at(self.in_quantile, (rows.feature, share), 1)
        slot = rows.feature * self.settings.quantiles + share
        self.quantile.add(slot, chance(self.settings.seed + 1, slot, rows.prompt), rows)
        self._look_for_silent(part, rows)

    def _look_for_silent(self, part: ScorePart, firing: ScoreRows) -> None:
        """The images of a part, a few at a time, by their likeness to what each feature fires on: a cosine."""
        at_once = max(1, ENTRIES_AT_ONCE // self.features)
        towards = self.alike.T.astype(np.float64)
        for start in range(part.images.start, part.images.stop, at_once):
            images = range(start, min(start + at_once, part.images.stop))
            lengths = np.maximum(self.lengths[images.start : images.stop, None], 1e-30)
            # In float64, then rounded: the last bit of a float32 product depends on how many threads share it.
            sketches = self.sketches[images.start : images.stop].astype(np.float64) / lengths
            alike = (sketches @ towards).astype(np.float32)
            in_batch = slice(*np.searchsorted(firing.image, [images.start, images.stop]))
            alike[firing.image[in_batch] - images.start, firing.feature[in_batch]] = -np.inf  # not silent
            alike[:, ~self.table.alive] = -np.inf
            image, feature = np.nonzero((alike > -np.inf) & (-alike <= self.silent.priority[:, -1]))
            value, numbers = alike[image, feature], image + images.start
            nowhere = np.full(len(image), -1)
            rows = ScoreRows(
                feature, numbers, self.prompts[numbers], value, nowhere.astype(np.int32), nowhere.astype(np.int16)
            )
            self.silent.add(feature, -value.astype(np.float64), rows)

    def state(self, after: Pass) -> dict[str, NDArray[Any]]:
        """What this process has found in a pass, as arrays for the others to `merge`."""
        arrays = {
            f"{name}/{column}": array for name in after.lists for column, array in getattr(self, name).columns().items()
        }
        return arrays | {name: getattr(self, name) for name in after.sums}

    def merge(self, state: Mapping[str, NDArray[Any]], after: Pass) -> None:
        """Add what another process has found in a pass over other parts."""
        for name in after.lists:
            getattr(self, name).merge({column: state[f"{name}/{column}"] for column in Best.COLUMNS})
        for name in after.sums:
            setattr(self, name, getattr(self, name) + state[name])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of examples.safetensors for this stream."""
        shape = (self.features, self.settings.quantiles, self.settings.per_quantile)
        arrays: dict[str, NDArray[Any]] = {}
        for kind in ("top", "quantile", "random", "silent"):
            best: Best = getattr(self, kind)
            columns: dict[str, NDArray[Any]] = {"": best.image.astype(np.int32), "_value": best.value}
            if kind != "silent":
                columns |= {"_token": best.token, "_step": best.step}
            for name, column in columns.items():
                arrays[f"{self.stream}/{kind}{name}"] = column.reshape(shape) if kind == "quantile" else column
        arrays[f"{self.stream}/quantile_edges"] = self.edges
        arrays[f"{self.stream}/quantile_count"] = self.in_quantile
        return arrays

    def _rows(self, part: ScorePart) -> ScoreRows:
        image = part.images.start + part.image_of_rows()
        feature = part.feature.astype(np.int64)
        value, token, step = np.asarray(part.max), np.asarray(part.at_token), np.asarray(part.at_step)
        return ScoreRows(feature, image, self.prompts[image], value, token, step)

    def _bin(self, value: NDArray[np.float32]) -> Ints:
        octaves = np.log2(value.astype(np.float64)) - math.log2(self.table.edges[0])
        return np.floor(octaves * BINS_PER_OCTAVE).astype(np.int64).clip(0, OCTAVES * BINS_PER_OCTAVE - 1)

    def _quantile_edges(self) -> NDArray[np.float32]:
        """[features, Q - 1]: S between one share and the next, the largest first, to a sixteenth of an octave."""
        below = np.pad(np.cumsum(self.histogram, 1), ((0, 0), (1, 0)))
        every, shares = np.arange(self.features), np.arange(self.settings.quantiles - 1, 0, -1)
        edges = np.zeros((self.features, len(shares)))
        for at, share in enumerate(shares):
            rank = share * below[:, -1] / self.settings.quantiles
            bins = np.minimum((below[:, 1:] < rank[:, None]).sum(1), self.histogram.shape[1] - 1)
            within = (rank - below[every, bins]) / np.maximum(self.histogram[every, bins], 1)
            edges[:, at] = self.table.edges[0] * 2.0 ** ((bins + within) / BINS_PER_OCTAVE)
        return edges.astype(np.float32)


def rarity(table: FeatureTable, images: int) -> NDArray[np.float32]:
    """The weight of each feature in sketches, [d_sae]: as tf-idf weighs words, a rare feature says more of an image.

    It is log(images / images it fires on) divided by its largest activation.
    """
    weight = np.log(images / np.maximum(table.images, 1)) / np.maximum(table.max_active, 1e-30)
    return np.where(table.alive, weight, 0).astype(np.float32)


def prompt_numbers(prompts: Sequence[str]) -> Ints:
    """A number for each prompt, the same for the same; every image without one counts as a prompt of its own."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) if text else -1 - at for at, text in enumerate(prompts)])


def chance(seed: int, slot: Ints, prompt: Ints) -> Floats:
    """A number in [0, 1) for each slot and prompt, as if drawn: splitmix64 (Steele et al. 2014) of the three."""
    with np.errstate(over="ignore"):
        x = _mixed(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15))
        for column in (slot, prompt):
            x = _mixed(x ^ column.astype(np.uint64))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mixed(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
