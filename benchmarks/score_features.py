"""Scoring features: the whole pass against bare encoding of tokens that lie in memory, and its memory over images.

The pass reads tokens from memory too. It reconstructs, sorts what fires into scores and maps, writes them, and makes
the table. Bare encoding is `encode_sparse` of the same tokens in the same batches, and nothing is kept of it.

Peak memory is that of a process of its own, which reads a collection from the disk.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Target, arguments, interleaved, keep_freed_memory, machine, parse, print_report
from torch import Tensor

from flux_ir.activations.blocks import Generation, TokenBlock, TokenRun
from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter, site_key
from flux_ir.api.progress import unwatched
from flux_ir.api.score_features import score, score_features
from flux_ir.commands.report import peak_host_bytes
from flux_ir.distributed import Ranks
from flux_ir.features.scores import CHUNK_TOKENS
from flux_ir.features.scoring import Scoring, begin_folder, measure_sample, settings_of, write_sample
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.folder import save_sae
from flux_ir.sites import Site

SITE = Site.parse("single.6.img")
AT_LEAST, FLAT = Target("least", 0.7), Target("most", 1.2)
IMAGES = (100, 10_000)


class Case(NamedTuple):
    """An autoencoder, and the pictures it is used on."""

    name: str
    d: int
    features: int
    k: int
    steps: int
    tokens: int
    images: int


CASES = (
    Case("flux-tiny", 192, 1536, 16, 2, 64, 1024),
    Case("reference", 768, 12_288, 32, 2, 256, 32),
)


class MemorySource:
    """Tokens in memory: [steps, images, tokens, d]."""

    sites, model = (SITE,), "benchmark"

    def __init__(self, values: Tensor) -> None:
        self.values, self.steps = values, list(range(len(values)))
        self.generations = [Generation(f"{image:016x}", f"prompt {image}", None) for image in range(values.shape[1])]
        self.runs = [range(start, min(start + 64, values.shape[1])) for start in range(0, values.shape[1], 64)]
        self.identity = "in memory"
        self._positions = torch.arange(values.shape[2], dtype=torch.int32)

    def d(self, site: object) -> int:
        return self.values.shape[3]

    def tokens(self, site: object) -> int:
        return self.values.shape[2]

    def read(self, generation: int, site: object, step: int) -> TokenBlock:
        raise NotImplementedError

    def read_run(
        self, images: range, site: object, step: int, tokens: range | None = None, memory: object = None
    ) -> TokenRun:
        rows = slice(None) if tokens is None else slice(tokens.start, tokens.stop)
        values = self.values[step, images.start : images.stop, rows]
        return TokenRun(values, None, self._positions[rows].expand(len(images), -1), 0, [None] * len(images))


def main() -> None:
    """Print both tables."""
    parser = arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, help="where files are written (default: a temporary folder)")
    parser.add_argument("--peak_of", type=int, help=argparse.SUPPRESS)
    options = parse(parser)
    if options.peak_of is not None:
        print(peak_of(options.peak_of, options))
        return
    keep_freed_memory()
    rows = [row for case in CASES for row in speed_rows(case, options)]
    columns = ["autoencoder", "tokens", "bare [tokens/s]", "pass [tokens/s]", "ratio", "target"]
    print_report("Scoring features against bare encoding", columns, rows, machine(options.device))
    print_report("Its memory", ["images", "peak", "of the first", "target"], memory_rows(options), machine())


def speed_rows(case: Case, options: argparse.Namespace) -> list[list[str]]:
    """One autoencoder."""
    values = tokens_of(case)
    sae = autoencoder(case, values[0, ::8].flatten(0, 1)).requires_grad_(False).to(options.device)
    count = values[..., 0].numel()

    def bare() -> None:
        for batch in values.flatten(0, 2).split(CHUNK_TOKENS):
            sae.encode_sparse(batch.to(options.device))

    with tempfile.TemporaryDirectory(dir=options.dir) as root:
        seconds = interleaved(
            {"bare": bare, "pass": passing(sae, MemorySource(values), Path(root))},
            options.repetitions,
            device=options.device,
        )
    ratio = seconds["bare"] / seconds["pass"]
    return [
        [
            f"{case.name}: d {case.d}, F {case.features}, k {case.k}",
            str(count),
            f"{count / seconds['bare']:.0f}",
            f"{count / seconds['pass']:.0f}",
            f"{ratio:.2f}",
            AT_LEAST.verdict(ratio),
        ]
    ]


def tokens_of(case: Case) -> Tensor:
    """Random tokens [steps, images, tokens, d]. Half of their variance is that of their picture, so that a feature
    fires on several tokens of it, as it does on real ones.
    """
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(case.steps, case.images, case.tokens, case.d, generator=draw)
    return (own + torch.randn(1, case.images, 1, case.d, generator=draw)) / 2**0.5


def passing(sae: SparseAutoencoder, source: MemorySource, root: Path) -> Callable[[], None]:
    """The whole pass into a new folder each time."""
    scoring = Scoring(sae.folded(), source, SITE, settings_of(sae, "none", source, SITE, source.steps))
    numbers = iter(range(1_000_000))

    def run() -> None:
        folder = begin_folder(root / str(next(numbers)), scoring, root / "sae", str(root))
        write_sample(folder, measure_sample(scoring))
        score(scoring, folder, Ranks(), unwatched)

    return run


def autoencoder(case: Case, sample: Tensor) -> SparseAutoencoder:
    """An untrained one."""
    return make_sae(SAEConfig("topk", case.d, case.features, k=case.k, site=str(SITE)), sample=sample)


def memory_rows(options: argparse.Namespace) -> list[list[str]]:
    """The same autoencoder on more and more images."""
    with tempfile.TemporaryDirectory(dir=options.dir) as root:
        write_collection(Path(root), CASES[0], max(IMAGES))
        peaks = {count: peak_in_process(count, Path(root), options.device) for count in IMAGES}
    first = peaks[IMAGES[0]]
    return [
        [str(count), f"{peak / 1e6:.0f} MB", f"{peak / first:.2f}", FLAT.verdict(peak / first)]
        for count, peak in peaks.items()
    ]


def write_collection(root: Path, case: Case, images: int) -> None:
    """A collection of so many images, and one of the first of them; an autoencoder for both."""
    for count in IMAGES:
        (root / f"captures_{count}" / "shards").mkdir(parents=True)
        (root / f"captures_{count}" / "collection.json").write_text('{"version": 2}')
        for number, first in enumerate(range(0, count, 64)):
            members = range(first, min(first + 64, count))
            shape = (len(members), case.tokens, case.d)
            tensors = {site_key(SITE, step): ShardTensor(torch.bfloat16, shape) for step in range(case.steps)}
            rows = {"ids": [f"{image:016x}" for image in members], "prompts": [f"prompt {image}" for image in members]}
            path = root / f"captures_{count}" / "shards" / f"{number:06d}.safetensors"
            with ShardWriter(path, ShardLayout(tensors, rows, {"width": 128, "height": 128})) as writer:
                for key in tensors:
                    draw = torch.Generator().manual_seed(number)
                    writer.write(key, 0, torch.randn(shape, generator=draw).bfloat16())
    save_sae(autoencoder(case, torch.randn(200, case.d)), root / "sae")


def peak_in_process(count: int, root: Path, device: str) -> int:
    """The peak memory of a process that scores so many images [bytes]."""
    command = [sys.executable, __file__, "--device", device, "--peak_of", str(count), "--dir", str(root)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return int(done.stdout)


def peak_of(count: int, options: argparse.Namespace) -> int:
    """Scores so many images in this process."""
    where = options.dir / f"captures_{count}"
    score_features(options.dir / "sae", where, name=f"of_{count}", output_dir=options.dir, device=options.device)
    return peak_host_bytes() or 0


if __name__ == "__main__":
    main()
