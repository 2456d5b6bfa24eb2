"""The one look of every figure, and what it is made of: the same numbers always give the same bytes.

Lines are named at their ends, or in a legend where lines cross; colours stay apart for every kind of colour vision
(Okabe & Ito, 2008); no frame, no more ink than the data need.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flux_ir.files import complete_file

DPI = 200
INK, SOFT, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4A88", "#C98600", "#3A93C9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
STREAM_NAMES = {"img": "image tokens", "txt": "text tokens"}

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


class LineEnd(NamedTuple):
    """The last point of a line, where its name is written."""

    x: float
    y: float
    name: str
    colour: str


@contextmanager
def figure_file(path: Path, width: float, height: float, title: str, subtitle: str) -> Iterator[Figure]:
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


def columns_of(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """All x and all y of points."""
    return [x for x, _ in points], [y for _, y in points]


def line(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    colour: str,
    *,
    thin: bool = False,
    label: str | None = None,
    marker: str = "o",
) -> None:
    """Points joined by a line; a thin one is dashed and stands behind what matters."""
    (drawn,) = axes.plot(*columns_of(points), color=colour, marker=marker, markersize=5, label=label)
    if thin:
        drawn.set(linestyle=(0, (4, 2)), linewidth=0.9, markersize=3.5)


def value_axis(axes: Axes, values: Sequence[float], title: str, *, log: bool = False, percent: bool = False) -> None:
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
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: percent_text(value) if percent else short_text(value))
    )


def count_axis(axes: Axes, values: Sequence[float], title: str) -> None:
    """A horizontal axis in doublings."""
    axes.set_xlabel(title)
    axes.set_xscale("log", base=2)
    if values:
        axes.set_xlim(min(values) / 1.3, max(values) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def name_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
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


def percent_text(share: float) -> str:
    """A share for people: 12%, 1.5%, 0.01%."""
    return f"{100 * share:.6g}%" if abs(share) >= 1e-8 or share == 0 else f"{short_text(100 * share)}%"


def short_text(value: float) -> str:
    """A number for people: 22,000, 0.15, 2·10⁻⁴."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e6 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    raised = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{float(mantissa):g}\N{MIDDLE DOT}10{raised}"
