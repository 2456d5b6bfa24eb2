"""How good a dictionary is at giving activations back: one definition of each number, for SAEs and baselines alike.

Everything is summed over the whole evaluation set in float64 and divided once at the end, so no number depends on how
the tokens were cut into batches. Each step, each stream and each pair of them is also an evaluation set of its own,
with its own mean. Next: `baselines` to compare with, `splice` for what the network makes of a reconstruction.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.sae.data.filters import lengths
from flux_ir.sites import Stream

Rows = Float[Tensor, "tokens d"]
Features = Float[Tensor, "tokens d_sae"]

Group = tuple[int, Stream]

# Features this rare are shown in the first bin: with fewer than ten million tokens nothing is rarer.
LOWEST_LOG10 = -7.0
BINS_PER_DECADE = 8
DENSE_VALUES = 1 << 25  # feature values held at once while evaluating: 128 MB in float32

OUTLIER_FACTOR = 10.0
"""A token is an outlier if it is more than so many times as long as the median of its step and stream.

Transformers keep a few such tokens as registers, or attention sinks. SAEDashboard leaves tokens out by such a rule, and
`train-sae --outliers` takes such a factor for training.
"""
_MEDIAN_TOKENS = 4_096  # of each step: the median is then good to a few per cent, and the factor is 10


@runtime_checkable
class Reconstructor(Protocol):
    """What can be evaluated: a sparse autoencoder or a baseline. All of it in raw space."""

    def encode(self, x: Tensor) -> Tensor:
        """Features [tokens, d_sae] of activations [tokens, d]; a feature fires where it is not zero."""

    def decode(self, features: Tensor) -> Tensor:
        """Activations [tokens, d] that these features stand for."""


@runtime_checkable
class EvaluationBatch(Protocol):
    """Tokens to evaluate on: raw activations, and which step and stream each is of."""

    @property
    def values(self) -> Tensor: ...
    @property
    def steps(self) -> Tensor: ...
    @property
    def is_text(self) -> Tensor: ...


class Numbers(NamedTuple):
    """What was measured on one set of tokens. NaN where it is undefined: a set without tokens or without variance."""

    tokens: int
    fvu: float
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean being this set's own."""
    cosine: float
    """Mean over tokens of the cosine between x and x_hat, both as they are (not centred)."""
    l0: float
    """Mean number of features that fire on a token."""
    dead_share: float
    """Share of features that fire on no token of the set."""
    mean_norm: float
    """Mean over tokens of ||x||."""
    mean_norm_reconstructed: float
    """Mean over tokens of ||x_hat||."""
    squared_error: float
    """The FVU's numerator: sum ||x - x_hat||^2."""
    squared_deviation: float
    """The FVU's denominator: sum ||x - mean||^2."""


class Density(NamedTuple):
    """How often features fire: a histogram of log10(share of tokens), the dead ones apart."""

    log10_edges: list[float]
    features: list[int]
    """Features between one edge and the next."""
    dead: int


class Outliers(NamedTuple):
    """The outliers of an evaluation set, and all numbers of the ordinary tokens alone."""

    factor: float
    """Outliers are longer than so many times the median of their step and stream."""
    tokens: int
    """How many outliers there are."""
    share_of_error: float
    """Their share of the FVU's numerator over the whole set."""
    share_of_deviation: float
    """How much of the FVU's denominator goes with them."""
    overall: Numbers
    """The numbers without them, with a mean of their own; likewise the others."""
    per_step: dict[int, Numbers]
    per_stream: dict[Stream, Numbers]
    per_group: dict[Group, Numbers]


class Evaluation(NamedTuple):
    """All numbers of one reconstructor on one evaluation set."""

    overall: Numbers
    per_step: dict[int, Numbers]
    per_stream: dict[Stream, Numbers]
    per_group: dict[Group, Numbers]
    """For each step and stream that tokens came from."""
    density: Density
    frequency: Tensor
    """Share of tokens on which each feature fires, float64 [d_sae] on the CPU."""
    mean_active: Tensor
    """Mean activation of each feature over the tokens it fires on, float32 [d_sae] on the CPU; 0 for dead ones."""
    max_active: Tensor
    """The largest activation of each feature, likewise."""
    outliers: Outliers | None
    """None: no limits were given."""

    @property
    def decided_by_outliers(self) -> bool:
        """Whether the FVU differs by more than a tenth from that of the ordinary tokens."""
        if self.outliers is None or not self.outliers.tokens:
            return False
        fvus = sorted((self.overall.fvu, self.outliers.overall.fvu))
        return not fvus[0] * 1.1 >= fvus[1]  # also where one of them is not defined


class Deviation:
    """Count, mean and sum of squared deviations from it, of rows that come in batches; float64, exact to rounding.

    Batches are merged as by Chan, Golub & LeVeque (1983): unlike a difference of two sums it loses no digits where the
    mean is far larger than the spread, as it is in transformers.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        """Sum over rows of ||row - mean||^2."""

    def add(self, rows: Rows) -> None:
        """Take these rows in."""
        if len(rows):
            exact = rows.double()
            mean = exact.mean(0)
            self._merge(len(rows), mean, (exact - mean).square().sum())

    def merge(self, other: "Deviation") -> None:
        """Take in all rows that `other` has seen."""
        if other.count:
            self._merge(other.count, other.mean, other.squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        both = self.count + count
        difference = mean - self.mean
        self.squares = self.squares + squares + difference.square().sum() * (self.count * count / both)
        self.mean = self.mean + difference * (count / both)
        self.count = both


class _TokenSums:
    """What one step of one stream has added up to. Nothing is read back from the device before `numbers`."""

    def __init__(self, d: int, d_sae: int, device: torch.device) -> None:
        self.deviation = Deviation(d, device)
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # squared error, cosine, norm, norm of x_hat
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def add(self, x: Rows, x_hat: Rows, fired: Int[Tensor, " d_sae"]) -> None:
        self.deviation.add(x)
        x, x_hat = x.double(), x_hat.double()
        norm, norm_hat = x.norm(dim=-1), x_hat.norm(dim=-1)
        both = norm * norm_hat
        cosine = (x * x_hat).sum(-1) / torch.where(both > 0, both, 1.0)  # 0 where one of them is the zero vector
        error = (x - x_hat).square().sum()
        self.totals += torch.stack([error, cosine.sum(), norm.sum(), norm_hat.sum()])
        self.fired += fired

    def merge(self, other: "_TokenSums") -> None:
        self.deviation.merge(other.deviation)
        self.totals += other.totals
        self.fired += other.fired

    def numbers(self) -> Numbers:
        tokens = self.deviation.count
        error, cosine, norm, norm_hat = self.totals.tolist()
        deviation = self.deviation.squares.item()
        return Numbers(
            tokens=tokens,
            fvu=_ratio(error, deviation),
            cosine=_ratio(cosine, tokens),
            l0=_ratio(self.fired.sum().item(), tokens),
            dead_share=_ratio((self.fired == 0).sum().item(), len(self.fired)),
            mean_norm=_ratio(norm, tokens),
            mean_norm_reconstructed=_ratio(norm_hat, tokens),
            squared_error=error,
            squared_deviation=deviation,
        )


class Evaluator:
    """Adds up batches of tokens with their reconstructions, and gives all numbers at the end."""

    def __init__(self, limits: Mapping[Group, float] | None = None) -> None:
        """`limits`: the length above which a token of each step and stream is an outlier; None: none is told apart."""
        self.limits = limits
        self._sums: dict[tuple[Group, bool], _TokenSums] = {}  # True: of outliers
        self._like: tuple[int, int, torch.device] | None = None

    @torch.no_grad()
    def add(
        self,
        x: Rows,
        x_hat: Rows,
        features: Features,
        steps: Int[Tensor, " tokens"] | int = 0,
        is_text: Bool[Tensor, " tokens"] | bool = False,  # noqa: FBT001, FBT002 (a tensor as a rule)
    ) -> None:
        """Add activations `x`, their reconstructions and features; `steps` and `is_text` say where each comes from.

        Raises FluxIRError if the features are of another number than before.
        """
        self._check(x, features)
        self._add_activations(features)
        for group, rows in _groups(steps, is_text).items():
            chosen = (x, x_hat, features) if rows is None else (x[rows], x_hat[rows], features[rows])
            long = lengths(chosen[0]) > (self.limits or {}).get(group, math.inf)
            if not long.any():
                self._add(group, outliers=False, chosen=chosen)
                continue
            for outliers in (False, True):
                kept = long if outliers else ~long
                if kept.any():
                    self._add(group, outliers=outliers, chosen=tuple(part[kept] for part in chosen))

    def result(self) -> Evaluation:
        """The numbers of everything added so far. Raises FluxIRError if that is nothing."""
        if self._like is None:
            raise FluxIRError(
                "an evaluation needs at least one token: got none",
                hint="check which images are held out, and the filters of the tokens",
            )
        overall = self._merged()
        frequency = (overall.fired.double() / max(1, overall.deviation.count)).cpu()
        per_step, per_stream, per_group = self._broken_down()
        return Evaluation(
            overall=overall.numbers(),
            per_step=per_step,
            per_stream=per_stream,
            per_group=per_group,
            density=density_of(frequency),
            frequency=frequency,
            mean_active=(self._activations / overall.fired.clamp_min(1)).float().cpu(),
            max_active=self._largest.cpu(),
            outliers=None if self.limits is None else self._outliers(overall),
        )

    def _outliers(self, overall: _TokenSums) -> Outliers:
        ordinary = self._merged(with_outliers=False)
        per_step, per_stream, per_group = self._broken_down(with_outliers=False)
        error, error_left = overall.totals[0].item(), ordinary.totals[0].item()
        deviation, deviation_left = overall.deviation.squares.item(), ordinary.deviation.squares.item()
        return Outliers(
            factor=OUTLIER_FACTOR,
            tokens=overall.deviation.count - ordinary.deviation.count,
            share_of_error=_ratio(error - error_left, error),
            share_of_deviation=_ratio(deviation - deviation_left, deviation),
            overall=ordinary.numbers(),
            per_step=per_step,
            per_stream=per_stream,
            per_group=per_group,
        )

    def _broken_down(
        self, *, with_outliers: bool = True
    ) -> tuple[dict[int, Numbers], dict[Stream, Numbers], dict[Group, Numbers]]:
        """The numbers of each step, of each stream, and of each pair of them."""
        groups = sorted({group for group, outlier in self._sums if with_outliers or not outlier})
        merged = {group: self._merged([group], with_outliers=with_outliers) for group in groups}
        steps, streams = sorted({step for step, _ in groups}), sorted({stream for _, stream in groups})
        of_step = {s: [group for group in groups if group[0] == s] for s in steps}
        of_stream = {s: [group for group in groups if group[1] == s] for s in streams}
        return (
            {s: self._merged(of, with_outliers=with_outliers).numbers() for s, of in of_step.items()},
            {s: self._merged(of, with_outliers=with_outliers).numbers() for s, of in of_stream.items()},
            {group: sums.numbers() for group, sums in merged.items()},
        )

    def _merged(self, groups: Collection[Group] | None = None, *, with_outliers: bool = True) -> _TokenSums:
        """What these groups, or all of them, have added up to."""
        if self._like is None:
            raise RuntimeError("nothing was added")
        merged = _TokenSums(*self._like)
        for group, outlier in sorted(self._sums):  # always in this order, so that the same tokens give the same bits
            if (groups is None or group in groups) and (with_outliers or not outlier):
                merged.merge(self._sums[group, outlier])
        return merged

    def _add(self, group: Group, *, outliers: bool, chosen: tuple[Tensor, ...]) -> None:
        x, x_hat, features = chosen
        sums = self._sums.setdefault((group, outliers), _TokenSums(x.shape[1], features.shape[1], x.device))
        sums.add(x, x_hat, (features != 0).sum(0))

    def _add_activations(self, features: Tensor) -> None:
        self._activations += features.sum(0)
        if len(features):
            torch.maximum(self._largest, features.amax(0).float(), out=self._largest)

    def _check(self, x: Tensor, features: Tensor) -> None:
        like = (x.shape[1], features.shape[1], x.device)
        if self._like is None:
            self._like = like
            self._activations = torch.zeros(like[1], dtype=torch.float64, device=like[2])
            self._largest = torch.zeros(like[1], device=like[2])
        elif self._like != like:
            raise FluxIRError(
                f"all batches of one evaluation must be alike: got (d, d_sae, device) {like} after {self._like}",
                hint="evaluate each site and each dictionary by itself",
            )


@torch.no_grad()
def evaluate(
    reconstructor: Reconstructor,
    batches: Iterable[EvaluationBatch],
    *,
    d_sae: int,
    device: torch.device | str = "cpu",
    target: Callable[[Tensor], Tensor] | None = None,
    limits: Mapping[Group, float] | None = None,
) -> Evaluation:
    """All numbers of a reconstructor on these tokens, in float32 on its `device`.

    `target` makes of a token what is to be reconstructed (None: the token itself). `limits` are what `outlier_limits`
    gives: with them the numbers are also given for the ordinary tokens alone. Features are held for a few tokens at a
    time, as many as `d_sae` allows.
    """
    evaluator, at_once = Evaluator(limits), max(1, DENSE_VALUES // d_sae)
    for batch in batches:
        for start in range(0, len(batch.values), at_once):
            rows = slice(start, start + at_once)
            x, steps, is_text = (part[rows].to(device) for part in (batch.values, batch.steps, batch.is_text))
            features = reconstructor.encode(x.float())
            targets = x.float() if target is None else target(x.float())
            evaluator.add(targets, reconstructor.decode(features).float(), features, steps, is_text)
    return evaluator.result()


def outlier_limits(batches: Iterable[EvaluationBatch], steps: Collection[int]) -> dict[Group, float]:
    """The length above which a token is an outlier, for each step and stream: `OUTLIER_FACTOR` times the median.

    Reads the batches, which come in a random order, until each of `steps` has some thousand tokens, or to their end.
    """
    lengths_of: dict[Group, list[Tensor]] = defaultdict(list)
    counts = dict.fromkeys(steps, 0)
    for batch in batches:
        norms = lengths(batch.values)
        for group, rows in _groups(batch.steps, batch.is_text).items():
            of_group = norms if rows is None else norms[rows]
            lengths_of[group].append(of_group.cpu())
            counts[group[0]] = counts.get(group[0], 0) + len(of_group)
        if counts and min(counts.values()) >= _MEDIAN_TOKENS:
            break
    return {group: OUTLIER_FACTOR * torch.cat(norms).double().median().item() for group, norms in lengths_of.items()}


def density_of(frequency: Float[Tensor, " d_sae"]) -> Density:
    """The histogram of how often features fire, given the share of tokens on which each does."""
    bins = round(-LOWEST_LOG10 * BINS_PER_DECADE)
    alive = frequency[frequency > 0].double()
    bin_of_each = ((alive.log10() - LOWEST_LOG10) * BINS_PER_DECADE).floor().long().clamp(0, bins - 1)
    return Density(
        log10_edges=[LOWEST_LOG10 + edge / BINS_PER_DECADE for edge in range(bins + 1)],
        features=torch.bincount(bin_of_each, minlength=bins).tolist(),
        dead=int((frequency == 0).sum()),
    )


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain JSON values, rounded to eight digits; None for what is undefined."""
    return {
        **_broken_down_to_json(evaluation),
        "density": evaluation.density._asdict(),
        "outliers": None if evaluation.outliers is None else _outliers_to_json(evaluation.outliers),
    }


def _outliers_to_json(outliers: Outliers) -> dict[str, Any]:
    return {
        "longer_than_medians": outliers.factor,
        "tokens": outliers.tokens,
        "share_of_squared_error": rounded(outliers.share_of_error),
        "share_of_squared_deviation": rounded(outliers.share_of_deviation),
        "without": _broken_down_to_json(outliers),
    }


def _broken_down_to_json(measured: Evaluation | Outliers) -> dict[str, Any]:
    return {
        "overall": numbers_to_json(measured.overall),
        "per_step": {str(step): numbers_to_json(numbers) for step, numbers in measured.per_step.items()},
        "per_stream": {stream: numbers_to_json(numbers) for stream, numbers in measured.per_stream.items()},
        "per_step_and_stream": {
            f"{step}.{stream}": numbers_to_json(numbers) for (step, stream), numbers in measured.per_group.items()
        },
    }


def numbers_to_json(numbers: Numbers) -> dict[str, Any]:
    """Numbers as plain JSON values, rounded to eight digits; None for what is undefined."""
    return {name: rounded(value) for name, value in numbers._asdict().items()}


def rounded(value: float) -> float | int | None:
    """`value` to eight digits for a JSON file, which has no word for infinity or NaN; whole numbers as they are."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _groups(steps: Tensor | int, is_text: Tensor | bool) -> dict[Group, Tensor | None]:  # noqa: FBT001
    """The rows of each step and stream; None for all of them."""
    if not isinstance(steps, Tensor) and not isinstance(is_text, Tensor):
        return {(steps, "txt" if is_text else "img"): None}
    key = 2 * torch.as_tensor(steps) + torch.as_tensor(is_text).long()
    values = torch.bincount(key).nonzero().flatten().tolist()
    if len(values) == 1:
        return {(values[0] // 2, "txt" if values[0] % 2 else "img"): None}
    return {(value // 2, "txt" if value % 2 else "img"): key == value for value in values}
