"""Features in the layout that Neuronpedia imports: a line of JSON per feature, and per image that shows what it means.

Its activations are tokens of a text with a value each, and it knows no pictures. Text-stream features fit as they are.
For image tokens this is the convention: a "token" is a patch, "r07c12" for row 7 and column 12, those on which the
feature fires, row by row; `dataSource` is the picture's path, relative to the captures. Values are those of the step at
which the largest is.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.features.folder import FeatureFolder
from flux_ir.features.words import PromptTokens
from flux_ir.sites import Site, Stream

BATCH_FEATURES = 1024
"""Features of a file."""
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The account that their scripts give to rows of nobody in particular: every row must belong to one."""
CREATED_AT = "1970-01-01T00:00:00"
"""A fixed time, so that the same features give the same bytes."""
_EMPTY = (
    "vector",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
"""Columns of their rows that are about a language model's vocabulary: empty here."""

NeuronpediaRow = dict[str, Any]


class Names(NamedTuple):
    """The names that features get there: model "flux-tiny", source "6-single-img", and the set "single-img"."""

    model: str
    source: str
    source_set: str


def names_of(folder: FeatureFolder, stream: Stream) -> Names:
    """A source is a layer's number and a set: here the block's number, and what else names the site."""
    model = folder.settings.model or "unnamed"
    if folder.settings.site is None:
        return Names(model, "0-array", "array")
    site = Site.parse(folder.settings.site)
    words = "-".join(word for word in (site.kind, stream, site.part) if word)
    return Names(model, f"{site.block}-{words}", words)


def description_rows(folder: FeatureFolder, names: Names) -> dict[str, NeuronpediaRow]:
    """The rows of the four files that say what the features are of, by the names of the files."""
    scored = folder.settings
    ours: NeuronpediaRow = {"creatorId": CREATOR_ID, "createdAt": CREATED_AT}
    where = f"{scored.architecture} on {scored.site or 'an array'} of {names.model}, {scored.d_sae} features"
    title = {"displayName": names.model, "displayNameShort": names.model, "updatedAt": CREATED_AT}
    release = {"name": folder.path.name, "description": where, "descriptionShort": where, "urls": []}
    return {
        "release.jsonl": release | {"creatorName": "flux-ir", "creatorNameShort": "flux-ir"} | ours,
        "model.jsonl": {"id": names.model, "instruct": False} | title | ours,
        "sourceset.jsonl": {
            "modelId": names.model,
            "name": names.source_set,
            "description": where,
            "visibility": "PUBLIC",
            "creatorName": "flux-ir",
            "releaseName": folder.path.name,
        }
        | ours,
        "source.jsonl": {
            "modelId": names.model,
            "setName": names.source_set,
            "id": names.source,
            "visibility": "PUBLIC",
            "dataset": None,
            "num_prompts": scored.images,
            "num_tokens_in_prompt": max(scored.tokens.values()),
            "hfRepoId": None,
            "hfFolderId": None,
        }
        | ours,
    }


class NeuronpediaRows:
    """The rows of the features of one stream, and of their activations."""

    def __init__(self, folder: FeatureFolder, stream: Stream, tokens: PromptTokens | None) -> None:
        """`tokens` are the strings of the texts; None: they are called by their positions, "t007"."""
        self.folder, self.stream, self.tokens = folder, stream, tokens
        self.names, self.table, self.examples = names_of(folder, stream), folder.table(stream), folder.examples(stream)
        decoder = folder.columns("decoder.safetensors", stream) if self._has("decoder.safetensors") else {}
        self._nearest, self._cosine = decoder.get("nearest"), decoder.get("nearest_cosine")

    def _has(self, file: str) -> bool:
        return (self.folder.path / file).is_file()

    def feature(self, feature: int) -> NeuronpediaRow:
        """The row of a feature."""
        largest = round(float(self.table.max_active[feature]), 6)
        heights = self.table.histogram[feature]
        bins = np.flatnonzero(heights)
        shown = slice(bins[0], bins[-1] + 1) if len(bins) else slice(0, 0)
        near: tuple[list[int], list[float]] = ([], [])
        if self._nearest is not None and self._cosine is not None:
            there = self._nearest[feature] >= 0
            near = self._nearest[feature][there].tolist(), _rounded(self._cosine[feature][there])
        return {
            "modelId": self.names.model,
            "layer": self.names.source,
            "index": str(feature),
            "sourceSetName": self.names.source_set,
            "creatorId": CREATOR_ID,
            "createdAt": CREATED_AT,
            "maxActApprox": largest,
            "frac_nonzero": float(self.table.frequency[feature]),
            "freq_hist_data_bar_heights": heights[shown].tolist(),
            "freq_hist_data_bar_values": _rounded(self.table.edges[:-1][shown]),  # as many as heights
            "topkCosSimIndices": near[0],
            "topkCosSimValues": near[1],
            "hasVector": False,
            "vectorLabel": None,
            "hookName": None,
            "vectorDefaultSteerStrength": largest,
            **{name: [] for name in _EMPTY},
        }

    def activations(self, feature: int) -> Iterator[NeuronpediaRow]:
        """A row for each of a feature's strongest images, and for the examples of every share of its images."""
        table, largest = self.examples, float(self.table.max_active[feature])
        for at, image in enumerate(table.top[feature]):
            if image >= 0:
                yield self._activation(feature, f"top-{at}", int(image), int(table.top_step[feature, at]), None)
        edges = [largest, *table.quantile_edges[feature].tolist(), 0.0]
        every = max(1, int(table.quantile_count[feature].sum()))
        for share, images in enumerate(table.quantile[feature]):
            bounds = (edges[share + 1], edges[share], float(table.quantile_count[feature, share]) / every)
            for at, image in enumerate(images):
                if image >= 0:
                    step = int(table.quantile_step[feature, share, at])
                    yield self._activation(feature, f"{share}-{at}", int(image), step, bounds)

    def _activation(
        self, feature: int, kind: str, image: int, step: int, bounds: tuple[float, float, float] | None
    ) -> NeuronpediaRow:
        part, row = self.folder.part_of(image, self.stream), self.folder.images[image]
        values = part.token_map(image, feature)[part.steps.index(step)]
        positions = part.positions[image - part.images.start]
        shown = positions >= 0 if self.stream == "txt" else values > 0
        positions, values = positions[shown], values[shown]
        largest = int(values.argmax())
        low, high, contains = bounds or (None, None, None)
        name = f"{self.names.model}/{self.names.source}/{self.folder.settings.digest}/{feature}/{kind}"
        return {
            "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
            "modelId": self.names.model,
            "layer": self.names.source,
            "index": str(feature),
            "creatorId": CREATOR_ID,
            "createdAt": CREATED_AT,
            "tokens": self._token_strings(image, positions),
            "values": _rounded(values),
            "maxValue": round(float(values[largest]), 6),
            "maxValueTokenIndex": largest,
            "minValue": round(float(values.min()), 6),
            "qualifyingTokenIndex": largest,
            "binMin": low,
            "binMax": high,
            "binContains": contains,
            "dataIndex": str(image),
            "dataSource": row.picture,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
        }

    def _token_strings(self, image: int, positions: NDArray[np.int32]) -> list[str]:
        if self.stream == "txt" and self.tokens is not None:
            return [self.tokens.strings[number] for number in self.tokens.ids[image, positions]]
        grid = self.folder.images[image].grid if self.stream == "img" else None
        if grid is None:
            return [f"t{position:03d}" for position in positions.tolist()]
        return [f"r{row:02d}c{column:02d}" for row, column in (divmod(p, grid[1]) for p in positions.tolist())]


def batches(folder: FeatureFolder) -> list[range]:
    """The features of each pair of files (features/ and activations/)."""
    count = folder.settings.d_sae
    numbers = range(math.ceil(count / BATCH_FEATURES))
    return [range(n * BATCH_FEATURES, min((n + 1) * BATCH_FEATURES, count)) for n in numbers]


def _rounded(values: Sequence[float] | NDArray[Any]) -> list[float]:
    return [round(float(value), 6) for value in values]
