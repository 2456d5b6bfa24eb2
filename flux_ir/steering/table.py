"""What many pictures of one steering come to: a row per strength, with intervals over noises."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from flux_ir.steering.dose import Price

CONFIDENCE = 0.95
EDIT, UNSTEERED, NEURON, RANDOM = "edit", "unsteered", "neuron", "random"


class Run(NamedTuple):
    """The numbers of one picture."""

    row: str
    """edit, unsteered, neuron, random_3 or a window of steps."""
    strength: float
    seed: int
    activation: float | None
    """See `Activity.after`."""
    carried: float | None
    moved: int | None
    """Features that no edit names and whose largest activation changed by a tenth of their maximum."""
    price: Price | None
    """None: it is the unsteered picture itself."""

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it."""
        return self._asdict() | {"price": None if self.price is None else self.price.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Run":
        """What `to_json` gave."""
        price = stored["price"]
        return cls(**{**stored, "price": None if price is None else Price(**price)})


class Estimate(NamedTuple):
    """A mean over pictures, and its 95 % interval (Student's t); None for one picture alone."""

    mean: float
    low: float | None
    high: float | None


class DoseRow(NamedTuple):
    """What the pictures of one row and strength have in common. None: no picture has such a number."""

    row: str
    """edit; random, for all random directions together; neuron; or, at the largest strength, a window of steps."""
    strength: float
    pictures: int
    identical: int
    """Pictures that have the bits of the unsteered one."""
    activation: Estimate | None
    """The features behind the edit, in their own maxima."""
    carried: Estimate | None
    """Before it, at the steps after the first edited one: what the network made of the edit."""
    moved: Estimate | None
    psnr_inside_db: Estimate | None
    psnr_outside_db: Estimate | None
    latent_inside: Estimate | None
    """|difference| / |unsteered| of the finished latent."""
    latent_outside: Estimate | None
    lpips: Estimate | None = None
    """Of the whole picture; None also where only some of the pictures have it."""
    lpips_outside: Estimate | None = None


def tabulate(runs: Iterable[Run]) -> list[DoseRow]:
    """A row for each kind of picture and strength, in the order in which they come."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        if run.row != UNSTEERED:
            kind = RANDOM if run.row.startswith(RANDOM) else run.row
            groups.setdefault((kind, run.strength), []).append(run)
    return [_row(kind, strength, alike) for (kind, strength), alike in groups.items()]


def _row(kind: str, strength: float, runs: Sequence[Run]) -> DoseRow:
    def mean(of: Callable[[Run], float | None]) -> Estimate | None:
        return estimate([value for run in runs if (value := of(run)) is not None])

    def price(name: str) -> Estimate | None:
        return mean(lambda run: None if run.price is None else getattr(run.price, name))

    has_lpips = all(run.price is not None and run.price.lpips is not None for run in runs)
    return DoseRow(
        kind,
        strength,
        len(runs),
        sum(run.price is not None and run.price.identical for run in runs),
        mean(lambda run: run.activation),
        mean(lambda run: run.carried),
        mean(lambda run: run.moved),
        *(price(name) for name in ("psnr_inside_db", "psnr_outside_db", "latent_inside", "latent_outside")),
        *((price(name) if has_lpips else None) for name in ("lpips", "lpips_outside")),
    )


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of some pictures' numbers with its interval; None of none."""
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, None, None)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def row_json(row: DoseRow) -> dict[str, Any]:
    """A row as JSON can say it; without LPIPS where it was not measured."""
    said = {name: value._asdict() if isinstance(value, Estimate) else value for name, value in row._asdict().items()}
    return {name: value for name, value in said.items() if value is not None or "lpips" not in name}
