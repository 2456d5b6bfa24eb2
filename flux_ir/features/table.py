"""The numbers of each feature, and of the whole autoencoder, as sums over the parts of the scores in their order.

Sums are float64 and per feature, and entries are added one after the other as they lie in the parts. So the table is a
function of the parts alone, however often and in how many processes they were made. Next: `examples`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flux_ir.features.contents import HISTOGRAM_BINS, FeatureSettings, FeatureTable, ImageRow, ScorePart
from flux_ir.sae.evaluation.metrics import Deviation, rounded
from flux_ir.sites import Stream

CELLS = 16
"""Cells that tokens are counted in for `position_r2`: at most 16 x 16 of a picture, at most 256 of a text."""
BINS_PER_OCTAVE = 4
PIECE_ENTRIES = 1 << 18
"""Entries that are added up at a time: about 40 MB. No bit depends on it."""

Floats = NDArray[np.float64]


class Places(NamedTuple):
    """Where the tokens of some images lie, [images, tokens] each, in units of the picture's longer side."""

    x: Floats
    """From the left; of text, from its beginning."""
    y: Floats
    cell: NDArray[np.int64]
    sides: Floats
    """[images, 2]: width and height."""


class Sums:
    """The sums over all parts of one stream."""

    def __init__(self, settings: FeatureSettings, stream: Stream, edges: Floats) -> None:
        self.settings, self.stream, self.edges = settings, stream, edges
        features, steps = settings.d_sae, len(settings.steps)
        self.images = np.zeros(features, np.int64)
        self.largest = np.zeros(features, np.float32)
        self.count = np.zeros(features * steps, np.int64)
        self.total = np.zeros(features * steps)
        self.squares = np.zeros(features)
        self.histogram = np.zeros(features * HISTOGRAM_BINS, np.int64)
        self.centre = np.zeros((2, features))
        self.spread, self.entropy = np.zeros(features), np.zeros(features)
        self.mass_with_entropy, self.mass_with_place = np.zeros(features), np.zeros(features)
        """The activation on maps that have an entropy (two tokens or more), and on tokens whose place is known."""
        self.cells = CELLS**2
        self.in_cell = np.zeros(features * self.cells)
        self.cell_tokens = np.zeros(self.cells, np.int64)
        self.image_cells = 0
        """Pairs of an image and a cell that it has tokens in."""
        self.tokens = np.zeros(steps, np.int64)
        self.error, self.norm = np.zeros(steps), np.zeros(steps)
        self.centred = np.zeros((steps, settings.d_in))

    def add(self, part: ScorePart, images: Sequence[ImageRow]) -> None:
        """Add the next part; `images` are its rows of images.jsonl."""
        counted = part.positions >= 0
        self.tokens += int(counted.sum())
        self.error += part.error.sum((0, 2), dtype=np.float64)
        self.norm += part.norm.sum((0, 2), dtype=np.float64)
        self.centred += part.centred
        feature = part.feature.astype(np.int64)
        np.add.at(self.images, feature, 1)
        np.maximum.at(self.largest, feature, part.max)
        places = places_of(part.positions, images, self.stream)
        if places is not None:
            np.add.at(self.cell_tokens, places.cell[counted], 1)
            image_of = np.broadcast_to(np.arange(len(images))[:, None], counted.shape)
            self.image_cells += len(np.unique(image_of[counted] * self.cells + places.cell[counted]))
        image = part.image_of_rows()
        for rows in _pieces(part.row_ptr):
            self._add_entries(part, rows, feature[rows], image[rows], places, counted.sum(1))

    def _add_entries(
        self,
        part: ScorePart,
        rows: slice,
        row_feature: NDArray[np.int64],
        row_image: NDArray[np.int64],
        places: Places | None,
        counted: NDArray[np.int64],
    ) -> None:
        steps = len(self.settings.steps)
        lengths = np.diff(part.row_ptr[rows.start : rows.stop + 1])
        entries = slice(int(part.row_ptr[rows.start]), int(part.row_ptr[rows.stop]))
        value = part.value[entries].astype(np.float64)
        step, token = np.divmod(part.place[entries], part.tokens)
        row = np.repeat(np.arange(len(lengths)), lengths)
        feature, image = np.repeat(row_feature, lengths), np.repeat(row_image, lengths)
        octaves = np.log2(part.value[entries])  # of float32, three times as fast: bins and entropies need no more
        bins = np.floor((octaves - math.log2(self.edges[0])) * BINS_PER_OCTAVE).astype(np.int64)
        np.add.at(self.histogram, feature * HISTOGRAM_BINS + bins.clip(0, HISTOGRAM_BINS - 1), 1)
        np.add.at(self.squares, feature, value * value)
        np.add.at(self.count, feature * steps + step, 1)
        # A map is what a feature does on an image at a step: entries that lie one after the other.
        key = row * steps + step
        starts = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
        map_of = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(key)))
        mass = np.bincount(map_of, value)  # three times as fast as reduceat where maps are small
        map_feature, map_image = feature[starts], image[starts]
        np.add.at(self.total, map_feature * steps + step[starts], mass)
        # The entropy of a map p = value / mass, times mass: mass ln(mass) - sum value ln(value).
        entropy = mass * np.log(mass) - np.bincount(map_of, value * octaves) * math.log(2)
        largest = np.log(np.maximum(counted[map_image], 2))  # the entropy of a map that is equal on all tokens
        several = counted[map_image] > 1
        np.add.at(self.entropy, map_feature[several], (entropy.clip(0) / largest)[several])
        np.add.at(self.mass_with_entropy, map_feature[several], mass[several])
        if places is not None:
            at = image * part.tokens + token
            x, y = places.x.ravel()[at], places.y.ravel()[at]
            moment = [np.bincount(map_of, value * axis) for axis in (x, y)]
            # Squared distances from the map's own centre, weighted: sum v r^2 - |sum v r|^2 / sum v.
            within = np.bincount(map_of, value * (x * x + y * y)) - (moment[0] ** 2 + moment[1] ** 2) / mass
            for axis in (0, 1):
                np.add.at(self.centre[axis], map_feature, moment[axis] / places.sides[map_image, axis])
            np.add.at(self.spread, map_feature, within.clip(0))
            np.add.at(self.mass_with_place, map_feature, mass)
            np.add.at(self.in_cell, feature * self.cells + places.cell.ravel()[at], value)

    def table(self, decoder_norms: Floats) -> FeatureTable:
        """The numbers of each feature; `decoder_norms` [d_sae] are the lengths of the rows of W_dec."""
        features, steps = self.settings.d_sae, len(self.settings.steps)
        count, total = self.count.reshape(features, steps), self.total.reshape(features, steps)
        tokens, fired, mass = int(self.tokens.sum()), count.sum(1), total.sum(1)
        energy = self.squares * decoder_norms**2
        with np.errstate(invalid="ignore", divide="ignore"):  # dead features, and text or arrays without places
            centre = self.centre / self.mass_with_place
            return FeatureTable(
                count=fired,
                frequency=fired / max(tokens, 1),
                images=self.images,
                mean_active=(mass / np.maximum(fired, 1)).astype(np.float32),
                max_active=self.largest,
                share=energy / (energy.sum() or 1.0),
                step_frequency=count / np.maximum(self.tokens, 1),
                step_mean=total / np.maximum(self.tokens, 1),
                histogram=self.histogram.reshape(features, HISTOGRAM_BINS),
                edges=self.edges,
                centre_x=centre[0],
                centre_y=centre[1] if self.stream == "img" else np.full(features, np.nan),
                spread=np.sqrt(self.spread / self.mass_with_place),
                entropy=self.entropy / self.mass_with_entropy,
                position_r2=self._position_r2(mass, tokens),
            )

    def _position_r2(self, mass: Floats, tokens: int) -> Floats:
        """The R squared of a feature by the cell a token lies in, adjusted so that it is 0 on average for noise:

            1 - (1 - R^2) (n - 1) / (n - cells),    R^2 = var over tokens of a cell's mean / var over tokens.

        The steps of an image are not independent, nor are neighbours within a cell, so n counts an image once in
        each of its cells. NaN for a single image, where position and content cannot be told apart.
        """
        used = self.cell_tokens > 0
        cells, n = int(used.sum()), self.image_cells
        if cells < 2 or n <= cells:
            return np.full(self.settings.d_sae, np.nan)
        tokens_in = self.cell_tokens[used] * len(self.settings.steps)
        mean = self.in_cell.reshape(-1, self.cells)[:, used] / tokens_in
        overall = mass / tokens
        between = (np.square(mean - overall[:, None]) * (tokens_in / tokens_in.sum())).sum(1)
        explained = between / (self.squares / tokens - overall**2)
        return 1 - (1 - explained) * (n - 1) / (n - cells)

    def deviations(self, sample_mean: torch.Tensor) -> list[Deviation]:
        """How far the tokens of each step are from their mean. `norm` was measured from `sample_mean` [steps, d_in]:

        sum |x - mean|^2 = sum |x - sample_mean|^2 - n |mean - sample_mean|^2.
        """
        deviations = []
        for at, tokens in enumerate(self.tokens.tolist()):
            deviation = Deviation(self.settings.d_in)
            off = torch.from_numpy(self.centred[at] / max(tokens, 1))
            deviation.count = tokens
            deviation.mean = sample_mean[at].double() + off
            deviation.squares = torch.tensor(self.norm[at] - tokens * float(off.square().sum())).clamp_min(0)
            deviations.append(deviation)
        return deviations


def places_of(positions: NDArray[np.int32], images: Sequence[ImageRow], stream: Stream) -> Places | None:
    """Where tokens lie, text as one row; None if the grid of an image is not known."""
    if stream == "txt":
        longest = max(positions.shape[1], int(positions.max(initial=0)) + 1)
        sizes = np.array([[1, longest]] * len(images))
    elif any(row.grid is None for row in images):
        return None
    else:
        sizes = np.array([row.grid for row in images])
    rows, columns = sizes[:, :1], sizes[:, 1:]
    row, column = np.divmod(positions.clip(0), columns)
    longer = sizes.max(1, keepdims=True)
    if stream == "txt":
        cell = column * CELLS**2 // np.maximum(columns, CELLS**2)
    else:
        cell = (row * CELLS // np.maximum(rows, CELLS)) * CELLS + column * CELLS // np.maximum(columns, CELLS)
    sides = np.concatenate([columns, rows], 1) / longer
    return Places((column + 0.5) / longer, (row + 0.5) / longer, cell.astype(np.int64), sides)


def unexplained(
    sums: Mapping[Stream, Sums], means: Mapping[Stream, torch.Tensor], steps: Sequence[int]
) -> dict[str, Any]:
    """FVU of the whole autoencoder: over everything, per step, per stream and per pair of them, each with its own mean.

    The definition is that of `sae.evaluation.metrics`; None where the variance is 0.
    """
    groups = {
        (step, stream): (float(sums[stream].error[at]), deviation)
        for stream in sums
        for (at, step), deviation in zip(enumerate(steps), sums[stream].deviations(means[stream]), strict=True)
    }

    def fvu(chosen: Sequence[tuple[int, Stream]]) -> float | int | None:
        merged, error = Deviation(next(iter(sums.values())).settings.d_in), 0.0
        for group in chosen:
            error += groups[group][0]
            merged.merge(groups[group][1])
        squares = float(merged.squares)
        return rounded(error / squares if squares > 0 else math.nan)

    return {
        "overall": fvu(list(groups)),
        "per_step": {str(step): fvu([(step, stream) for stream in sums]) for step in steps},
        "per_stream": {stream: fvu([(step, stream) for step in steps]) for stream in sums},
        "per_step_and_stream": {f"{step}.{stream}": fvu([(step, stream)]) for step, stream in groups},
    }


def counts_of(sums: Sums, table: FeatureTable) -> dict[str, int]:
    """How many tokens were scored, and how many features there are of each density."""
    names = ("dead", "rare", "common", "very common")
    densities = {name.replace(" ", "_"): int((table.density == name).sum()) for name in names}
    return {
        "tokens": int(sums.tokens.sum()),
        "alive": int(table.alive.sum()),
        **densities,
        "places": int(table.means_place.sum()),
    }


def _pieces(row_ptr: NDArray[np.int64]) -> Iterator[slice]:
    """Runs of rows with about `PIECE_ENTRIES` entries each."""
    rows, first = len(row_ptr) - 1, 0
    while first < rows:
        last = int(np.searchsorted(row_ptr, row_ptr[first] + PIECE_ENTRIES, side="right")) - 1
        last = max(last, first + 1)
        yield slice(first, last)
        first = last
