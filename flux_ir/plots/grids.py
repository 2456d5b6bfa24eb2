"""Grids: of numbers, shaded by them, and of small maps."""

from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from flux_ir.plots.figure import INK, SKY, SOFT, figure_file

MOST_NUMBERED = 10  # columns of a heat panel whose cells have room for numbers


class GridPanel(NamedTuple):
    """One grid of numbers, [rows][columns], shaded from `low` to `high`; None is an empty cell."""

    title: str
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float


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
    with figure_file(path, 2.6 + 0.62 * len(columns), 1.4 + 0.22 * len(rows), title, subtitle) as figure:
        _draw_grid(figure.subplots(), rows, GridPanel("", columns, values, low, high))


def number_grids(
    path: Path, rows: Sequence[str], panels: Sequence[GridPanel], title: str, *, subtitle: str = ""
) -> None:
    """Several grids of the same rows side by side, each with its own columns and scale."""
    widths = [len(panel.columns) for panel in panels]
    with figure_file(
        path, 2.2 + 0.5 * sum(widths) + 0.3 * len(widths), 1.9 + 0.22 * len(rows), title, subtitle
    ) as figure:
        every = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
        for place, (axes, panel) in enumerate(zip(every, panels, strict=True)):
            _draw_grid(axes, rows if place == 0 else [""] * len(rows), panel)
            axes.set_xlabel(
                fill(panel.title, max(10, 8 * len(panel.columns)), break_long_words=False), loc="left", fontsize=8
            )


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
    with figure_file(path, width, height, title, subtitle) as figure:
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
    with figure_file(path, wide, 0.9 + (side + 0.17) * len(rows), title, subtitle) as figure:
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
