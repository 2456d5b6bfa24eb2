"""What a training step of a TopK autoencoder costs, and what it buys: tokens per second and FVU after equal tokens.

Everyone trains on the same batches in the same order, in turns within one process: a step of each, then the next batch.
Tokens per second is the batch over the median of a contestant's steps, FVU that of tokens none has seen. With --device
cuda the sizes are those of FLUX.1 and what the hardware would allow stands beside the figures.
"""

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from measure import Target, arguments, machine, parse, print_report, seconds_of
from sae_peers import Contestant, Task, contestants
from torch import Tensor

SPEED = Target("least", 2.0)
CPU_SIZES = {"d": 768, "features": 12_288, "k": 32, "batch_tokens": 2048}
GPU_SIZES = {"d": 3072, "features": 65_536, "k": 64, "batch_tokens": 32_768}
WARM_UP = 3
HELD_OUT = 8192
# One H200, measured: bf16 operations and bytes per second.
OPERATIONS, BYTES = 790e12, 4.3e12


@dataclass
class Outcome:
    """What one contestant did: seconds of its steps, then FVU; or why it could not."""

    seconds: list[float] = field(default_factory=list)
    fvu: float = float("nan")
    failure: str | None = None

    @property
    def typical_seconds(self) -> float:
        return median(self.seconds[WARM_UP:] or self.seconds)


def main() -> None:
    """Train everyone and print the table."""
    options = options_of_this_run()
    tokens = Tokens(options)
    task = Task(
        tokens.d,
        options.features,
        options.k,
        options.batch_tokens,
        options.steps,
        options.device,
        tokens.batch(-1, HELD_OUT),
    )
    outcomes = train_everyone(task, tokens, options.only)
    columns = ["program", "step [s]", "tokens/s", "FVU", "against the fastest peer", "target"]
    about = f"{machine(options.device)}\n- {tokens.words}\n- {sizes_in_words(task)}"
    print_report("Training a TopK autoencoder", columns, rows_of(outcomes, task), about)
    if options.device != "cpu":
        print_report("What one H200 would allow", ["bound", "tokens/s"], roofline(task), "- calculated")


def options_of_this_run() -> argparse.Namespace:
    """The command line; sizes not given are those of the device."""
    parser = arguments(__doc__ or "", repetitions=False)  # every step is one
    parser.add_argument("--captures", type=Path, help="train on these tokens (.npy, [tokens, d]) instead of made ones")
    parser.add_argument("--steps", type=int, default=200, help="batches everyone trains on (default 200)")
    parser.add_argument(
        "--only", default="", help="run only programs whose name contains this (several: ours+sae-lens)"
    )
    for name in CPU_SIZES:
        parser.add_argument(f"--{name}", type=int, help=f"default {CPU_SIZES[name]}, {GPU_SIZES[name]} on a GPU")
    options = parse(parser)
    for name, value in (CPU_SIZES if options.device == "cpu" else GPU_SIZES).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Tokens:
    """Batches by number, the same for everyone: from a file, or made as activations are thought to be made.

    Made ones: about 24 of 4 d random directions per token, some of them far more often than others, on top of noise of
    rank 16, a little noise everywhere and four huge dimensions; scaled so that a token is sqrt(d) long.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = options.device
        self.stored = None
        if options.captures is not None:
            import numpy

            self.stored = torch.from_numpy(numpy.load(options.captures)).float()
            self.d, self.words = self.stored.shape[1], f"tokens: {len(self.stored)} of {options.captures.name}"
            return
        self.d, self.words = options.d, "tokens: made (sparse directions, noise of low rank, four huge dimensions)"
        draw = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(4 * self.d, self.d, generator=draw), dim=1)
        frequency = torch.arange(1, 4 * self.d + 1).float().pow(-0.6)
        self.frequency = 24 * frequency / frequency.sum()
        self.planes = torch.randn(16, self.d, generator=draw) / self.d**0.5
        self.huge = torch.zeros(self.d)
        self.huge[:4] = torch.tensor([8.0, -6.0, 5.0, 4.0])
        self.scale = self.d**0.5 / float(self._made(draw, 1000).norm(dim=1).mean())

    def batch(self, number: int, n: int) -> Tensor:
        """Tokens [n, d]; number -1 is held out."""
        if self.stored is not None:
            held_out, rest = self.stored[:HELD_OUT], self.stored[HELD_OUT:]
            chosen = torch.randint(len(rest), (n,), generator=torch.Generator().manual_seed(number))
            return (held_out if number < 0 else rest[chosen]).to(self.device)
        return (self.scale * self._made(torch.Generator().manual_seed(number + 1000), n)).to(self.device)

    def _made(self, draw: torch.Generator, n: int) -> Tensor:
        active = torch.rand(n, len(self.frequency), generator=draw) < self.frequency
        sizes = 1 + torch.empty(n, len(self.frequency)).exponential_(generator=draw)
        found = (active * sizes) @ self.directions + torch.randn(n, 16, generator=draw) @ self.planes
        found += 0.02 * torch.randn(n, self.d, generator=draw)
        return found + self.huge * (1 + 0.2 * torch.randn(n, 1, generator=draw))


def train_everyone(task: Task, tokens: Tokens, only: str) -> dict[str, Outcome]:
    """A step of each on every batch, in turns, first to last and then last to first."""
    outcomes, running = {}, {}
    for name, build in contestants(task):
        if not any(part in name for part in only.split("+")):
            continue
        outcomes[name] = Outcome()
        torch.manual_seed(0)
        with noted(outcomes[name]):
            running[name] = build()
    for number in range(task.steps):
        x = tokens.batch(number, task.batch_tokens)
        for name in list(running) if number % 2 == 0 else list(running)[::-1]:
            with noted(outcomes[name]):
                outcomes[name].seconds.append(seconds_of(lambda name=name, x=x: running[name].step(x), task.device))
            if outcomes[name].failure:
                del running[name]
                gc.collect()
    for name, one in running.items():
        with noted(outcomes[name]):
            outcomes[name].fvu = fvu_of(one, tokens.batch(-1, HELD_OUT))
    return outcomes


class noted:  # noqa: N801 (reads as a word)
    """Keeps going when one program cannot: what it raised is part of the result."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.outcome.failure = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            return True
        return False


@torch.no_grad()
def fvu_of(one: Contestant, x: Tensor) -> float:
    """Share of the variance of unseen tokens that is left unexplained."""
    left = sum(float((part - one.reconstruct(part).float()).square().sum()) for part in x.split(1024))
    return left / float((x - x.mean(dim=0)).square().sum())


def rows_of(outcomes: dict[str, Outcome], task: Task) -> Iterator[list[str]]:
    """The table: ours is compared with the fastest peer, and its FVU with the lowest of all peers."""
    done = {name: one for name, one in outcomes.items() if not one.failure}
    peers = [one for name, one in done.items() if not name.startswith("ours")]
    fastest = min((one.typical_seconds for one in peers), default=float("nan"))
    best = min((one.fvu for one in peers), default=float("nan"))
    rows = []
    for name, one in outcomes.items():
        if one.failure:
            rows.append([name, one.failure, "", "", "", ""])
            continue
        ratio = fastest / one.typical_seconds
        verdict = ""
        if name.startswith("ours") and peers:
            verdict = f"{SPEED.verdict(ratio)}; FVU {Target('most', round(best, 6)).verdict(one.fvu)}"
        speed = f"{task.batch_tokens / one.typical_seconds:,.0f}"
        rows.append([name, f"{one.typical_seconds:.3f}", speed, f"{one.fvu:.4f}", f"{ratio:.2f}", verdict])
    return rows


def sizes_in_words(task: Task) -> str:
    """What a reader needs to repeat the run."""
    sizes = f"d = {task.d}, F = {task.features:,}, k = {task.k}, N = {task.batch_tokens:,}"
    return f"sizes: {sizes}; {task.steps} steps, {task.steps * task.batch_tokens:,} tokens; a step is everything"


def roofline(task: Task) -> list[list[str]]:
    """Tokens per second by operations and by bytes: 2 d F + 8 d k operations; k rows of 2 d bytes per gather pass."""
    compute = (2 * task.d * task.features + 8 * task.d * task.k) / OPERATIONS
    gathers = 3 * task.k * 2 * task.d / BYTES
    # Adam reads weight, gradient and moments, writes all but the gradient, and the bf16 copy: 30 bytes a weight.
    optimiser = 2 * task.d * task.features * 30 / BYTES / task.batch_tokens
    dense = 12 * task.d * task.features / OPERATIONS
    figures = {
        "the encoder's product and sparse arithmetic alone": compute,
        "and three passes of gathers": compute + gathers,
        "and the optimiser's bytes": compute + gathers + optimiser,
        "dense products in bf16, nothing else": dense,
    }
    return [[name, f"{1 / seconds:,.0f}"] for name, seconds in figures.items()]


if __name__ == "__main__":
    main()
