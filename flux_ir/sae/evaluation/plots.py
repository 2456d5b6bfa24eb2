"""Figures of a training run and of an evaluation, as PNG files."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from flux_ir.plots.figure import (
    BLUE,
    COLOURS,
    SOFT,
    STREAM_NAMES,
    VERMILION,
    LineEnd,
    columns_of,
    count_axis,
    figure_file,
    line,
    name_ends,
    percent_text,
    short_text,
    value_axis,
)
from flux_ir.sae.evaluation.metrics import Density

UNEXPLAINED = "variance left unexplained (FVU)"
STREAM_COLOURS = {"img": BLUE, "txt": VERMILION}


class CurvePanel(NamedTuple):
    """One curve of a training run: which number of a row, what it is called, and how its axis runs."""

    key: str
    title: str
    log: bool = False
    percent: bool = False


class ParetoPoint(NamedTuple):
    """One trained dictionary in the plane of L0 and FVU. Runs of one `family` are joined by a line."""

    family: str
    l0: float
    fvu: float


def training_curves(
    path: Path, rows: Sequence[Mapping[str, Any]], panels: Sequence[CurvePanel], title: str, *, subtitle: str = ""
) -> None:
    """Each panel's number over the tokens seen (`tokens` of each row).

    Panels that fewer than two rows have a number for are left out, and losses that are zero throughout.
    """
    shown = [(panel, _points(rows, panel.key)) for panel in panels]
    shown = [
        (panel, points) for panel, points in shown if len(points) > 1 and (panel.percent or any(y for _, y in points))
    ]
    columns = min(3, max(1, len(shown)))
    lines = -(-max(1, len(shown)) // columns)
    with figure_file(path, 2.9 * columns + 0.3, 2.05 * lines + 0.75, title, subtitle) as figure:
        most = max((points[-1][0] for _, points in shown), default=1.0)
        unit, name = (1e6, "million tokens") if most >= 1e6 else (1e3, "thousand tokens")
        for index, (panel, points) in enumerate(shown):
            axes = figure.add_subplot(lines, columns, index + 1)
            axes.plot(
                *columns_of([(tokens / unit, value) for tokens, value in points]),
                color=BLUE,
                linewidth=1.2,
                clip_on=False,
            )
            value_axis(axes, [value for _, value in points], panel.title, log=panel.log, percent=panel.percent)
            axes.set_xlim(0, most / unit)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_text(value)))
            if index >= len(shown) - columns:
                axes.set_xlabel(name)


def density_histogram(path: Path, density: Density, title: str, *, subtitle: str = "") -> None:
    """How many features fire on which share of the tokens; the dead ones are counted in words."""
    edges, counts = density.log10_edges, density.features
    filled = [index for index, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, len(counts) - 1)
    alive = sum(counts)
    share = density.dead / max(1, alive + density.dead)
    dead = f"{density.dead:,} of {alive + density.dead:,} never fire ({percent_text(float(f'{share:.2g}'))})"
    with figure_file(path, 5.6, 3.5, title, subtitle) as figure:
        axes = figure.add_subplot()
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts, width=0.88 * width, align="edge", color=BLUE, linewidth=0)
        left, right = min(edges[first], -4.0), max(edges[last + 1], -1.0)
        axes.set_xlim(left, right)
        decades = [exponent for exponent in range(-7, 1) if left <= exponent <= right]
        axes.xaxis.set_major_locator(FixedLocator(decades))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(10.0**value)))
        axes.set_xlabel("share of tokens a feature fires on")
        value_axis(axes, counts, "features")
        axes.set_title(dead, loc="right", fontsize=9, color=SOFT, pad=6)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def fvu_per_step(
    path: Path,
    per_stream: Mapping[str, Mapping[int, float]],
    title: str,
    *,
    subtitle: str = "",
    anchors: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """FVU at every step, a curve per stream; `anchors` are those of baselines, drawn thin and grey."""
    with figure_file(path, 5.6, 3.5, title, subtitle) as figure:
        axes = figure.add_subplot()
        curves = [(name, SOFT, _finite(values)) for name, values in (anchors or {}).items()]
        curves += [(STREAM_NAMES.get(s, s), STREAM_COLOURS.get(s, BLUE), _finite(per_stream[s])) for s in per_stream]
        curves = [curve for curve in curves if curve[2]]
        for _, colour, points in curves:
            line(axes, points, colour, thin=colour == SOFT)
        steps = sorted({step for _, _, points in curves for step, _ in points})
        shown = steps if len(steps) <= 12 else steps[:: -(-len(steps) // 10)]
        axes.xaxis.set_major_locator(FixedLocator(list(shown)))
        axes.set_xlabel("step (0: noise)")
        values = [value for _, _, points in curves for _, value in points]
        value_axis(axes, values, UNEXPLAINED, percent=True)
        name_ends(axes, [LineEnd(*points[-1], name, colour) for name, colour, points in curves])


def pareto(
    path: Path, runs: Sequence[ParetoPoint], title: str, *, subtitle: str = "", anchors: Sequence[ParetoPoint] = ()
) -> None:
    """L0 against FVU: a line per family, from sparse to dense, the best filled; `anchors` (baselines) in grey."""
    shown, others = ([run for run in group if _drawable(run)] for group in (runs, anchors))
    best = pareto_front(shown)
    with figure_file(path, 7.2, 4.0, title, subtitle) as figure:
        axes = figure.add_subplot()
        for index, family in enumerate(dict.fromkeys(run.family for run in shown)):
            members = [run for run in shown if run.family == family]
            points = sorted((run.l0, run.fvu) for run in members)
            line(axes, points, COLOURS[index % len(COLOURS)], label=family)
            beaten = [(run.l0, run.fvu) for run in members if run not in best]
            axes.plot(*columns_of(beaten), "o", markersize=3, color="white")
        for index, family in enumerate(dict.fromkeys(run.family for run in others)):
            points = sorted({(run.l0, run.fvu) for run in others if run.family == family})
            line(axes, points, SOFT, thin=True, label=family, marker="osd^"[index % 4])
        value_axis(axes, [run.fvu for run in (*shown, *others)], UNEXPLAINED, log=True, percent=True)
        axes.set_title("filled: beaten by no other", loc="right", fontsize=9, color=SOFT, pad=6)
        count_axis(axes, [run.l0 for run in (*shown, *others)], "features that fire on a token (L0)")
        # Lines of several points each cross: names at their ends would hide points.
        if shown or others:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor="linecolor", fontsize=9)


def pareto_front(runs: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """The runs that no other beats in L0 or FVU without losing in the other, from sparse to dense."""
    front: list[ParetoPoint] = []
    for run in sorted(runs, key=lambda run: (run.l0, run.fvu)):
        if not front or run.fvu < front[-1].fvu:
            front.append(run)
    return front


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(tokens, value) of every row that has a finite number under this key."""
    points = [(row.get("tokens"), row.get(key)) for row in rows]
    return [(float(x), float(y)) for x, y in points if x is not None and y is not None and isfinite(y)]


def _finite(values: Mapping[int, float]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in sorted(values.items()) if isfinite(value)]


def _drawable(run: ParetoPoint) -> bool:
    """A logarithmic axis has no place for zero."""
    return isfinite(run.l0) and isfinite(run.fvu) and run.l0 > 0 and run.fvu > 0
