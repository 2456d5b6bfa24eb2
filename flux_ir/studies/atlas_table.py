"""What many pictures of an ablation come to: a row for each block, kind and window, with intervals; and one picture.

Intervals are 95 %: Student's t for means, over prompts, and Wilson's for shares, with the number of prompts as n, since
pictures of one prompt are not independent. Next: `flux_ir.api.ablate`.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm

from flux_ir.plots.grids import GridPanel, number_grids
from flux_ir.steering.table import CONFIDENCE, Estimate, estimate
from flux_ir.studies.atlas import ASPECTS, KINDS, PATCHES, WINDOW_NAMES, Ablation

Numbers = Mapping[str, Any]
"""Of one picture: see `atlas.measured`."""


class AtlasRow(NamedTuple):
    """One thing done to one block, over all pictures, of which there is at least one. None: none has such a number."""

    block: str
    """`double.3`, `single.9`; "other prompt" for pictures of the other prompts themselves."""
    ablation: Ablation
    pictures: int
    identical: int
    """Pictures that have the bits of the unedited ones: the network does not read what was changed."""
    latent: Estimate
    """|difference| / |unedited| of the finished latent."""
    psnr_db: Estimate | None
    """Of the pictures that differ."""
    lpips: Estimate | None
    """None also where only some of the pictures have it."""
    lost: Estimate | None
    """The share of what was right in the unedited picture that is wrong in this one, by picture."""
    lost_of: dict[str, Estimate]
    """For each of `ASPECTS`, the share of pictures in which it was right and is wrong now."""
    taken: Estimate | None
    """The share of what the other prompt says, and the unedited picture does not show, that this one shows."""

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it; without what was not measured."""
        said = {"block": self.block, **self.ablation._asdict(), "pictures": self.pictures, "identical": self.identical}
        for name in MEASURES:
            if (value := getattr(self, name)) is not None:
                said[name] = _rounded(value)
        if self.lost_of:
            said["lost_of"] = {aspect: _rounded(share) for aspect, share in self.lost_of.items()}
        return said


MEASURES = ("latent", "psnr_db", "lpips", "lost", "taken")


def row_of(
    block: str, ablation: Ablation, runs: Sequence[Numbers], plain: Sequence[Numbers], prompts: Sequence[str]
) -> AtlasRow:
    """The row of pictures `runs`, beside the unedited ones `plain` of the same `prompts`."""

    def mean(of: Callable[[Numbers, Numbers], float | None]) -> Estimate | None:
        by_prompt: dict[str, list[float]] = {}
        for numbers, before, prompt in zip(runs, plain, prompts, strict=True):
            if (value := of(numbers, before)) is not None:
                by_prompt.setdefault(prompt, []).append(value)
        return estimate([float(np.mean(values)) for values in by_prompt.values()])

    latent = mean(lambda now, _: now["latent"])
    assert latent is not None  # every picture has one
    has_lpips = all("lpips" in numbers for numbers in runs)
    judged = all("right" in numbers for numbers in runs)
    takes = judged and ablation.kind in PATCHES
    return AtlasRow(
        block,
        ablation,
        pictures=len(runs),
        identical=sum(numbers["identical"] for numbers in runs),
        latent=latent,
        psnr_db=mean(lambda now, _: now["psnr_db"]),
        lpips=mean(lambda now, _: now["lpips"]) if has_lpips else None,
        lost=_as_share(mean(_lost)) if judged else None,
        lost_of=_lost_by_aspect(runs, plain, prompts) if judged else {},
        taken=_as_share(mean(_taken)) if takes else None,
    )


def _as_share(value: Estimate | None) -> Estimate | None:
    """The interval of a mean of shares: what is beyond 0 and 1 is left out."""
    if value is None or value.low is None or value.high is None:
        return value
    return Estimate(value.mean, max(0.0, value.low), min(1.0, value.high))


def _lost(now: Numbers, before: Numbers) -> float | None:
    pairs = zip(now["right"]["own"], before["right"]["own"], strict=True)
    kept = [right for right, was_right in pairs if was_right]
    return 1 - float(np.mean(kept)) if kept else None


def _taken(now: Numbers, before: Numbers) -> float | None:
    pairs = zip(now["right"]["other"], before["right"]["other"], strict=True)
    new = [right for right, was_right in pairs if not was_right]
    return float(np.mean(new)) if new else None


def _lost_by_aspect(runs: Sequence[Numbers], plain: Sequence[Numbers], prompts: Sequence[str]) -> dict[str, Estimate]:
    found = {}
    for number, aspect in enumerate(ASPECTS):
        of = [
            (prompt, not now["right"]["own"][number])
            for now, before, prompt in zip(runs, plain, prompts, strict=True)
            if before["right"]["own"][number]
        ]
        if of:
            share = float(np.mean([lost for _, lost in of]))
            found[aspect] = wilson(share, len({prompt for prompt, _ in of}))
    return found


def wilson(share: float, n: int) -> Estimate:
    """A share of n independent cases with Wilson's interval."""
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def _rounded(value: Estimate) -> dict[str, float | None]:
    return {name: None if number is None else round(number, 4) for name, number in value._asdict().items()}


def as_table(rows: Sequence[AtlasRow]) -> list[dict[str, Any]]:
    """The rows as those of a .csv: intervals stand beside their means, empty where there are none."""
    aspects = [aspect for aspect in ASPECTS if any(aspect in row.lost_of for row in rows)]
    columns = [name for name in MEASURES if any(getattr(row, name) is not None for row in rows)]
    table = []
    for row in rows:
        values = {name: getattr(row, name) for name in columns}
        values |= {f"lost_{aspect}": row.lost_of.get(aspect) for aspect in aspects}
        cells: dict[str, Any] = {"block": row.block, **row.ablation._asdict()}
        cells |= {"control": int(row.ablation.control), "pictures": row.pictures, "identical": row.identical}
        for name, value in values.items():
            for end, number in zip(("", "_low", "_high"), value or (None, None, None), strict=True):
                cells[f"{name}{end}"] = None if number is None else round(number, 4)
        table.append(cells)
    return table


# ---- The picture


def draw_atlas(path: Path, blocks: Sequence[str], rows: Sequence[AtlasRow], title: str, subtitle: str) -> None:
    """Blocks down; across, one panel each: latent distance of every kind, of the controls, of skipping in each window,
    and, where the judge looked, what is lost when the block is skipped.
    """
    by_cell = {(row.block, row.ablation): row for row in rows}

    def distance(ablations: Sequence[Ablation]) -> list[list[float | None]]:
        return [[_mean_of(by_cell.get((block, one))) for one in ablations] for block in blocks]

    done = {row.ablation for row in rows}
    groups = {
        "latent distance, all steps": [Ablation(kind) for kind in KINDS],
        "random directions as far": [Ablation(kind, control=True) for kind in KINDS],
        "skip, in a third of the steps": [Ablation("skip", window) for window in WINDOW_NAMES if window != "all"],
    }
    panels = []
    for name, group in groups.items():
        if some := [one for one in group if one in done]:
            columns = [one.kind if one.window == "all" else one.window for one in some]
            panels.append(GridPanel(name, columns, distance(some), 0.0, 1.0))
    skipped = [by_cell.get((block, Ablation("skip"))) for block in blocks]
    if any(row is not None and row.lost_of for row in skipped):
        values = [
            [row.lost_of[a].mean if row is not None and a in row.lost_of else None for a in ASPECTS] for row in skipped
        ]
        panels.append(GridPanel("skip: share of pictures that lose", ASPECTS, values, 0.0, 1.0))
    number_grids(path, blocks, panels, title, subtitle=subtitle)


def _mean_of(row: AtlasRow | None) -> float | None:
    return None if row is None else row.latent.mean
