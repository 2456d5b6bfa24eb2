"""What transfers are worth: how near each comes to the edited prompt's picture, and what the rest of the picture pays.

Every picture has two numbers, both better when lower. A point is beaten when another of its method is as good in both
and better in one; those that are not are the method's Pareto front. Next: `flux_ir.api.transfer`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from flux_ir.errors import counted
from flux_ir.steering.dose import Made, price
from flux_ir.steering.regions import Grid
from flux_ir.steering.table import Estimate, estimate
from flux_ir.steering.transfer import SWEPT

ORIGINAL, EDITED = "original", "edited"
"""The pictures of the two prompts by themselves."""


class Score(NamedTuple):
    """One picture, against those of the two prompts."""

    identical: bool
    """With the original, every byte and every bit of the latent."""
    distance: float
    """|latent - edited| / |original - edited| in the region: 0 is the edited prompt's picture, 1 the original."""
    psnr_edited_db: float | None
    """In the region, against the edited prompt's picture. None: nothing differs."""
    outside: float | None
    """|latent - original| / |original| outside the region. None: the region is the whole picture."""
    psnr_outside_db: float | None
    """Outside, against the original. None: nothing differs, or there is nothing outside."""


def score(made: Made, original: Made, edited: Made, inside: Bool[Tensor, "tokens"] | None, grid: Grid) -> Score:
    """The numbers of one picture. The latents of the two prompts differ in the region."""
    to_edited, to_original = price(made, edited, inside, grid), price(made, original, inside, grid)
    return Score(
        identical=to_original.identical,
        distance=to_edited.latent_inside / price(original, edited, inside, grid).latent_inside,
        psnr_edited_db=to_edited.psnr_inside_db,
        outside=to_original.latent_outside,
        psnr_outside_db=to_original.psnr_outside_db,
    )


class TransferRun(NamedTuple):
    """The numbers of one picture, and what it is a picture of."""

    case: str
    """Which pair, and which noise."""
    pair: int
    method: str
    """original, edited, or one of `METHODS`."""
    k: int | None
    """None: the method moves whole tokens."""
    used: int | None
    """Units that were subtracted or added, whichever are more: less than k where there were no more."""
    strength: float
    draw: int
    score: Score

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it."""
        return self._asdict() | {"score": self.score._asdict()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "TransferRun":
        """What `to_json` gave."""
        return cls(**{**stored, "score": Score(**stored["score"])})


# ---- Many pictures


class TransferRow(NamedTuple):
    """What the pictures of one method, k and strength have in common. None: no picture has such a number."""

    method: str
    k: int | None
    strength: float
    pictures: int
    identical: int
    used: Estimate | None
    distance: Estimate
    psnr_edited_db: Estimate | None
    outside: Estimate | None
    psnr_outside_db: Estimate | None
    front: bool
    """No other point of the method is as good in both numbers and better in one. Distance alone, without an outside."""
    best: bool
    """Of the method, the nearest to the edited prompt's picture that moves the rest no more than that prompt does."""


def tabulate_transfers(runs: Sequence[TransferRun]) -> list[TransferRow]:
    """A row for each method, k and strength, in the order in which they come.

    Intervals are over pairs: noises and draws of one pair are averaged first. With one pair they are over its noises.
    """
    groups: dict[tuple[str, int | None, float], list[TransferRun]] = {}
    for run in runs:
        groups.setdefault((run.method, run.k, run.strength), []).append(run)
    unit = unit_of(runs)
    rows = [_row(*key, alike, unit) for key, alike in groups.items()]
    moved = next((row.outside.mean for row in rows if row.method == EDITED and row.outside is not None), None)
    marked: list[TransferRow] = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        if method in (ORIGINAL, EDITED):
            marked += own
            continue
        points = [_point(row) for row in own]
        front = pareto(points)
        # Among those that move the rest no more than the edited prompt does; if there is none, what moves it least.
        limit = max(moved or 0.0, min(x for x, _ in points))
        best = min((i for i, (x, _) in enumerate(points) if x <= limit), key=lambda i: points[i][::-1])
        marked += [row._replace(front=front[i], best=i == best) for i, row in enumerate(own)]
    return marked


def unit_of(runs: Sequence[TransferRun]) -> Callable[[TransferRun], str]:
    """What counts as one observation of many: a pair; of one pair, a noise."""
    several = len({run.pair for run in runs}) > 1
    return lambda run: str(run.pair) if several else run.case


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points no other beats: none is as low in both numbers and lower in one. Equal points all stay."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front = [False] * len(points)
    lowest, last = math.inf, None
    for i in order:
        _, y = points[i]
        if y < lowest or (last is not None and points[i] == last):
            front[i], lowest, last = True, y, points[i]
    return front


class Area(NamedTuple):
    """How much of the plane a method's front dominates, of one observation or estimated from many: 0 to 1."""

    method: str
    area: Estimate


def areas(runs: Sequence[TransferRun]) -> list[Area]:
    """For each method the mean area its points dominate, between the original and the edited prompt's picture.

    The plane is distance (0 to 1) by outside (0 to what the edited prompt's own picture moves it). 1 would be the
    edited prompt's picture in the region with nothing moved outside; the original alone is 0. Empty without an outside.
    """
    unit = unit_of(runs)
    moved = {run.case: run.score.outside for run in runs if run.method == EDITED}
    found: dict[str, dict[str, list[float]]] = {}
    for case in dict.fromkeys(run.case for run in runs):
        limit = moved.get(case)
        if not limit:
            continue
        own = [run for run in runs if run.case == case and run.method not in (ORIGINAL, EDITED)]
        for method, number in dict.fromkeys((run.method, run.draw) for run in own):
            points = [
                ((run.score.outside or 0.0) / limit, run.score.distance)
                for run in own
                if (run.method, run.draw) == (method, number)
            ]
            first = next(run for run in own if run.method == method)
            found.setdefault(method, {}).setdefault(unit(first), []).append(dominated(points))
    return [Area(method, _mean([float(np.mean(v)) for v in of.values()])) for method, of in found.items()]


def dominated(points: Iterable[tuple[float, float]]) -> float:
    """The share of the unit square that lies above and to the right of some point: the hypervolume of two numbers."""
    area, lowest = 0.0, 1.0
    for x, y in sorted(points):
        if x < 1 and y < lowest:
            area += (1 - x) * (lowest - max(y, 0.0))
            lowest = max(y, 0.0)
    return area


def _point(row: TransferRow) -> tuple[float, float]:
    return (0.0 if row.outside is None else row.outside.mean, row.distance.mean)


def _row(
    method: str, k: int | None, strength: float, runs: Sequence[TransferRun], unit: Callable[[TransferRun], str]
) -> TransferRow:
    def mean(of: Callable[[TransferRun], float | None]) -> Estimate | None:
        by_unit: dict[str, list[float]] = {}
        for run in runs:
            if (value := of(run)) is not None:
                by_unit.setdefault(unit(run), []).append(value)
        return estimate([float(np.mean(values)) for values in by_unit.values()])

    distance = mean(lambda run: run.score.distance)
    assert distance is not None  # every picture has one
    return TransferRow(
        method=method,
        k=k,
        strength=strength,
        pictures=len(runs),
        identical=sum(run.score.identical for run in runs),
        used=mean(lambda run: run.used),
        distance=distance,
        psnr_edited_db=mean(lambda run: run.score.psnr_edited_db),
        outside=mean(lambda run: run.score.outside),
        psnr_outside_db=mean(lambda run: run.score.psnr_outside_db),
        front=False,
        best=False,
    )


def _mean(values: Sequence[float]) -> Estimate:
    found = estimate(values)
    assert found is not None
    return found


_ESTIMATES = ("distance", "psnr_edited_db", "outside", "psnr_outside_db")


def as_table(rows: Iterable[TransferRow]) -> list[dict[str, Any]]:
    """The rows as those of a table; estimates have their interval beside them, empty where there is none."""
    return [
        {
            "method": row.method,
            "k": row.k,
            "strength": row.strength,
            "pictures": row.pictures,
            "identical": row.identical,
            "k_used": None if row.used is None else row.used.mean,
            **{
                f"{name}{end}": value
                for name in _ESTIMATES
                for end, value in zip(("", "_low", "_high"), getattr(row, name) or (None, None, None), strict=True)
            },
            "front": int(row.front),
            "best": int(row.best),
        }
        for row in rows
    ]


def notes_of(runs: Sequence[TransferRun], cases: int) -> list[str]:
    """Where there were fewer units than k."""
    notes = []
    for method in SWEPT:
        short = [run for run in runs if run.method == method and run.k is not None and (run.used or 0) < run.k]
        if short:
            k, least = max(run.k or 0 for run in short), min(run.used or 0 for run in short)
            count = len({run.case for run in short})
            what = "neurons" if method == "neurons" else "features"
            notes.append(
                f"note: k {k} is more {what} than differ in the region ({method}: {counted(count, 'run')} of {cases}, "
                f"{least} at the least): what there is is moved"
            )
    return notes
