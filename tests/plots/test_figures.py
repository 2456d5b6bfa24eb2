"""Charts and grids of all rooms: the same bytes for the same numbers, odd data drawn, numbers written for people."""

import math

import numpy as np
import pytest
from PIL import Image

from flux_ir.plots.charts import BlockCurve, ScatterGroup, TradeoffPoint, curves_by_block, scatter, tradeoff
from flux_ir.plots.figure import percent_text, short_text
from flux_ir.plots.grids import GridPanel, HeatPanel, heat_panels, map_grid, number_grid, number_grids

VALUES = [[0.5, None, 1.0], [math.nan, 0.75, 2.0], [0.6, 0.0, None]]
ROWS, COLUMNS = ["red", "blue", "green"], ["one", "two", "three"]
BLOCKS = ["double.0", "double.1", "single.0"]

FIGURES = {
    "grid": lambda path: number_grid(path, ROWS, COLUMNS, VALUES, "Grid", low=0.5, high=1.0),
    "grids": lambda path: number_grids(path, ROWS, [GridPanel("a", COLUMNS, VALUES, 0, 1)] * 2, "Grids"),
    "heat": lambda path: heat_panels(path, ROWS, COLUMNS, [HeatPanel("img", VALUES)], "Heat", low=0.01, high=1.0),
    "maps": lambda path: map_grid(path, ["a"], ["b", "c"], [[np.eye(3), np.zeros((3, 3))]], "Maps", marked=(1, 1)),
    "blocks": lambda path: curves_by_block(
        path, BLOCKS, ["step 0"], [BlockCurve("plain", [[0.5], [0.2], [0.0]])], "Curves", levels={"mean": [1.0]}
    ),
    "nothing by block": lambda path: curves_by_block(path, BLOCKS, ["step 0"], [], "Curves"),
    "tradeoff": lambda path: tradeoff(
        path, [TradeoffPoint("a", 0.1, 0.5, 0.02), TradeoffPoint("a", 0.2, 0.6, front=False)], "Cost", x="x", y="y"
    ),
    "points": lambda path: scatter(path, [ScatterGroup("all", np.eye(2))], "Points", x="x", y="y", shares=True),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_numbers_give_the_same_bytes(tmp_path, name):
    for file in ("one.png", "two.png"):
        FIGURES[name](tmp_path / file)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert 0.005 < (pixels < 250).any(-1).mean() < 0.6
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.png", "two.png"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (15, "15"), (22_000, "22,000"), (0.15, "0.15"), (2e-4, "2\N{MIDDLE DOT}10⁻⁴"), (3e7, "30,000,000")],
)
def test_numbers_are_written_for_people(value, text):
    assert short_text(value) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (1, "100%"), (0.015, "1.5%"), (1e-4, "0.01%")])
def test_shares_are_written_as_percent(share, text):
    assert percent_text(share) == text
