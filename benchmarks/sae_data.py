"""Loading tokens to train on: bytes per second of shuffled batches against a sequential read of the same files.

- cold, past: the files are dropped from the page cache before each pass, and the loader reads past it, as it does with
  a collection larger than half of the memory.
- cold, into: the same, but what is read is left in the page cache, as with a smaller collection.
- warm: the files are in the page cache, as for a small collection that is read again. Nothing is read from a disk, so
  this compares how often bytes pass through memory. The sequential read overwrites one buffer, which stays in the cache
  of the processor. A shuffled batch is read, checked for NaN, written to its slots of the pool and gathered from there.

Two other ways stand beside them. Into memory: all of each file is read into memory of its own; whoever uses the bytes
pays for that at least. Least shuffle: two threads do nothing but read, look for NaN and write each token to a random
place, once. They know nothing of formats, filters, sites or an order that can be resumed, and their tokens are not yet
in batches: a loader does all of this and more.

Bytes of batches are those of tokens; a sequential read counts all of the file, with the sampler's state and the
directory. CPU seconds say what it costs where the machine is busy with other things.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from measure import Target, arguments, machine, parse, print_report, seconds_of

from flux_ir.activations.tokens import open_source
from flux_ir.activations.whole import write_capture
from flux_ir.models.transformer import FluxParams
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.recorder import StepContext
from flux_ir.sae.data import TokenBatches, choose_sites
from flux_ir.sae.pool import Pool
from flux_ir.sites import Site

TARGET = Target("least", 0.7)
READ_BYTES = 8 * 2**20


class State(NamedTuple):
    """What the page cache has before each pass, and whether the loader is to leave there what it reads."""

    name: str
    cached: bool
    again: bool


STATES = (State("cold, past", False, False), State("cold, into", False, True), State("warm", True, True))


class Case(NamedTuple):
    """A set of captures, and how they are loaded."""

    name: str
    d: int
    img_tokens: int
    generations: int
    steps: int
    sites: int
    batch_tokens: int
    pool_share: float
    """The pool, as a share of the data."""


def main() -> None:
    """Print the table."""
    parser = arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, help="where the captures are written (default: a temporary folder)")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of each set of captures (default 1000)")
    options = parse(parser)
    rows = [row for case in cases(options.megabytes) for row in rows_of(case, options)]
    columns = ["captures", "data", "files", "page cache", "sequential read", "loader", "ratio", "target"]
    columns += ["into memory", "least shuffle", "its ratio", "CPU s/GB, read and loader"]
    about = machine(options.device)
    print_report("SAE data: bytes per second", columns, rows, about)


def cases(megabytes: int) -> list[Case]:
    """Large captures of one site and of four, and the many small ones of flux-tiny."""
    total = megabytes * 10**6
    return [
        Case("d 3072, 1,024 tokens, 1 site", 3072, 1024, max(total // (4 * 1024 * 3072 * 2), 1), 4, 1, 4096, 0.25),
        Case("d 3072, 1,024 tokens, 4 sites", 3072, 1024, max(total // (16 * 1024 * 3072 * 2), 1), 4, 4, 2048, 0.25),
        Case("d 256, 256 tokens, 1 site", 256, 256, max(total // (2 * 256 * 256 * 2), 1), 2, 1, 8192, 0.25),
    ]


def rows_of(case: Case, options: argparse.Namespace) -> list[list[str]]:
    """One set of captures, read in all ways in turns: cold, then warm."""
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        files = write_captures(case, Path(folder))
        return [row(case, state, files, options) for state in STATES]


def row(case: Case, state: State, files: list[Path], options: argparse.Namespace) -> list[str]:
    """The median rates of all ways, and the least CPU time."""
    with batches_of(case, state, files[0].parent, options) as batches:
        ways: dict[str, Callable[[], int]] = {
            "sequential": lambda: read_sequentially(files),
            "memory": lambda: read_into_memory(files),
            "least": LeastShuffle(case, files).read,
            "loader": lambda: one_epoch(batches),
        }
        rates, cpu = measured(ways, warm_up if state.cached else drop_from_cache, files, options)
    rate = {name: median(found) for name, found in rates.items()}
    return [
        case.name,
        f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB",
        str(len(files)),
        state.name,
        f"{rate['sequential'] / 1e9:.2f} GB/s",
        f"{rate['loader'] / 1e9:.2f} GB/s",
        f"{rate['loader'] / rate['sequential']:.2f}",
        TARGET.verdict(rate["loader"] / rate["sequential"]),
        f"{rate['memory'] / 1e9:.2f} GB/s",
        f"{rate['least'] / 1e9:.2f} GB/s",
        f"{rate['least'] / rate['sequential']:.2f}",
        f"{cpu['sequential']:.2f} -> {cpu['loader']:.2f}",
    ]


def measured(
    ways: dict[str, Callable[[], int]],
    prepare: Callable[[list[Path]], None],
    files: list[Path],
    options: argparse.Namespace,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Bytes per second of each repetition but the first, and the least CPU seconds per GB."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu = dict.fromkeys(ways, float("inf"))
    for number in range(1 + options.repetitions):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            prepare(files)
            read: list[int] = []
            begun = time.process_time()
            seconds = seconds_of(lambda way=ways[name], read=read: read.append(way()), options.device)
            if number:
                rates[name].append(read[0] / seconds)
                cpu[name] = min(cpu[name], (time.process_time() - begun) / read[0] * 1e9)
    return rates, cpu


def read_sequentially(files: list[Path]) -> int:
    """Every file from its beginning to its end into one small buffer: nothing is faster, and nothing can be done with
    what was read.
    """
    buffer, total = bytearray(READ_BYTES), 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total


def read_into_memory(files: list[Path]) -> int:
    """Every file into memory of its own, which the next one may use again."""
    return sum(np.fromfile(file, np.uint8).nbytes for file in files)


class LeastShuffle:
    """What no loader that shuffles in memory can leave out, and nothing else."""

    def __init__(self, case: Case, files: list[Path]) -> None:
        self.files, self.word = files, np.dtype(f"V{2 * case.d}")
        self.piece_bytes = 1024 * self.word.itemsize
        tokens = int(sum(file.stat().st_size for file in files) * case.pool_share) // self.word.itemsize
        self.pool = np.ones(tokens * self.word.itemsize, np.uint8).view(self.word)
        self.places = np.random.default_rng(0).permutation(tokens)

    def read(self) -> int:
        """Bytes read, checked and moved by two threads."""
        with ThreadPoolExecutor(2) as threads:
            return sum(threads.map(self._read, range(2)))

    def _read(self, thread: int) -> int:
        buffer = np.empty(self.piece_bytes, np.uint8)
        at, total = thread * len(self.places) // 2, 0
        for file in self.files[thread::2]:
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer) // self.word.itemsize:
                    tokens = buffer[: count * self.word.itemsize]
                    tokens.view(np.int16).max(), tokens.view(np.uint16).max()  # as the loader finds NaN and infinity
                    at = at if at + count <= len(self.places) else 0
                    self.pool[self.places[at : at + count]] = tokens.view(self.word)
                    at, total = at + count, total + tokens.nbytes
        return total


def batches_of(case: Case, state: State, folder: Path, options: argparse.Namespace) -> TokenBatches:
    """One more epoch than is timed: the first finds the memory of the pool untouched, which costs more than reading."""
    source = open_source(folder)
    tokens = case.generations * case.steps * case.img_tokens
    pool_tokens = max(int(tokens * case.pool_share), 4 * case.batch_tokens)
    return TokenBatches(
        source,
        choose_sites(source, ["double.*.img"]),
        batch_tokens=case.batch_tokens,
        pool_bytes=pool_tokens * case.sites * (case.d * 2 + Pool.BYTES_BESIDE),
        epochs=1 + options.repetitions,
        device=options.device,
        page_cache=state.again,
    )


def one_epoch(batches: TokenBatches) -> int:
    """Shuffled batches that nobody trains on: opening files, reading, checking, shuffling, gathering."""
    epoch_tokens = batches.feed.tokens_at_most or 0
    end, total = batches.tokens + epoch_tokens, 0
    while batches.tokens < end:
        total += sum(values.nbytes for values in next(batches).values.values())
    return total


def drop_from_cache(files: list[Path]) -> None:
    """These files are read from the disk again."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_up(files: list[Path]) -> None:
    """These files are in the page cache."""
    read_sequentially(files)


def write_captures(case: Case, folder: Path) -> list[Path]:
    """Captures of random values, of image tokens alone."""
    params = FluxParams(
        in_channels=64,
        out_channels=64,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=case.d,
        mlp_ratio=4.0,
        num_heads=case.d // 128,
        depth=case.sites,
        depth_single_blocks=0,
        axes_dim=(16, 56, 56),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=False,
    )
    sites = [Site("double", block, "img") for block in range(case.sites)]
    values = torch.randn(1, case.img_tokens, case.d).bfloat16()
    files = []
    for number in range(case.generations):
        plan = CapturePlan(
            params,
            sites,
            timesteps=[1 - step / case.steps for step in range(case.steps + 1)],
            txt_tokens=4,
            img_tokens=case.img_tokens,
            guidance=0.0,
            metadata={"generation_id": f"{number:08x}", "prompt": f"prompt {number}", "model": "random"},
        )
        context = StepContext(torch.zeros(plan.img_shape).bfloat16(), torch.zeros(plan.y_shape).bfloat16(), 4)
        steps = plan.kept_steps
        files.append(folder / f"{number:06d}.pt")
        of_sites = {(step, site): values.roll(number + step, 1) for step in steps for site in sites}
        write_capture(files[-1], plan, of_sites, dict.fromkeys(steps, context))
    return files


if __name__ == "__main__":
    main()
