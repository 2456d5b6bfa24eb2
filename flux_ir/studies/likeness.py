"""How alike two runs are, block by block: measured as `paired_runs` tells of them, and summed up over generations.

Distance and cosine take all tokens of a stream as one long vector. CKA asks less: whether tokens that differ in one run
differ likewise in the other, whatever rotation and scale lie between. All of it is float64.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.lens.measures import HSIC, LinearCKA, cka_of, cosine, json_number, relative_distance

Measure = Literal["distance", "cosine", "cka"]
MEASURES: tuple[Measure, ...] = ("distance", "cosine", "cka")
BOOTSTRAP = 1_000
AT_ONCE = 1_024
"""Tokens that are in float64 at once for CKA."""


class Likeness(NamedTuple):
    """How alike two tensors of the same tokens are."""

    distance: float
    """||other - first|| / ||first||: 0 where they are equal bit by bit."""
    cosine: float
    hsic: HSIC | None
    """What CKA is made of; None: not measured, or fewer than 4 tokens."""


def measure(first: Tensor, other: Tensor, cka_tokens: int) -> Likeness:
    """Two tensors [tokens, d], CKA by so many of the tokens, evenly spaced (0: none)."""
    hsic = None
    if min(cka_tokens, len(first)) >= 4:
        rows = np.unique(np.linspace(0, len(first) - 1, min(cka_tokens, len(first))).round().astype(int))
        alignment = LinearCKA()
        for start in range(0, len(rows), AT_ONCE):
            chosen = rows[start : start + AT_ONCE].tolist()
            alignment.add(first[chosen], other[chosen])
        hsic = alignment.hsic()
    return Likeness(relative_distance(other, first), cosine(other, first), hsic)


class Table:
    """What was measured in one generation, by run, stream, row (a block, or what is before or behind all) and step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, dict[str, list[Likeness]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )

    def add(self, run: str, stream: str, row: str, likeness: Likeness) -> None:
        """The next step of a row."""
        self.values[run][stream][row].append(likeness)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, unrounded: `from_json` of it is the same."""
        return {
            run: {
                stream: {row: [[one.distance, one.cosine, one.hsic] for one in steps] for row, steps in rows.items()}
                for stream, rows in streams.items()
            }
            for run, streams in self.values.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Table":
        """What `to_json` gave."""
        table = cls()
        for run, streams in content.items():
            for stream, rows in streams.items():
                for row, steps in rows.items():
                    for distance, angle, hsic in steps:
                        likeness = Likeness(distance, angle, None if hsic is None else HSIC(*hsic))
                        table.add(run, stream, row, likeness)
        return table


def summary(tables: Sequence[Table], prompts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Means over generations by run, stream, measure and row, a list over steps each: {mean, low, high}.

    CKA is that of the summed HSIC: of tokens centred picture by picture. `low` and `high` hold the middle 95 % of
    bootstrap draws of prompts, whose generations stay together; with one prompt they are None. A run that only some of
    the generations have is summed up over those.
    """
    found: dict[str, Any] = {}
    for run in dict.fromkeys(run for table in tables for run in table.values):
        having = [number for number, table in enumerate(tables) if run in table.values]
        weights = _draws([prompts[number] for number in having], seed)
        for stream, rows in tables[having[0]].values[run].items():
            of_stream: dict[str, Any] = {name: {} for name in MEASURES}
            for row in rows:
                series = [tables[number].values[run][stream][row] for number in having]
                for name, per_step in _row(series, weights).items():
                    of_stream[name][row] = per_step
            found.setdefault(run, {})[stream] = of_stream
    return found


def _draws(prompts: Sequence[str], seed: int) -> NDArray[np.float64]:
    """How often each generation counts: first once each, then in every draw of prompts, [1 + draws, generations]."""
    different = list(dict.fromkeys(prompts))
    number_of = {prompt: number for number, prompt in enumerate(different)}
    draws = BOOTSTRAP if len(different) > 1 else 0
    chosen = np.random.default_rng(seed).integers(len(different), size=(draws, len(different)))
    counts = np.stack([np.ones(len(different)), *(np.bincount(one, minlength=len(different)) for one in chosen)])
    return counts[:, [number_of[prompt] for prompt in prompts]].astype(np.float64)


def _row(series: Sequence[Sequence[Likeness]], weights: NDArray[np.float64]) -> dict[Measure, list[dict[str, Any]]]:
    steps: dict[Measure, list[dict[str, Any]]] = {name: [] for name in MEASURES}
    for at_step in zip(*series, strict=True):
        for name in ("distance", "cosine"):
            values = np.array([getattr(one, name) for one in at_step])
            steps[name].append(_spread(weights @ values / weights.sum(axis=1)))
        parts = [one.hsic for one in at_step if one.hsic is not None]
        if len(parts) < len(at_step):
            steps["cka"].append(_spread(np.array([math.nan])))
        else:
            own_x, cross, own_y = (weights[1:] @ np.array(parts)).T
            defined = (own_x > 0) & (own_y > 0)
            drawn = cross[defined] / np.sqrt(own_x[defined] * own_y[defined])
            steps["cka"].append(_spread(np.concatenate([[cka_of(parts)], drawn])))
    return steps


def _spread(values: NDArray[np.float64]) -> dict[str, Any]:
    """The first value, and where the middle 95 % of the others are."""
    low, high = np.quantile(values[1:], [0.025, 0.975]).tolist() if len(values) > 1 else (None, None)
    mean = None if math.isnan(values[0]) else float(values[0])
    return {"mean": json_number(mean), "low": json_number(low), "high": json_number(high)}
