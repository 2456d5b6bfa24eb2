"""What every benchmark shares: interleaved timing, targets, tables in Markdown, and the machine in words."""

import argparse
import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch

CPUINFO = Path("/proc/cpuinfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class Target(NamedTuple):
    """What a figure must reach."""

    at: Literal["most", "least"]
    value: float

    def verdict(self, figure: float) -> str:
        """The target in words, and whether `figure` meets it. No figure is rounded in its favour."""
        met = figure <= self.value if self.at == "most" else figure >= self.value
        return f"at {self.at} {self.value:g}: {'met' if met else 'MISSED'}"


def arguments(description: str, *, repetitions: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that most benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    if repetitions:
        parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each way (default 5)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked: full-size networks need a GPU."""
    options = parser.parse_args()
    if getattr(options, "repetitions", 1) < 1:
        parser.error("--repetitions must be at least 1")
    if getattr(options, "full", False) and torch.device(options.device).type != "cuda":
        parser.error("--full builds a network of 12 billion weights on the device: it needs --device cuda")
    return options


def keep_freed_memory() -> None:
    """Freed memory stays with this process from now on (glibc; elsewhere nothing happens).

    Otherwise the allocator gives it back and takes it again at moments that depend on everything that ran before: two
    equal forwards differ by up to 80,000 page faults, 3 % of their time, and that would be what is measured.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def synchronize(device: torch.device | str) -> None:
    """Waits until a GPU has done all that it was given; nothing to wait for on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of wall clock from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    device: torch.device | str = "cpu",
    warm_up: int = 1,
) -> dict[str, float]:
    """Median seconds of each way of doing the same thing, timed in turns (A B, B A, ...).

    A machine that is busy for a while is so for all of them, and none always finds the memory as another left it. The
    first `warm_up` rounds do not count.
    """
    names = list(ways)
    orders = [names if number % 2 == 0 else names[::-1] for number in range(warm_up + repetitions)]
    rounds = [{name: seconds_of(ways[name], device) for name in order} for order in orders]
    return {name: median(one[name] for one in rounds[warm_up:]) for name in ways}


def machine(device: torch.device | str = "cpu") -> str:
    """What a figure depends on besides the code: date, processor, threads, versions, and how busy the machine was."""
    load = ", ".join(f"{part:.2f}" for part in os.getloadavg())
    lines = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
        "load average": f"{load} (1, 5 and 15 minutes)",
    }
    if torch.device(device).type == "cuda":
        lines["GPU"] = torch.cuda.get_device_name(device)
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _processor() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_report(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], about: str) -> None:
    """A Markdown section, as it can be pasted into RESULTS.md: heading, machine, table."""
    print(f"\n## {title}\n\n{about}\n")
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
