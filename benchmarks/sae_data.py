"""Loading tokens to train on: shuffled batches against `cat` of the same shards, from a cold disk.

The files are dropped from the page cache before each pass.

- kept: what the loader reads stays in the page cache, as with a collection of up to half of the memory.
- passed by: the loader reads past it, as with a larger collection.

Two other ways stand beside them. Sequential: every file from its beginning to its end into one small
buffer, as `cat` does, which leaves it in the page cache. Least shuffle: three threads do nothing but
read blocks in random order, look for NaN and write each token to a random row of a buffer. They know
nothing of formats, filters, sites, or an order that can be resumed: what a loader that shuffles in
memory cannot leave out.

Bytes of batches are those of tokens; a sequential read counts all of the file. CPU seconds say what
it costs where the machine is busy with other things. Tokens per second stand against the fastest
training step measured here (`sae_training.py`, d = 768).
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

from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter, images_per_shard, site_key
from flux_ir.activations.source import open_source
from flux_ir.activations.spans import Memory, Span, SpanReader
from flux_ir.sae.data.batches import TokenBatches
from flux_ir.sae.data.buffer import slot_bytes
from flux_ir.sae.data.feed import TokenFormat
from flux_ir.sae.data.filters import choose_sites
from flux_ir.sites import Site

READ_BYTES = 8 * 2**20
BLOCK_BYTES = 4 * 2**20
TRAINING_TOKENS, TRAINING_WIDTH = 18_000, 768
"""Tokens per second of the fastest training step (bf16), and its d."""
TIMES_TRAINING = Target("least", 5.0)


class Case(NamedTuple):
    """A collection, and how it is loaded."""

    name: str
    d: int
    img_tokens: int
    images: int
    steps: int
    sites: int
    batch_tokens: int
    target: Target
    """The loader's bytes per second over those of the sequential read."""
    cpu_before: tuple[float, float]
    """CPU seconds per GB of the loader that read one zip per picture, kept and passed by, on the machine of
    RESULTS.md.
    """

    @property
    def bytes_per_image(self) -> int:
        """Of all sites and steps."""
        return self.d * 2 * self.img_tokens * self.steps * self.sites


def main() -> None:
    """Print the table."""
    parser = arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, help="where the shards are written (default: a temporary folder)")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of each collection (default 1000)")
    options = parse(parser)
    rows = [row for case in cases(options.megabytes) for row in rows_of(case, options)]
    columns = ["collection", "data", "shards", "page cache", "sequential", "loader", "ratio", "target"]
    columns += ["least shuffle", "its ratio", "tokens/s", "times training", "CPU s/GB: sequential, least, loader"]
    columns += ["before, half of it"]
    print_report("SAE data: shards against a sequential read", columns, rows, machine(options.device))


def cases(megabytes: int) -> list[Case]:
    """Large pictures with one site and with four, small pictures, and the width of the training benchmark."""
    total = megabytes * 10**6
    least9, least7 = Target("least", 0.9), Target("least", 0.7)

    def images(d: int, tokens: int, each: int) -> int:
        return max(total // (each * tokens * d * 2), 1)

    return [
        Case("d 3072, 1,024 tokens, 1 site", 3072, 1024, images(3072, 1024, 4), 4, 1, 4096, least9, (0.42, 0.24)),
        Case("d 3072, 1,024 tokens, 4 sites", 3072, 1024, images(3072, 1024, 16), 4, 4, 2048, least7, (0.39, 0.26)),
        Case("d 256, 256 tokens, 1 site", 256, 256, images(256, 256, 2), 2, 1, 8192, least9, (1.51, 1.30)),
        Case("d 768, 1,024 tokens, 1 site", 768, 1024, images(768, 1024, 4), 4, 1, 4096, least9, (0.42, 0.24)),
    ]


def rows_of(case: Case, options: argparse.Namespace) -> list[list[str]]:
    """One collection, read in all ways in turns."""
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        files = write_collection(case, Path(folder))
        return [row(case, files, options, kept=kept) for kept in (True, False)]


def row(case: Case, files: list[Path], options: argparse.Namespace, *, kept: bool) -> list[str]:
    """The median rates of all ways, and the least CPU time."""
    with batches_of(case, files[0].parents[1], options, kept=kept) as batches:
        ways: dict[str, Callable[[], int]] = {
            "sequential": lambda: read_sequentially(files),
            "least": LeastShuffle(case, files, direct=not kept).read,
            "loader": lambda: one_epoch(batches),
        }
        rates, cpu = measured(ways, files, options)
    rate = {name: median(each) for name, each in rates.items()}
    tokens_per_second = rate["loader"] / (case.d * 2 * case.sites)
    before = case.cpu_before[0 if kept else 1]
    return [
        case.name,
        f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB",
        str(len(files)),
        "kept" if kept else "passed by",
        f"{rate['sequential'] / 1e9:.2f} GB/s",
        f"{rate['loader'] / 1e9:.2f} GB/s",
        f"{rate['loader'] / rate['sequential']:.2f}",
        case.target.verdict(rate["loader"] / rate["sequential"]),
        f"{rate['least'] / 1e9:.2f} GB/s",
        f"{rate['least'] / rate['sequential']:.2f}",
        f"{tokens_per_second:,.0f}",
        times_training(case, tokens_per_second),
        f"{cpu['sequential']:.3f}, {cpu['least']:.3f}, {cpu['loader']:.3f}",
        f"{before:.2f}: {Target('most', before / 2).verdict(cpu['loader'])}",
    ]


def times_training(case: Case, tokens_per_second: float) -> str:
    """How often the training step takes the tokens, at the width it was measured at."""
    if case.d != TRAINING_WIDTH:
        return ""
    times = tokens_per_second / TRAINING_TOKENS
    return f"{times:.0f}: {TIMES_TRAINING.verdict(times)}"


def measured(
    ways: dict[str, Callable[[], int]], files: list[Path], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Bytes per second of each repetition but the first, and the least CPU seconds per GB."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu = dict.fromkeys(ways, float("inf"))
    for number in range(1 + options.repetitions):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            drop_from_cache(files)
            read: list[int] = []
            begun = time.process_time()
            seconds = seconds_of(lambda way=ways[name], read=read: read.append(way()), options.device)
            if number:
                rates[name].append(read[0] / seconds)
                cpu[name] = min(cpu[name], (time.process_time() - begun) / read[0] * 1e9)
    return rates, cpu


def read_sequentially(files: list[Path]) -> int:
    """Every file from its beginning to its end into one small buffer: nothing can be done with what was read."""
    buffer, total = bytearray(READ_BYTES), 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total


class LeastShuffle:
    """What no loader that shuffles in memory can leave out, and nothing else."""

    THREADS = 3

    def __init__(self, case: Case, files: list[Path], *, direct: bool) -> None:
        self.reader, self.direct = SpanReader(), direct
        self.word = np.dtype(f"V{2 * case.d}")
        block = BLOCK_BYTES // self.word.itemsize * self.word.itemsize
        spans = [
            (file, Span(4096 + n * block, block)) for file in files for n in range(file.stat().st_size // block - 1)
        ]
        draw = np.random.default_rng(0)
        self.spans = [spans[index] for index in draw.permutation(len(spans))]
        tokens = len(self.spans) * block // self.word.itemsize // 4
        self.pool = np.ones(tokens * self.word.itemsize, np.uint8).view(self.word)
        self.slots = draw.permutation(tokens)

    def read(self) -> int:
        """Bytes read, checked and moved."""
        with ThreadPoolExecutor(self.THREADS) as threads:
            return sum(threads.map(self._read, range(self.THREADS)))

    def _read(self, thread: int) -> int:
        memory = Memory(page_cache=not self.direct)
        first, total = thread * len(self.slots) // self.THREADS, 0
        for file, span in self.spans[thread :: self.THREADS]:
            tokens = self.reader.read(file, [span], memory)
            tokens.view(np.int16).max(), tokens.view(np.uint16).max()  # as the loader finds NaN and infinity
            count = span.nbytes // self.word.itemsize
            first = first if first + count <= len(self.slots) else 0
            self.pool[self.slots[first : first + count]] = tokens.view(self.word)
            first, total = first + count, total + span.nbytes
        return total


def batches_of(case: Case, folder: Path, options: argparse.Namespace, *, kept: bool) -> TokenBatches:
    """One more epoch than is timed: the first finds the memory of the buffers untouched, which costs more than reading.

    The buffers hold a quarter of the data each.
    """
    source = open_source(folder)
    sites = choose_sites(source, ["double.*.img"])
    tokens = case.images * case.steps * case.img_tokens
    slot = slot_bytes({site: TokenFormat(case.d, torch.bfloat16) for site in sites})
    return TokenBatches(
        source,
        sites,
        batch_tokens=case.batch_tokens,
        pool_bytes=max(tokens // 2, 4 * case.batch_tokens) * slot,
        epochs=1 + options.repetitions,
        device=options.device,
        page_cache=kept,
    )


def one_epoch(batches: TokenBatches) -> int:
    """Shuffled batches that nobody trains on: opening files, reading, checking, shuffling."""
    end, total = batches.tokens + (batches.feed.tokens_at_most or 0), 0
    while batches.tokens < end:
        total += sum(values.nbytes for values in next(batches).values.values())
    return total


def drop_from_cache(files: list[Path]) -> None:
    """These files are read from the disk again."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_collection(case: Case, folder: Path) -> list[Path]:
    """A collection of random values, of image tokens alone."""
    sites = [Site("double", block, "img") for block in range(case.sites)]
    size, values = images_per_shard(case.bytes_per_image), torch.randn(1, case.img_tokens, case.d).bfloat16()
    (folder / "shards").mkdir()
    (folder / "collection.json").write_text("{}")
    files = []
    for first in range(0, case.images, size):
        images = range(first, min(first + size, case.images))
        tensor = ShardTensor(torch.bfloat16, (len(images), *values.shape[1:]))
        tensors = {site_key(site, step): tensor for site in sites for step in range(case.steps)}
        rows = {"ids": [f"{image:016x}" for image in images], "prompts": [f"prompt {image}" for image in images]}
        files.append(folder / "shards" / f"{len(files):06d}.safetensors")
        with ShardWriter(files[-1], ShardLayout(tensors, rows, {"model": "random", "txt_tokens": 4})) as writer:
            for key in tensors:
                for image in range(len(images)):
                    writer.write(key, image, values.roll(first + image, 1))
    return files


if __name__ == "__main__":
    main()
