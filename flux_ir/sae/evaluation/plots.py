"""Figures of a training run and of an evaluation, as PNG files: the same numbers always give the same bytes.

One look for all: lines named at their ends, or in a legend where lines cross; colours that stay apart for every kind
of colour vision (Okabe & Ito, 2008), no frame, no more ink than the data need. The only place that imports matplotlib.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from flux_ir.files import complete_file
from flux_ir.sae.evaluation.metrics import Density

DPI = 200
INK, SOFT, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4A88", "#C98600", "#3A93C9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
UNEXPLAINED = "variance left unexplained (FVU)"
STREAM_COLOURS = {"img": BLUE, "txt": VERMILION}
STREAM_NAMES = {"img": "image tokens", "txt": "text tokens"}
MOST_NUMBERED = 10  # columns of a heat panel whose cells have room for numbers

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: every machine draws the same letters
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


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


class TradeoffPoint(NamedTuple):
    """One setting in the plane of two numbers that are better when lower, each with half of its interval, or 0."""

    family: str
    x: float
    y: float
    x_half: float = 0.0
    y_half: float = 0.0
    front: bool = True
    """No other point of the family beats it."""


class ScatterGroup(NamedTuple):
    """Points of one colour: [n, 2], x and y."""

    name: str
    points: NDArray[np.floating[Any]]


class GridPanel(NamedTuple):
    """One grid of numbers, [rows][columns], shaded from `low` to `high`; None is an empty cell."""

    title: str
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float


class BlockCurve(NamedTuple):
    """One reading of all blocks: [blocks][panels]."""

    name: str
    values: Sequence[Sequence[float]]


# ---- The figures


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
    with _figure(path, 2.9 * columns + 0.3, 2.05 * lines + 0.75, title, subtitle) as figure:
        most = max((points[-1][0] for _, points in shown), default=1.0)
        unit, name = (1e6, "million tokens") if most >= 1e6 else (1e3, "thousand tokens")
        for index, (panel, points) in enumerate(shown):
            axes = figure.add_subplot(lines, columns, index + 1)
            axes.plot(
                *_columns([(tokens / unit, value) for tokens, value in points]),
                color=BLUE,
                linewidth=1.2,
                clip_on=False,
            )
            _value_axis(axes, [value for _, value in points], panel.title, log=panel.log, percent=panel.percent)
            axes.set_xlim(0, most / unit)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            if index >= len(shown) - columns:
                axes.set_xlabel(name)


def density_histogram(path: Path, density: Density, title: str, *, subtitle: str = "") -> None:
    """How many features fire on which share of the tokens; the dead ones are counted in words."""
    edges, counts = density.log10_edges, density.features
    filled = [index for index, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, len(counts) - 1)
    alive = sum(counts)
    share = density.dead / max(1, alive + density.dead)
    dead = f"{density.dead:,} of {alive + density.dead:,} never fire ({_percent(float(f'{share:.2g}'))})"
    with _figure(path, 5.6, 3.5, title, subtitle) as figure:
        axes = figure.add_subplot()
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts, width=0.88 * width, align="edge", color=BLUE, linewidth=0)
        left, right = min(edges[first], -4.0), max(edges[last + 1], -1.0)
        axes.set_xlim(left, right)
        decades = [exponent for exponent in range(-7, 1) if left <= exponent <= right]
        axes.xaxis.set_major_locator(FixedLocator(decades))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(10.0**value)))
        axes.set_xlabel("share of tokens a feature fires on")
        _value_axis(axes, counts, "features")
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
    with _figure(path, 5.6, 3.5, title, subtitle) as figure:
        axes = figure.add_subplot()
        curves = [(name, SOFT, _finite(values)) for name, values in (anchors or {}).items()]
        curves += [(STREAM_NAMES.get(s, s), STREAM_COLOURS.get(s, BLUE), _finite(per_stream[s])) for s in per_stream]
        curves = [curve for curve in curves if curve[2]]
        for _, colour, points in curves:
            _line(axes, points, colour, thin=colour == SOFT)
        steps = sorted({step for _, _, points in curves for step, _ in points})
        shown = steps if len(steps) <= 12 else steps[:: -(-len(steps) // 10)]
        axes.xaxis.set_major_locator(FixedLocator(list(shown)))
        axes.set_xlabel("step (0: noise)")
        values = [value for _, _, points in curves for _, value in points]
        _value_axis(axes, values, UNEXPLAINED, percent=True)
        _name_ends(axes, [_End(*points[-1], name, colour) for name, colour, points in curves])


def pareto(
    path: Path, runs: Sequence[ParetoPoint], title: str, *, subtitle: str = "", anchors: Sequence[ParetoPoint] = ()
) -> None:
    """L0 against FVU: a line per family, from sparse to dense, the best filled; `anchors` (baselines) in grey."""
    shown, others = ([run for run in group if _drawable(run)] for group in (runs, anchors))
    best = pareto_front(shown)
    with _figure(path, 7.2, 4.0, title, subtitle) as figure:
        axes = figure.add_subplot()
        for index, family in enumerate(dict.fromkeys(run.family for run in shown)):
            members = [run for run in shown if run.family == family]
            points = sorted((run.l0, run.fvu) for run in members)
            _line(axes, points, COLOURS[index % len(COLOURS)], label=family)
            beaten = [(run.l0, run.fvu) for run in members if run not in best]
            axes.plot(*_columns(beaten), "o", markersize=3, color="white")
        for index, family in enumerate(dict.fromkeys(run.family for run in others)):
            points = sorted({(run.l0, run.fvu) for run in others if run.family == family})
            _line(axes, points, SOFT, thin=True, label=family, marker="osd^"[index % 4])
        _value_axis(axes, [run.fvu for run in (*shown, *others)], UNEXPLAINED, log=True, percent=True)
        axes.set_title("filled: beaten by no other", loc="right", fontsize=9, color=SOFT, pad=6)
        _count_axis(axes, [run.l0 for run in (*shown, *others)], "features that fire on a token (L0)")
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
    with _figure(path, 7.2, 4.2, title, subtitle) as figure:
        axes = figure.add_subplot()
        for index, family in enumerate(dict.fromkeys(point.family for point in points)):
            colour, marker = COLOURS[index % len(COLOURS)], "osD^v"[index % 5]
            own = sorted((point for point in points if point.family == family), key=lambda point: (point.x, -point.y))
            beaten = [(point.x, point.y) for point in own if not point.front]
            axes.plot(*_columns(beaten), marker, color=colour, markersize=2.5, alpha=0.4, markeredgewidth=0)
            best = [point for point in own if point.front]
            spread = [point for point in best if point.x_half or point.y_half]
            axes.errorbar(
                *_columns([(point.x, point.y) for point in spread]),
                xerr=[point.x_half for point in spread],
                yerr=[point.y_half for point in spread],
                fmt="none",
                ecolor=colour,
                elinewidth=0.7,
                alpha=0.45,
            )
            _line(axes, [(point.x, point.y) for point in best], colour, label=family, marker=marker)
        for point in anchors:
            axes.plot([point.x], [point.y], "x", color=INK, markersize=6, clip_on=False)
            axes.annotate(point.family, (point.x, point.y), xytext=(7, 4), textcoords="offset points", color=INK)
        every = [*points, *anchors]
        _value_axis(axes, [point.y for point in every], y)  # of points alone: few noises have wide intervals
        axes.set_xlabel(x)
        axes.set_xlim(0, 1.12 * max((point.x for point in every), default=1.0))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor="linecolor", fontsize=9)


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
    with _figure(path, 5.6, 4.6, title, subtitle) as figure:
        axes = figure.add_subplot()
        for index, group in enumerate(groups):
            colour = (FAINT, BLUE, VERMILION)[index] if len(groups) == 3 else (BLUE, SOFT)[index % 2]
            colour = "#b9b9b9" if colour == FAINT else colour
            count = f"{group.name} ({len(group.points):,})"
            axes.plot(*group.points.T, "o", color=colour, markersize=3, markeredgewidth=0, alpha=0.7, label=count)
        _value_axis(axes, [float(value) for group in groups for value in group.points[:, 1]], y, percent=shares)
        axes.set_xlabel(x)
        if shares:
            axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.7, zorder=0)
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1.02)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
        axes.legend(loc="best", frameon=False, fontsize=8, labelcolor="linecolor")


def number_grid(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
    *,
    subtitle: str = "",
    low: float,
    high: float,
) -> None:
    """Numbers in a grid, [rows][columns], darker from `low` to `high`; None is an empty cell."""
    with _figure(path, 2.6 + 0.62 * len(columns), 1.4 + 0.22 * len(rows), title, subtitle) as figure:
        _draw_grid(figure.subplots(), rows, GridPanel("", columns, values, low, high))


def number_grids(
    path: Path, rows: Sequence[str], panels: Sequence[GridPanel], title: str, *, subtitle: str = ""
) -> None:
    """Several grids of the same rows side by side, each with its own columns and scale."""
    widths = [len(panel.columns) for panel in panels]
    with _figure(path, 2.2 + 0.5 * sum(widths) + 0.3 * len(widths), 1.9 + 0.22 * len(rows), title, subtitle) as figure:
        every = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
        for place, (axes, panel) in enumerate(zip(every, panels, strict=True)):
            _draw_grid(axes, rows if place == 0 else [""] * len(rows), panel)
            axes.set_xlabel(panel.title, loc="left", fontsize=8)


def _draw_grid(axes: Axes, rows: Sequence[str], panel: GridPanel) -> None:
    values, low, high = panel.values, panel.low, panel.high
    shades = [[nan if value is None or not isfinite(value) else value for value in row] for row in values]
    axes.imshow(shades, cmap="Blues", vmin=low, vmax=high + 0.25 * (high - low), aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None and isfinite(value):
                dark = value > low + 0.8 * (high - low)
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else INK)
    axes.set_xticks(
        range(len(panel.columns)), panel.columns, rotation=40, ha="left", rotation_mode="anchor", fontsize=8
    )
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


class HeatPanel(NamedTuple):
    """One of several grids of the same rows and columns."""

    title: str
    values: Sequence[Sequence[float | None]]
    """[rows][columns]; None is an empty cell."""


def heat_panels(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Sequence[HeatPanel],
    title: str,
    *,
    subtitle: str = "",
    low: float,
    high: float,
) -> None:
    """Grids side by side, all darker from `low` to `high` [both above 0] by their logarithm, with one scale.

    Numbers stand in the cells where there is room for them. A cell of exactly 0 is white and says so.
    """
    numbered = len(columns) <= MOST_NUMBERED
    wide, tall = (0.44 if numbered else 0.14) * len(columns), (0.2 if len(rows) <= 20 else 0.13) * len(rows)
    left, gap, top, bottom, right = 0.9, 0.2, 0.95, 0.3, 0.7  # inches, as `wide` and `tall`
    width, height = left + (wide + gap) * len(panels) + right, top + tall + bottom
    with _figure(path, width, height, title, subtitle) as figure:
        figure.set_layout_engine("none")  # every place is known, and asking all texts for theirs takes seconds
        scale, every_so = LogNorm(low, high, clip=True), max(1, -(-len(columns) // 12))
        for number, panel in enumerate(panels):
            place = (left + number * (wide + gap)) / width, bottom / height, wide / width, tall / height
            axes = figure.add_axes(place)
            shades = np.array([[nan if value is None else value or nan for value in row] for row in panel.values])
            drawn = axes.imshow(shades, cmap="Blues", norm=scale, aspect="auto")
            for y, row in enumerate(panel.values):
                for x, value in enumerate(row):
                    if value is not None and isfinite(value) and (numbered or value == 0):
                        colour = "white" if value and scale(value) > 0.6 else INK
                        text = _two_digits(value) if numbered else "0"
                        axes.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
            axes.set_xticks(range(0, len(columns), every_so), columns[::every_so], fontsize=7)
            axes.set_yticks(range(len(rows)) if number == 0 else [], rows if number == 0 else [], fontsize=7)
            axes.set_title(panel.title, fontsize=8, color=INK)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        bar_at = figure.add_axes((1 - right / width, (bottom + 0.2 * tall) / height, 0.1 / width, 0.6 * tall / height))
        bar = figure.colorbar(drawn, cax=bar_at)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=2)


def _two_digits(value: float) -> str:
    """Two digits without what goes without saying: .12, 1.3, .0031, 2e-5; 0 for nothing at all."""
    if value == 0:
        return "0"
    if value < 0.001:
        digits, exponent = f"{value:.0e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{float(f'{value:.2g}'):g}".removeprefix("0")


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
    with _figure(path, 2.3 * columns + 2.1, 1.95 * lines + 0.8, title, subtitle) as figure:
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(lines, columns, index + 1)
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.set_xlim(-0.5, len(blocks) - 0.5)
            axes.grid(axis="y")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
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
            if index == columns - 1:
                axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)


def map_grid(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    maps: Sequence[Sequence[NDArray[np.floating[Any]]]],
    title: str,
    *,
    subtitle: str = "",
    marked: tuple[int, int],
) -> None:
    """Small maps in a grid, [rows][columns], each by its own largest value; below each the share of the squares that
    lies in the cell at `marked`, which has a frame.
    """
    height, width = maps[0][0].shape
    side = 0.62  # inches
    wide = max(1.3 + side * len(columns) * width / max(height, width), 5.6)
    with _figure(path, wide, 0.9 + (side + 0.17) * len(rows), title, subtitle) as figure:
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for y, of_row in enumerate(maps):
            for x, values in enumerate(of_row):
                axes = grid[y][x]
                axes.imshow(values, cmap="magma", vmin=0, vmax=max(float(values.max()), 1e-30))
                row, column = marked
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=SKY, linewidth=0.8))
                squares = np.square(values, dtype=np.float64)
                share = float(squares[row, column] / max(float(squares.sum()), 1e-300))
                axes.set_xlabel(f"{100 * share:.0f}%", fontsize=6.5, labelpad=1)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if y == 0:
                    axes.set_title(columns[x], fontsize=7.5, color=SOFT, loc="center", pad=3)
                if x == 0:
                    axes.set_ylabel(rows[y], fontsize=7.5, rotation=0, ha="right", va="center", labelpad=4)


# ---- How they are drawn


class _End(NamedTuple):
    """The last point of a line, where its name is written."""

    x: float
    y: float
    name: str
    colour: str


@contextmanager
def _figure(path: Path, width: float, height: float, title: str, subtitle: str) -> Iterator[Figure]:
    """A figure of so many inches, saved at the end: complete or not at all, and without the time or a version in it."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        # In inches from the edges, so that titles sit alike on figures of every size.
        heading = 0.62 if subtitle else 0.42
        layout: Any = figure.get_layout_engine()
        layout.set(rect=(0.01, 0.02, 0.97, 1 - heading / height - 0.02), w_pad=0.08, h_pad=0.08)
        figure.text(0.14 / width, 1 - 0.14 / height, title, fontsize=11, weight="bold", va="top").set_in_layout(False)
        figure.text(0.14 / width, 1 - 0.40 / height, subtitle, fontsize=9, color=SOFT, va="top").set_in_layout(False)
        yield figure
        with complete_file(path) as beside:
            figure.savefig(beside, format="png", metadata={"Software": None})


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(tokens, value) of every row that has a finite number under this key."""
    points = [(row.get("tokens"), row.get(key)) for row in rows]
    return [(float(x), float(y)) for x, y in points if x is not None and y is not None and isfinite(y)]


def _finite(values: Mapping[int, float]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in sorted(values.items()) if isfinite(value)]


def _drawable(run: ParetoPoint) -> bool:
    """A logarithmic axis has no place for zero."""
    return isfinite(run.l0) and isfinite(run.fvu) and run.l0 > 0 and run.fvu > 0


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _line(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    colour: str,
    *,
    thin: bool = False,
    label: str | None = None,
    marker: str = "o",
) -> None:
    (line,) = axes.plot(*_columns(points), color=colour, marker=marker, markersize=5, label=label)
    if thin:
        line.set(linestyle=(0, (4, 2)), linewidth=0.9, markersize=3.5)


def _value_axis(axes: Axes, values: Sequence[float], title: str, *, log: bool = False, percent: bool = False) -> None:
    """The vertical axis: its title on top, light lines to read by. Where it is not logarithmic it starts at zero."""
    axes.set_title(title, fontsize=9, color=SOFT, pad=6)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    positive = [value for value in values if value > 0]
    if log and positive:
        low, high = min(positive), max(positive)
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
        # Within a few decades there are too few powers of ten to read by.
        fine, coarse = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0)
        subs = fine if high / low < 8 else coarse if high / low < 500 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(min(0.0, *values, 0.0), 1.1 * max(values, default=0.0) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value) if percent else _short(value)))


def _count_axis(axes: Axes, values: Sequence[float], title: str) -> None:
    """A horizontal axis in doublings."""
    axes.set_xlabel(title)
    axes.set_xscale("log", base=2)
    if values:
        axes.set_xlim(min(values) / 1.3, max(values) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """Write each line's name behind its last point, in the line's colour; names that would touch are moved up."""
    figure = axes.get_figure()
    if not isinstance(figure, Figure):
        raise RuntimeError("these axes are on no figure")
    figure.draw_without_rendering()  # lays the figure out: only then is it known where points are
    line_px, reach_px, taken = 1.3 * 9 / 72 * DPI, 0.7 * DPI, list[tuple[float, float]]()
    at = [(*axes.transData.transform((end.x, end.y)).tolist(), end) for end in ends]
    lowest = float(axes.transAxes.transform((0, 0))[1]) + line_px / 2  # clear of the horizontal axis
    for x, y, end in sorted(at, key=lambda end: (end[1], end[0])):
        height = max(y, lowest)
        while any(abs(height - other_y) < line_px and abs(x - other_x) < reach_px for other_x, other_y in taken):
            height += 1
        taken.append((x, height))
        axes.annotate(
            end.name,
            (end.x, end.y),
            xytext=(9, (height - y) * 72 / DPI),
            textcoords="offset points",
            va="center_baseline",
            color=end.colour,
            annotation_clip=False,
        )


def _percent(share: float) -> str:
    """A share for people: 12%, 1.5%, 0.01%."""
    return f"{100 * share:.6g}%" if abs(share) >= 1e-8 or share == 0 else f"{_short(100 * share)}%"


def _short(value: float) -> str:
    """A number for people: 22,000, 0.15, 2·10⁻⁴."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e6 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    raised = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{float(mantissa):g}\N{MIDDLE DOT}10{raised}"
