"""What a command tells while it works and when it is done: progress on stderr, one table of results on stdout."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flux_ir.api.progress import Begun, Note
from flux_ir.api.progress import Progress as StageProgress
from flux_ir.errors import in_units

T = TypeVar("T")


class Report:
    """Times phases, draws their progress, and prints the closing table.

    `watch` is what work that reports its progress calls. Within `with`, no bar stays behind, whatever raises.
    """

    def __init__(self) -> None:
        # Lines are never broken here: a path or an id must survive being copied, and being piped into a file.
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)
        self.results = Console(highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        self._begun = 0.0
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *unused: object) -> None:
        self._end_bar()

    def watch(self, event: StageProgress | Note | Begun) -> None:
        """Draws a stage of more than one part as a bar, adds up the seconds of all stages, and prints notes."""
        if isinstance(event, Note):
            self.note(event.text)
            return
        if isinstance(event, Begun):
            self.results.print(f"generation id: {event.generation_id}")
            return
        if event.done == 0:
            self._end_bar()
            self._begun = time.perf_counter()
            if event.total > 1:
                bar = self._progress()
                bar.start()
                self._bar = bar, bar.add_task(event.stage, total=event.total)
        elif self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=event.done)
        if event.done == event.total:
            self.seconds[event.stage] = self.seconds.get(event.stage, 0.0) + time.perf_counter() - self._begun
            self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, TimeRemainingColumn(), console=self.notes)

    def note(self, text: str) -> None:
        """One line for the person watching, on stderr. Never interpreted as markup: prompts may hold brackets."""
        self.notes.print(Text(text))

    def table(self, title: str, written: dict[str, Path], memory: dict[str, int]) -> None:
        """Seconds per phase, peak memory [bytes] per device, and every path with the bytes that lie there."""
        seconds = self.seconds | {"in all": sum(self.seconds.values())}
        rows = [(name, f"{value:.2f} s", "") for name, value in seconds.items()]
        rows += [(f"peak memory, {device}", in_units(size), "") for device, size in memory.items()]
        rows += [(name, in_units(bytes_at(path)), str(path)) for name, path in written.items()]
        self.rows(title, rows)

    def rows(self, title: str, rows: Sequence[tuple[str, str, str]]) -> None:
        """A name, an amount and a note in every row, below a title."""
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        self.results.print(Text(title, style="bold"))
        for name, amount, note in rows:
            self.results.print(Text(f"{name:<{widths[0]}}  {amount:>{widths[1]}}  {note}".rstrip()))


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns with two spaces between: the first to the left, the others to the right."""
    columns = []
    for place, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if place else cell.ljust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def bytes_at(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [below for below in path.rglob("*") if below.is_file()]
    return sum(file.stat().st_size for file in files)


def peak_memory() -> dict[str, int]:
    """The largest memory of this process so far [bytes]: resident on the host, allocated on every GPU it used."""
    import torch

    gpus = range(torch.cuda.device_count())
    peaks = {f"cuda:{gpu}": torch.cuda.max_memory_allocated(gpu) for gpu in gpus}
    return host_memory() | {device: peak for device, peak in peaks.items() if peak}


def host_memory() -> dict[str, int]:
    """`peak_memory` of the host alone; empty where the system does not tell it (Windows)."""
    peak = peak_host_bytes()
    return {} if peak is None else {"host": peak}


def peak_host_bytes() -> int | None:
    """The largest resident memory of this process so far; None where the system does not tell it."""
    status = Path("/proc/self/status")  # Linux; getrusage there starts a new program at the peak of its parent
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)):
        return int(found[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
