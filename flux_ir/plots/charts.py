"""Charts that several rooms draw: errors over blocks, what is reached against what it costs, and points."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from flux_ir.plots.figure import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    SOFT,
    VERMILION,
    columns_of,
    figure_file,
    line,
    percent_text,
    short_text,
    value_axis,
)


class BlockCurve(NamedTuple):
    """One reading of all blocks: [blocks][panels]."""

    name: str
    values: Sequence[Sequence[float]]


def curves_by_block(
    path: Path,
    blocks: Sequence[str],
    panels: Sequence[str],
    curves: Sequence[BlockCurve],
    title: str,
    *,
    subtitle: str = "",
    levels: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Errors over blocks, a panel for each step, on a logarithmic axis, where 0 has no place: a line ends before it.

    `levels` are errors by panel that do not depend on the block, drawn as dashed lines.
    """
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    positive = [value for curve in curves for row in curve.values for value in row if isfinite(value) and value > 0]
    positive += [value for values in (levels or {}).values() for value in values if value > 0]
    low, high = 0.7 * min(positive, default=0.1), 1.4 * max(positive, default=1.0)
    singles = next((number for number, block in enumerate(blocks) if block.startswith("single")), 0)
    with figure_file(path, 2.3 * columns + 2.1, 1.95 * lines + 0.8, title, subtitle) as figure:
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, index + 1)
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.set_xlim(-0.5, len(blocks) - 0.5)
            axes.grid(axis="y")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_text(value)))
            axes.set_title(panel, fontsize=9, color=SOFT, pad=4)
            if singles:
                axes.axvline(singles - 0.5, color=FAINT, linewidth=0.9, zorder=0)
            for number, (name, values) in enumerate((levels or {}).items()):
                style = ((0, (5, 2)), (0, (1, 1.5)))[number % 2]
                axes.axhline(values[index], color=SOFT, linewidth=1.0, linestyle=style, label=name)
            for number, curve in enumerate(curves):
                heights = [row[index] if row[index] > 0 else nan for row in curve.values]
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(heights, color=colour, marker="o", markersize=2.5, linewidth=1.3, label=curve.name)
            every = max(1, len(blocks) // 12)
            shown = range(0, len(blocks), every)
            axes.set_xticks(shown, [blocks[number].split(".")[1] for number in shown], fontsize=7)
            if index % columns:
                axes.tick_params(labelleft=False)
            if index >= len(panels) - columns:
                axes.set_xlabel("block: double, then single" if singles else "block")
            if index == columns - 1 and (curves or levels):
                axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)


class TradeoffPoint(NamedTuple):
    """One setting in the plane of two numbers that are better when lower, each with half of its interval, or 0."""

    family: str
    x: float
    y: float
    x_half: float = 0.0
    y_half: float = 0.0
    front: bool = True
    """No other point of the family beats it."""


def tradeoff(
    path: Path,
    points: Sequence[TradeoffPoint],
    title: str,
    *,
    x: str,
    y: str,
    subtitle: str = "",
    anchors: Sequence[TradeoffPoint] = (),
) -> None:
    """The fronts of several families as lines, with intervals; beaten points small; `anchors` by name, in black."""
    with figure_file(path, 7.2, 4.2, title, subtitle) as figure:
        axes = figure.add_subplot()
        for index, family in enumerate(dict.fromkeys(point.family for point in points)):
            colour, marker = COLOURS[index % len(COLOURS)], "osD^v"[index % 5]
            own = sorted((point for point in points if point.family == family), key=lambda point: (point.x, -point.y))
            beaten = [(point.x, point.y) for point in own if not point.front]
            axes.plot(*columns_of(beaten), marker, color=colour, markersize=2.5, alpha=0.4, markeredgewidth=0)
            best = [point for point in own if point.front]
            spread = [point for point in best if point.x_half or point.y_half]
            axes.errorbar(
                *columns_of([(point.x, point.y) for point in spread]),
                xerr=[point.x_half for point in spread],
                yerr=[point.y_half for point in spread],
                fmt="none",
                ecolor=colour,
                elinewidth=0.7,
                alpha=0.45,
            )
            line(axes, [(point.x, point.y) for point in best], colour, label=family, marker=marker)
        for point in anchors:
            axes.plot([point.x], [point.y], "x", color=INK, markersize=6, clip_on=False)
            axes.annotate(point.family, (point.x, point.y), xytext=(7, 4), textcoords="offset points", color=INK)
        every = [*points, *anchors]
        value_axis(axes, [point.y for point in every], y)  # of points alone: few noises have wide intervals
        axes.set_xlabel(x)
        axes.set_xlim(0, 1.12 * max((point.x for point in every), default=1.0))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor="linecolor", fontsize=9)


class ScatterGroup(NamedTuple):
    """Points of one colour: [n, 2], x and y."""

    name: str
    points: NDArray[np.floating[Any]]


def scatter(
    path: Path,
    groups: Sequence[ScatterGroup],
    title: str,
    *,
    x: str,
    y: str,
    subtitle: str = "",
    shares: bool = False,
) -> None:
    """A point for each feature, the first groups below the others. `shares` are drawn in percent, with the diagonal."""
    with figure_file(path, 5.6, 4.6, title, subtitle) as figure:
        axes = figure.add_subplot()
        for index, group in enumerate(groups):
            colour = (FAINT, BLUE, VERMILION)[index] if len(groups) == 3 else (BLUE, SOFT)[index % 2]
            colour = "#b9b9b9" if colour == FAINT else colour
            count = f"{group.name} ({len(group.points):,})"
            axes.plot(*group.points.T, "o", color=colour, markersize=3, markeredgewidth=0, alpha=0.7, label=count)
        value_axis(axes, [float(value) for group in groups for value in group.points[:, 1]], y, percent=shares)
        axes.set_xlabel(x)
        if shares:
            axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.7, zorder=0)
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1.02)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(value)))
        axes.legend(loc="best", frameon=False, fontsize=8, labelcolor="linecolor")
