"""AUROC of many features at once, exact: the chance that a positive scores above a negative, ties counting half.

It is the Mann-Whitney statistic U(P, N), the number of pairs (positive, negative) in which the positive is larger, plus
half of those that tie, divided by |P| |N|. Features of an SAE are nearly all zero, so zeros are counted and only the
rest is sorted, once for all questions: an answer costs one pass over the positives' features. With positives P among
the counted tokens I = P + N,

    U(P, I) = U(P, N) + U(P, P),    U(P, P) = |P|^2 / 2,

so that questions with the same I share the pass over I. Next: `concepts`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

_POOLED = 2**24  # numbers of a dense block [pictures, features]: 64 MB
_NEGATIVES = 20_000  # of a bootstrap, at most


class Codes(NamedTuple):
    """The non-zero features of tokens (or of pictures), as triples sorted by token."""

    token: np.ndarray
    """int32 [entries], ascending."""
    feature: np.ndarray
    """int32 [entries]; a feature occurs once per token."""
    value: np.ndarray
    """float32 [entries]."""
    tokens: int
    features: int

    def pooled(self, tokens_per_image: int) -> "Codes":
        """The largest value of each feature on each picture. Values must be positive: zero is what is left out."""
        images = self.tokens // tokens_per_image
        ends = np.searchsorted(self.token, np.arange(images + 1) * tokens_per_image)
        parts: list[tuple[np.ndarray, ...]] = []
        for first in range(0, images, each := max(1, _POOLED // self.features)):
            last = min(first + each, images)
            rows = slice(ends[first], ends[last])
            image_of_row = (self.token[rows] // tokens_per_image - first).astype(np.int64)
            cell = image_of_row * self.features + self.feature[rows]
            largest = torch.zeros((last - first) * self.features)
            largest.scatter_reduce_(0, torch.from_numpy(cell), torch.from_numpy(self.value[rows]), "amax")
            cells = np.flatnonzero(largest.numpy())
            image, feature = np.divmod(cells, self.features)
            parts.append(((image + first).astype(np.int32), feature.astype(np.int32), largest.numpy()[cells]))
        token, feature, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Codes(token, feature, value, images, self.features)

    def column(self, feature: int) -> np.ndarray:
        """One feature of every token: float32 [tokens]."""
        scores = np.zeros(self.tokens, dtype=np.float32)
        mine = self.feature == feature
        scores[self.token[mine]] = self.value[mine]
        return scores

    def sums(self, among: np.ndarray) -> np.ndarray:
        """The sum of every feature over some tokens, bool [tokens]: float64 [features]."""
        return np.bincount(self.feature, weights=self.value * among[self.token], minlength=self.features)


class RankedCodes:
    """Codes sorted by feature and value, from which the AUROC of every question is read."""

    def __init__(self, codes: Codes) -> None:
        self.tokens, self.features = codes.tokens, codes.features
        if not np.isfinite(codes.value).all():
            raise ValueError("scores must be finite to be ranked")
        # One sort of 64-bit keys: the feature above, the bits of the value, made to sort as floats do, below.
        key = codes.feature.astype(np.uint64) << np.uint64(32) | _ordered_bits(codes.value)
        order = np.argsort(key, kind="stable")
        key = key[order]
        self._token = codes.token[order]
        # Where the entries of each feature begin, and how many of them lie below zero.
        self._first = np.searchsorted(key, np.arange(codes.features + 1, dtype=np.uint64) << np.uint64(32))
        zero = np.arange(codes.features, dtype=np.uint64) << np.uint64(32) | _ordered_bits(np.zeros(1, np.float32))
        self._zero = np.searchsorted(key, zero)
        # Where the entries that tie with each one begin and end.
        new = np.append(np.diff(key) != 0, True) if len(key) else np.zeros(0, dtype=bool)
        ends = np.flatnonzero(new) + 1
        if len(ends) == len(key):
            self._tie_first, self._tie_end = None, None
        else:
            group = np.cumsum(new) - new
            self._tie_first = np.concatenate([[0], ends[:-1]])[group]
            self._tie_end = ends[group]
        # By token: where its entries are in that order, and whose features they are.
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        self._feature = codes.feature
        self._of_token = np.searchsorted(codes.token, np.arange(codes.tokens + 1))
        self._counted: np.ndarray | None = None
        self._below = np.zeros(1, dtype=np.int64)

    def auroc(self, positive: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """AUROC of every feature, float64 [features]; NaN without a positive or without a negative.

        `positive` and `counted` are bool [tokens]: the negatives are who counts and is not positive.
        """
        if self._counted is None or not np.array_equal(counted, self._counted):
            self._counted = counted.copy()
            self._below = _running(counted[self._token])
        below, first, everyone = self._below, self._first, int(counted.sum())
        rows = _rows(self._of_token, np.flatnonzero(positive))
        rank, feature = self._rank[rows], self._feature[rows]
        if self._tie_first is None or self._tie_end is None:
            among = 0.5 * (below[rank] + below[rank + 1])
        else:
            among = 0.5 * (below[self._tie_first[rank]] + below[self._tie_end[rank]])
        # U(P, I) per feature: each positive beats the counted tokens below it, and half of those that tie with it.
        # Tokens without an entry score zero: entries above zero beat them, those below do not.
        listed = below[first[1:]] - below[first[:-1]]
        unlisted = everyone - listed
        negative_values = below[self._zero] - below[first[:-1]]
        above_zero = rank >= self._zero[feature]
        positives = int(positive.sum())
        sum_among = np.bincount(feature, weights=among, minlength=self.features)
        listed_positives = np.bincount(feature, minlength=self.features)
        above = np.bincount(feature[above_zero], minlength=self.features)
        sum_among -= listed_positives * below[first[:-1]]
        unlisted_positives = positives - listed_positives
        u = sum_among + above * unlisted + unlisted_positives * (negative_values + 0.5 * unlisted)
        return _share(u - 0.5 * positives**2, positives, everyone - positives)

    def auroc_of(self, feature: int, positive: np.ndarray, counted: np.ndarray) -> float:
        """The AUROC of one feature, from its own entries alone."""
        first, last = self._first[feature], self._first[feature + 1]
        token, zero = self._token[first:last], self._zero[feature] - first
        hits, below = positive[token], _running(counted[token])
        if self._tie_first is None or self._tie_end is None:
            among = 0.5 * (below[:-1] + below[1:])
        else:
            tied = slice(first, last)
            among = 0.5 * (below[self._tie_first[tied] - first] + below[self._tie_end[tied] - first])
        positives, everyone = int(positive.sum()), int(counted.sum())
        unlisted, unlisted_positives = everyone - below[-1], positives - int(hits.sum())
        u = among[hits].sum() + hits[zero:].sum() * unlisted + unlisted_positives * (below[zero] + 0.5 * unlisted)
        return float(_share(np.array([u - 0.5 * positives**2]), positives, everyone - positives)[0])


def auroc(scores: np.ndarray, positive: np.ndarray, counted: np.ndarray) -> float:
    """AUROC of one score: all three [tokens]. NaN without a positive or without a negative."""
    return weighted_auroc(scores, positive, counted, np.ones((1, len(scores))))[0]


def weighted_auroc(
    scores: np.ndarray, positive: np.ndarray, counted: np.ndarray, weights: Iterable[np.ndarray]
) -> list[float]:
    """AUROC of one score where each token counts as often as it has weight, for several weightings [tokens]."""
    who = np.flatnonzero(counted)
    who = who[np.argsort(scores[who])]  # no stable sort: the weights of ties are added up
    ordered, is_positive = scores[who], positive[who]
    if not np.isfinite(ordered).all():
        raise ValueError("scores must be finite to be ranked")
    starts = np.flatnonzero(np.append(True, np.diff(ordered) != 0)) if len(who) else np.zeros(0, dtype=np.int64)
    aurocs = []
    for weight in weights:
        weights_of = weight[who]
        positives, everyone = (_sums(weights_of * is_positive, starts), _sums(weights_of, starts))
        negatives = everyone - positives
        below = np.cumsum(negatives) - 0.5 * negatives
        total = positives.sum(), negatives.sum()
        aurocs.append(float(positives @ below / (total[0] * total[1])) if min(total) > 0 else float("nan"))
    return aurocs


class Operating(NamedTuple):
    """Precision and recall at a threshold, which is inf where none is precise enough."""

    threshold: float
    precision: float | None
    """None: nothing reaches the threshold."""
    recall: float


def precise_threshold(scores: np.ndarray, positive: np.ndarray, counted: np.ndarray, precision: float = 0.95) -> float:
    """The threshold of the largest recall at which precision is at least this; inf if there is none.

    Scores that tie are above it or below it together.
    """
    who = np.flatnonzero(counted)
    who = who[np.argsort(-scores[who])]
    ordered, hits = scores[who], np.cumsum(positive[who])
    last_of_tie = np.append(np.diff(ordered) != 0, True) if len(who) else np.zeros(0, dtype=bool)
    enough = last_of_tie & (hits >= precision * np.arange(1, len(who) + 1)) & (hits > 0)
    return float(ordered[np.flatnonzero(enough)[-1]]) if enough.any() else float("inf")


def at_threshold(scores: np.ndarray, positive: np.ndarray, counted: np.ndarray, threshold: float) -> Operating:
    """Precision and recall of scores that reach a threshold."""
    reached = counted & (scores >= threshold)
    hits = int((reached & positive).sum())
    return Operating(
        threshold, hits / int(reached.sum()) if reached.any() else None, hits / max(1, int(positive.sum()))
    )


def bootstrap(
    scores: np.ndarray, positive: np.ndarray, counted: np.ndarray, group: np.ndarray, *, draws: int, seed: int
) -> tuple[float, float] | None:
    """The middle 95 % of the AUROC over draws of groups (prompts) with replacement. `group` is [tokens], from 0 on.

    Draws without positives or without negatives have no AUROC and are left out; None if there is no other.

    Prompts are drawn and not tokens, since those of one prompt are not independent. Of more than `_NEGATIVES` negatives
    a random subset of this size is used: their variance is small beside that of the positives. The interval is shifted
    by the difference that this makes to the AUROC itself.
    """
    used = counted
    if (counted & ~positive).sum() > _NEGATIVES:
        who = np.flatnonzero(counted & ~positive)
        used = positive & counted
        used[np.random.default_rng(seed).choice(who, _NEGATIVES, replace=False)] = True
    aurocs = np.array(weighted_auroc(scores, positive, used, _drawn(group, draws, seed)))
    if np.isnan(aurocs).all():
        return None
    moved = 0.0 if used is counted else auroc(scores, positive, counted) - auroc(scores, positive, used)
    low, high = np.nanquantile(aurocs, [0.025, 0.975]) + moved
    return max(0.0, float(low)), min(1.0, float(high))


def _drawn(group: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    generator, groups = np.random.default_rng(seed), int(group.max()) + 1
    for _ in range(draws):
        yield np.bincount(generator.integers(groups, size=groups), minlength=groups)[group]


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 as integers that sort as the values do: uint64. Both zeros are one."""
    bits = (values + np.float32(0)).view(np.uint32)
    flipped = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    return flipped.astype(np.uint64)


def _running(flags: np.ndarray) -> np.ndarray:
    """The number of flags set before each index: int64 [len + 1]."""
    counts = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=counts[1:])
    return counts


def _rows(first: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The rows of these tokens, where the rows of token t are first[t] to first[t + 1]."""
    starts, lengths = first[tokens], first[tokens + 1] - first[tokens]
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, starts) if len(starts) else np.zeros(0)


def _share(u: np.ndarray, positives: int, negatives: int) -> np.ndarray:
    return u / (positives * negatives) if positives and negatives else np.full(len(u), np.nan)
