"""Figures: there for odd data too, the same bytes for the same numbers, with the words they must show."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ir.sae.evaluation.metrics import density_of
from flux_ir.sae.evaluation.plots import (
    CurvePanel,
    ParetoPoint,
    density_histogram,
    fvu_per_step,
    pareto,
    pareto_front,
    training_curves,
)

PANELS = (
    CurvePanel("fvu", "FVU", percent=True),
    CurvePanel("loss", "loss", log=True),
    CurvePanel("nothing", "nothing"),
)
ROWS = [{"tokens": 1000 * i, "fvu": 1 / (i + 1), "loss": 2.0**-i} for i in range(20)]
DENSITY = density_of(torch.logspace(-4, 0, 50, dtype=torch.float64))
PER_STREAM = {"img": {0: 0.3, 3: 0.2, 7: 0.25}, "txt": {0: 0.1, 3: 0.05, 7: math.nan}}
RUNS = [
    ParetoPoint("topk", 8, 0.3),
    ParetoPoint("topk", 16, 0.2),
    ParetoPoint("l1", 20, 0.25),
    ParetoPoint("broken", 0.0, math.nan),
]


def drawn(path):
    """The picture's size [px] and the share of it that is not white."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.shape[1::-1], (pixels < 250).any(-1).mean()


FIGURES = {
    "curves": lambda path: training_curves(path, ROWS, PANELS, "Training", subtitle="a run"),
    "density": lambda path: density_histogram(path, DENSITY, "Density", subtitle="a run"),
    "fvu": lambda path: fvu_per_step(path, PER_STREAM, "FVU", anchors={"PCA": {0: 0.5, 3: 0.5, 7: 0.4}}),
    "pareto": lambda path: pareto(
        path, RUNS, "Front", anchors=[ParetoPoint("PCA", 8, 0.5), ParetoPoint("PCA", 16, 0.4)]
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_numbers_give_the_same_bytes(tmp_path, name):
    for file in ("one.png", "two.png"):
        FIGURES[name](tmp_path / file)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    size, ink = drawn(tmp_path / "one.png")
    assert min(size) > 400
    assert 0.005 < ink < 0.5
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.png", "two.png"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: training_curves(path, [], PANELS, "Training"),
        lambda path: training_curves(path, [{"tokens": 0, "fvu": 0.0}, {"tokens": 9, "fvu": 0.0}], PANELS, "Training"),
        lambda path: density_histogram(path, density_of(torch.zeros(5, dtype=torch.float64)), "all dead"),
        lambda path: fvu_per_step(path, {"img": {4: 0.5}}, "one step"),
        lambda path: fvu_per_step(path, {"img": {4: math.nan}}, "no number"),
        lambda path: pareto(path, [ParetoPoint("topk", 8, 0.3)], "one run"),
        lambda path: pareto(path, [ParetoPoint("topk", 0.0, math.nan)], "no run"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_odd_data_are_drawn_without_a_complaint(tmp_path, draw):
    draw(tmp_path / "odd.png")
    assert drawn(tmp_path / "odd.png")[1] > 0


def test_a_panel_nobody_has_numbers_for_is_left_out(tmp_path):
    training_curves(tmp_path / "with.png", ROWS, PANELS, "Training")
    training_curves(tmp_path / "without.png", ROWS, PANELS[:2], "Training")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_the_front_has_the_runs_that_no_other_beats():
    a, b, c = ParetoPoint("f", 8, 0.3), ParetoPoint("f", 16, 0.2), ParetoPoint("g", 32, 0.1)
    assert pareto_front(
        [c, ParetoPoint("g", 9, 0.31), b, ParetoPoint("g", 16, 0.25), a, ParetoPoint("g", 40, 0.1)]
    ) == [a, b, c]
    assert pareto_front([]) == []
