"""What is told while training: a table in a terminal, lines elsewhere, nothing from the other processes."""

import io

import pytest
from rich.console import Console

from flux_ir.api.training_run import TrainingRow
from flux_ir.commands import training_table
from flux_ir.commands.report import Report
from flux_ir.commands.training_table import TrainingTable

ROWS = {"single.6_topk_[red]": {"loss": 0.5, "fvu": 0.25, "l0": 16.0, "dead_share": None}}


def row(tokens, numbers=None):
    return TrainingRow("a run", tokens, 1000, numbers or {})


@pytest.fixture
def report():
    """A report that writes into a text."""

    def make(*, terminal):
        told = Report()
        told.notes = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
        return told

    return make


def test_the_table_has_a_row_of_numbers_for_each_autoencoder(report):
    told = report(terminal=True)
    with TrainingTable(told, quiet=False) as table:
        table.update(row(250, ROWS))
    text = told.notes.file.getvalue()
    assert "single.6_topk_[red]" in text
    assert all(cell in text for cell in ("FVU", "25.0%", "16", "-"))
    assert "250 of 1,000 tokens (25%)" in text


def test_elsewhere_a_line_comes_now_and_then(report, monkeypatch):
    told = report(terminal=False)
    monkeypatch.setattr(training_table, "LINE_SECONDS", 0.0)
    with TrainingTable(told, quiet=False) as table:
        table.update(row(100))  # nothing was measured yet
        table.update(row(250, ROWS))
    (line,) = told.notes.file.getvalue().splitlines()
    assert line.startswith("250 of 1,000 tokens (25%), ")
    assert line.endswith("single.6_topk_[red] loss 0.5 FVU 25.0% L0 16 dead -")


def test_the_other_processes_are_quiet(report, monkeypatch):
    monkeypatch.setattr(training_table, "LINE_SECONDS", 0.0)
    for terminal in (True, False):
        told = report(terminal=terminal)
        with TrainingTable(told, quiet=True) as table:
            table.update(row(250, ROWS))
        assert told.notes.file.getvalue() == ""


def test_the_speed_is_that_since_the_resume(report):
    table = TrainingTable(report(terminal=False), quiet=True)
    table.update(row(900))
    assert table.speed == 0
    assert "900 of 1,000 tokens (90%), 0 tokens/s, 0 s left" in table.progress()
