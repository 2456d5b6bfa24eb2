"""What a folder of features holds, as it is in memory: what was scored, the scores, the table, the examples.

Next: `folder`, which reads all of it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.sites import Stream

HISTOGRAM_BINS = 64
RARE, COMMON = 0.01, 0.1
"""Shares of the tokens. A feature that fires on fewer than `RARE` is rare, on fewer than `COMMON` common."""
PLACE_R2 = 0.5
"""A feature means a place if the position of a token explains more than this share of its variance."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Everything that the scores depend on, and no path: the same content gives the same digest wherever it lies."""

    weights: str
    """sha256 of the autoencoder's weights."""
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    """Active features per token; None for an architecture that is not given their number."""
    captures: str
    """The identity of the activations: a digest of their content."""
    model: str | None
    site: str | None
    """None: a plain array, or CLIP's activations."""
    streams: tuple[Stream, ...]
    steps: tuple[int, ...]
    """By the sampler's numbers."""
    images: int
    """Generations."""
    tokens: Mapping[Stream, int]
    """Tokens of each stream of a generation, padding included; where generations differ, the most."""

    @property
    def digest(self) -> str:
        """16 hex digits that stand for all of it."""
        return digest_of(asdict(self))


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One generation."""

    index: int
    id: str
    prompt: str
    seed: int | None
    width: int | None
    """Pixels; None: not known, as of an array."""
    height: int | None
    grid: tuple[int, int] | None
    """Rows and columns of its image tokens; None: they lie on no grid, or it is not known."""
    picture: str | None
    """Path relative to the captures' folder; None: there is no picture."""
    used_txt: int | None
    """Text tokens that are not padding; None: not known."""


class TokenFeatures(NamedTuple):
    """The features of the tokens of one image at one step: those of token t are `ptr[t]` to `ptr[t + 1]`."""

    ptr: NDArray[np.int64]
    feature: NDArray[np.int64]
    value: NDArray[np.float32]
    """Descending within a token."""


@dataclass(frozen=True)
class ScorePart:
    """The scores of a run of n generations, memory-mapped. Their tokens are the `positions` that are not -1."""

    images: range
    steps: tuple[int, ...]
    image_ptr: NDArray[np.int64]
    """[n + 1]: the rows of each image."""
    feature: NDArray[Any]
    """[rows], ascending within an image; a feature without a row is silent on the image."""
    max: NDArray[np.float32]
    """[rows]: S, the largest activation over all tokens and steps."""
    mean: NDArray[np.float32]
    """[rows]: over all tokens and steps, zeros included."""
    at_token: NDArray[np.int32]
    """[rows]: the position of the first of the largest, in its stream."""
    at_step: NDArray[np.int16]
    """[rows]: its step, by the sampler's number."""
    row_ptr: NDArray[np.int64]
    """[rows + 1]: the entries of each row."""
    place: NDArray[Any]
    """[entries]: index of the step times `tokens`, plus index of the token; ascending within a row.

    Everywhere else a place is one in the picture: `positions` leads from the token to it.
    """
    value: NDArray[np.float32]
    """[entries], above 0."""
    error: NDArray[np.float32]
    """[n, steps, tokens]: ||x - x_hat||^2; 0 where there is no token."""
    norm: NDArray[np.float32]
    """[n, steps, tokens]: ||x - mean||^2, the mean being that of the sample at this step and stream."""
    positions: NDArray[np.int32]
    """[n, tokens]: of each token in its stream; -1: padding, or no token."""
    centred: NDArray[np.float64]
    """[steps, d_in]: the sum over all tokens of x - mean."""

    @property
    def tokens(self) -> int:
        """Tokens of an image at one step: as many entries each, used or not."""
        return self.positions.shape[1]

    def image_of_rows(self) -> NDArray[np.int64]:
        """[rows]: the image of each row, counted from the part's first."""
        return np.repeat(np.arange(len(self.images)), np.diff(self.image_ptr))

    def row_of_entries(self) -> NDArray[np.int64]:
        """[entries]: the row of each entry."""
        return np.repeat(np.arange(len(self.feature)), np.diff(self.row_ptr))

    def rows(self, image: int) -> slice:
        """The rows of an image, by its number in the source."""
        at = image - self.images.start
        return slice(int(self.image_ptr[at]), int(self.image_ptr[at + 1]))

    def entries(self, image: int, feature: int) -> slice:
        """The entries of a feature on an image: an empty slice where it is silent."""
        rows = self.rows(image)
        row = rows.start + int(np.searchsorted(self.feature[rows], feature))
        if row == rows.stop or self.feature[row] != feature:
            return slice(0, 0)
        return slice(int(self.row_ptr[row]), int(self.row_ptr[row + 1]))

    def token_map(self, image: int, feature: int) -> NDArray[np.float32]:
        """The activation of every token, in the order of `positions`: [steps, tokens]."""
        entries, found = self.entries(image, feature), np.zeros(len(self.steps) * self.tokens, np.float32)
        found[self.place[entries]] = self.value[entries]
        return found.reshape(len(self.steps), self.tokens)

    def token_features(self, image: int, step: int) -> TokenFeatures:
        """All features of all tokens of an image at a step (the sampler's number)."""
        rows, tokens = self.rows(image), self.tokens
        entries = slice(int(self.row_ptr[rows.start]), int(self.row_ptr[rows.stop]))
        lengths = np.diff(self.row_ptr[rows.start : rows.stop + 1])
        token = self.place[entries].astype(np.int64) - self.steps.index(step) * tokens
        here = (token >= 0) & (token < tokens)
        feature = np.repeat(self.feature[rows].astype(np.int64), lengths)[here]
        token, value = token[here], np.asarray(self.value[entries])[here]
        order = np.lexsort((feature, -value, token))
        ptr = np.searchsorted(token[order], np.arange(tokens + 1)).astype(np.int64)
        return TokenFeatures(ptr, feature[order], value[order])


Parts = Callable[[], Iterable[ScorePart]]
"""Reads the parts of a folder from the first to the last, as often as it is called."""


@dataclass(frozen=True)
class FeatureTable:
    """The numbers of each feature of one stream, [d_sae] unless said otherwise; NaN where one is not defined."""

    count: NDArray[np.int64]
    """Tokens, over all steps, on which it fires."""
    frequency: NDArray[np.float64]
    """`count` as a share of all tokens."""
    images: NDArray[np.int64]
    """Generations with such a token."""
    mean_active: NDArray[np.float32]
    """Mean activation over the tokens it fires on; 0 for a dead one."""
    max_active: NDArray[np.float32]
    share: NDArray[np.float64]
    """Its part of what all features add: sum of z^2 ||W_dec||^2 over the tokens, divided by that of all features."""
    step_frequency: NDArray[np.float64]
    """[d_sae, steps]: share of the tokens of a step on which it fires."""
    step_mean: NDArray[np.float64]
    """[d_sae, steps]: mean activation over all tokens of a step, zeros included."""
    histogram: NDArray[np.int64]
    """[d_sae, 64]: how many activations lie between one edge and the next; the outer bins hold all beyond."""
    edges: NDArray[np.float64]
    """[65]: four to an octave, the same for all features."""
    centre_x: NDArray[np.float64]
    """Where its activation lies on average, from 0, at the left, to 1; of text from its beginning to its end."""
    centre_y: NDArray[np.float64]
    """From 0, at the top, to 1; NaN for text."""
    spread: NDArray[np.float64]
    """Root mean square distance of a map's activation from the map's own centre, in units of its longer side."""
    entropy: NDArray[np.float64]
    """Mean entropy of a map, from 0, all on one token, to 1, equal on all. (Maps weigh as much as their activation.)"""
    position_r2: NDArray[np.float64]
    """Share of its variance over tokens that the position explains: above 0.5 the feature means a place."""

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """Whether it fires at all."""
        return self.count > 0

    @cached_property
    def means_place(self) -> NDArray[np.bool_]:
        """Whether a feature depends more on where a token is than on what is there."""
        return np.nan_to_num(self.position_r2) > PLACE_R2

    @cached_property
    def density(self) -> NDArray[Any]:
        """dead, rare (fires on fewer than 1 % of the tokens), common (fewer than 10 %) or very common."""
        names = np.array(["dead", "rare", "common", "very common"])
        return names[np.where(self.count == 0, 0, 1 + np.digitize(self.frequency, [RARE, COMMON]))]


@dataclass(frozen=True)
class ExampleTable:
    """The numbers of the images that show each feature, [d_sae, most] of each kind; -1 where there are fewer.

    No two images of a row have one prompt. Beside each image: its S, and where the largest value is. `quantile` is
    [d_sae, Q, M].
    """

    top: NDArray[np.int32]
    """The strongest."""
    top_value: NDArray[np.float32]
    top_token: NDArray[np.int32]
    """Position in its stream."""
    top_step: NDArray[np.int16]
    """By the sampler's number."""
    quantile: NDArray[np.int32]
    """Drawn from each of Q equal shares of the images it fires on, the strongest share first."""
    quantile_value: NDArray[np.float32]
    quantile_token: NDArray[np.int32]
    quantile_step: NDArray[np.int16]
    quantile_edges: NDArray[np.float32]
    """[d_sae, Q - 1]: S between the shares."""
    quantile_count: NDArray[np.int64]
    """[d_sae, Q]: images in each share."""
    random: NDArray[np.int32]
    """Drawn from all images it fires on."""
    random_value: NDArray[np.float32]
    random_token: NDArray[np.int32]
    random_step: NDArray[np.int16]
    silent: NDArray[np.int32]
    """Images on which it never fires, most like its strongest ones by what else fires on them."""
    silent_value: NDArray[np.float32]
    """The likeness to its strongest images: a cosine."""


def digest_of(value: Any) -> str:
    """A digest of a value that JSON can hold: 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
