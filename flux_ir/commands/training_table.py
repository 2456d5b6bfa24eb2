"""How far a training is: a live table in a terminal, a line now and then where stderr goes to a file."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flux_ir.api.training_run import TrainingRow
from flux_ir.commands.report import Report

LINE_SECONDS = 15.0
COLUMNS = {"loss": "loss", "fvu": "FVU", "l0": "L0", "dead_share": "dead"}


class TrainingTable:
    """Draws the latest numbers of every autoencoder. Only what was read anyway: it never waits for the device."""

    def __init__(self, report: Report, *, quiet: bool) -> None:
        """`quiet`: nothing is drawn or written, as on all processes but the first."""
        self.report, self.quiet = report, quiet
        self.run, self.total_tokens, self.tokens, self.first_tokens = "", 0, 0, 0
        self.rows: Mapping[str, Mapping[str, Any]] = {}
        self.began = self.last_line = time.monotonic()
        self.is_live = report.notes.is_terminal and not quiet
        self.live: Live | None = None

    def __enter__(self) -> "TrainingTable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def update(self, row: TrainingRow) -> None:
        """Takes in what a training tells. The first row of a run says where it begins."""
        now = time.monotonic()
        if row.run != self.run:
            self._stop()
            self.run, self.total_tokens, self.first_tokens = row.run, row.total_tokens, row.tokens
            self.rows, self.began, self.last_line = {}, now, now
            if self.is_live and not row.finished:
                self.live = Live(console=self.report.notes, refresh_per_second=2, get_renderable=self.render)
                self.live.start()
        self.tokens = row.tokens
        self.rows = row.numbers or self.rows
        if row.finished or row.stopped:
            self._stop()
        elif self.live is None and not self.quiet and self.rows and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            self.report.note(f"{self.progress()}; {self.numbers()}")

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    @property
    def speed(self) -> float:
        """Tokens per second since the start, or since the resume."""
        return (self.tokens - self.first_tokens) / max(time.monotonic() - self.began, 1e-9)

    def progress(self) -> str:
        """Tokens, speed, time left."""
        left = (self.total_tokens - self.tokens) / self.speed if self.speed else 0.0
        return (
            f"{self.tokens:,} of {self.total_tokens:,} tokens ({self.tokens / self.total_tokens:.0%}), "
            f"{self.speed:,.0f} tokens/s, {_duration(left)} left"
        )

    def numbers(self) -> str:
        """The latest numbers in a line."""
        return "; ".join(f"{name} {cells}" for name, cells in self._cells().items())

    def render(self) -> Group:
        """What is drawn in a terminal."""
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for title in COLUMNS.values():
            table.add_column(title, justify="right")
        for name, row in self.rows.items():
            table.add_row(Text(name), *(_number(key, row.get(key)) for key in COLUMNS))
        return Group(table, Text(self.progress()))

    def _cells(self) -> dict[str, str]:
        return {
            name: " ".join(f"{title} {_number(key, row.get(key))}" for key, title in COLUMNS.items())
            for name, row in self.rows.items()
        }


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key in ("fvu", "dead_share") else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
