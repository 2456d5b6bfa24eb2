"""`flux-ir train-sae` (and `train_sae.py`): train sparse autoencoders on activations, stored or made on the way."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import INTERRUPTED, launch
from flux_ir.commands.cli.shared import DeviceOptions, LoRAOptions, QuantizeOptions
from flux_ir.errors import counted

if TYPE_CHECKING:
    from flux_ir.api.train_sae import Trained
    from flux_ir.commands.report import Report

DATA, WHAT, HOW, LIVE, WHERE = "the data", "the autoencoder", "the training", "live data", "where and when"


@dataclass(frozen=True, kw_only=True)
class TrainSAEOptions(DeviceOptions, LoRAOptions, QuantizeOptions):
    """Train sparse autoencoders on captured activations, or on activations that are made on the way and never stored.

    Lists (--k 16,32 --expansion 4,8 --seed 0,1, several sites) train every combination side by side on the same
    batches. Stop it whenever you like: the same command goes on, and ends with the same bytes as if it had never
    stopped. torchrun --nproc_per_node 2 train_sae.py ... shares every batch between processes.
    """

    captures: Path | None = option(
        None, help="a collection, a capture .pt, a folder of these, or an array .npy or .safetensors", group=DATA
    )
    site: tuple[str, ...] | None = option(
        None,
        help="sites to train on, as patterns such as single.6.img or double.*.img",
        group=DATA,
        elsewhere=("layer", "layers", "hook_point", "block"),
        default_text="the only one there is",
    )
    steps: tuple[int, ...] | None = option(
        None,
        help="sampling steps to train on, counted from 0",
        group=DATA,
        default_text="all there are",
        elsewhere=("timestep", "timesteps"),
    )
    stream: Literal["img", "txt"] | None = option(
        None, help="only image or only text tokens of whole single blocks", group=DATA, default_text="both"
    )
    padding: bool = option(False, help="train on the padding behind short prompts too", group=DATA)
    outliers: float | None = option(
        None,
        help="leave out tokens longer than so many times the median of their site and step",
        group=DATA,
        default_text="none is left out",
    )
    held_out: float = option(
        0.1, help="share of the prompts that is kept to measure on at the end", group=DATA, minimum=0.0, maximum=0.99
    )
    max_tokens: int | None = option(None, help="tokens to train on", group=DATA, default_text="one epoch, or --epochs")
    epochs: int | None = option(None, help="how often to go through the data", group=DATA, default_text="1")
    pool_gb: float = option(1.0, help="memory in which tokens are shuffled", unit="GB", group=DATA, minimum=0.0)

    arch: Literal["topk", "batch_topk", "l1", "jumprelu", "gated", "matryoshka"] = option(
        "topk", help="kind of autoencoder", group=WHAT
    )
    k: tuple[int, ...] | None = option(
        None,
        help="active features per token, of topk, batch_topk (on average) and matryoshka",
        group=WHAT,
        default_text="32",
        elsewhere=("topk", "topk_k", "top_k"),
    )
    prefixes: tuple[int, ...] | None = option(
        None,
        help="features of the nested dictionaries of matryoshka, ascending, without the whole one",
        group=WHAT,
        default_text="1/16, 1/8, 1/4 and 1/2 of all",
    )
    expansion: tuple[int, ...] = option((8,), help="features per dimension of the activations", group=WHAT)
    seed: tuple[int, ...] = option((0,), help="seed of the start and, the first, of the order", group=WHAT)
    l1_coefficient: tuple[float, ...] | None = option(
        None, help="weight of the L1 penalty, of l1 and gated", group=WHAT, minimum=0.0, default_text="sqrt(d_in) / 5"
    )
    target_l0: tuple[float, ...] | None = option(
        None,
        help="active features per token to steer jumprelu to",
        group=WHAT,
        default_text="a fixed penalty of 0.001 for each",
    )
    tied: bool = option(False, help="the encoder is the decoder transposed throughout", group=WHAT)
    decoder_init: Literal["random", "orthogonal"] = option("random", help="directions at the start", group=WHAT)
    encoder_init: Literal["transposed", "random", "orthogonal"] = option(
        "transposed", help="the encoder at the start: the decoder transposed, or one of its own", group=WHAT
    )
    bias_init: Literal["mean", "geometric_median"] = option("mean", help="b_dec at the start", group=WHAT)
    normalise: bool = option(
        True, help="centre tokens and scale them to length sqrt(d) for training; files hold it folded in", group=WHAT
    )
    whiten: Path | None = option(
        None,
        help="captures with several generations of each prompt: tokens are trained on in units of what noise and "
        "position do, so that features are of what the prompt decides; files hold it folded in",
        group=WHAT,
        default_text="tokens are only centred and scaled",
    )
    k_aux: int | None = option(
        None, help="dead features that explain each token's residual", group=WHAT, minimum=0, default_text="d / 2"
    )
    dead_after: int | None = option(
        None,
        help="tokens without firing after which a feature is dead",
        group=WHAT,
        default_text="10 million, at most a twentieth of the run",
    )
    resample: int | None = option(
        None,
        help="optimiser steps from one resampling of dead features to the next, in the first half of the run",
        group=WHAT,
        default_text="never",
    )

    batch_tokens: int = option(2048, help="tokens per optimiser step, of all processes together", group=HOW)
    lr: float | None = option(
        None,
        help="peak learning rate; 1,000 steps of warm-up (in short runs a tenth), linear decay over the last fifth",
        group=HOW,
        default_text="2e-4 / sqrt(features / 16384)",
    )
    k_start: int | None = option(
        None,
        help="active features per token at the start: k comes down from here over a quarter of the run",
        group=HOW,
        default_text="k",
    )
    ema: float | None = option(
        None,
        help="decay per step of the average of the weights that is written in their place, such as 0.999",
        group=HOW,
        maximum=0.999999,
        default_text="the last weights are written",
    )
    clip: float | None = option(1.0, help="largest norm of the gradient of an autoencoder; None: any", group=HOW)
    dtype: Literal["bfloat16", "float32"] | None = option(
        None,
        help="precision of the large products; weights are float32",
        group=HOW,
        default_text="bfloat16 on a GPU that has it, else float32",
    )
    shard_optimiser: bool = option(
        False, help="spread the optimiser's moments over the processes of torchrun", group=HOW
    )

    model: str | None = option(None, help="the model to run for live data, such as flux-tiny", group=LIVE)
    prompts: Path | None = option(
        None, help="prompts for live data, in place of --captures: .txt, .jsonl or .csv", group=LIVE
    )
    repeats: int | None = option(
        None, help="generations per prompt", group=LIVE, default_text="1, or what --max_tokens needs"
    )

    name: str | None = option(
        None, help="name of the folder in --output_dir", group=WHERE, default_text="that of the captures, or the model"
    )
    output_dir: Path = option(Path("saes"), help="where the autoencoders go: one folder each", group=WHERE)
    checkpoint_minutes: float = option(10.0, help="time from one checkpoint to the next", unit="minutes", group=WHERE)
    checkpoint_tokens: int | None = option(
        None, help="also a checkpoint after so many tokens", group=WHERE, minimum=1, default_text="by time alone"
    )
    log: Literal["none", "tensorboard", "wandb"] = option("none", help="where curves go as well", group=WHERE)


def run(options: TrainSAEOptions) -> int:
    """Train as the options say; returns the exit code. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.training_settings import TrainSAESettings

    settings = TrainSAESettings.of({field.name: getattr(options, field.name) for field in fields(options)})

    from flux_ir.api.train_sae import run_training  # only now torch
    from flux_ir.commands.report import Report
    from flux_ir.commands.training_table import TrainingTable

    is_first = os.environ.get("RANK", "0") == "0"  # which alone writes to the terminal, for all processes of the job
    results: list[Trained] = []
    with Report() as report, stop_requests() as stop, TrainingTable(report, quiet=not is_first) as table:
        for row in run_training(settings, stop=lambda: stop.made, progress=report.watch):
            table.update(row)
            stop.can_wait = row.tokens < row.total_tokens and not row.finished
            results += row.finished
            if row.stopped:
                return INTERRUPTED
    if is_first:
        conclude(report, results)
    return 0


def conclude(report: "Report", results: "list[Trained]") -> None:
    """One line per autoencoder, then times, memory and folders."""
    from flux_ir.commands.report import aligned, peak_memory

    head = ("autoencoder", "features", "FVU", "L0", "dead")
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        rows.append((result.folder.name, str(result.d_sae), *_number_cells(result.overall)))
        if outliers := result.outliers["tokens"]:
            without = result.outliers["without"]["overall"]
            rows.append((f"  without {counted(outliers, 'outlier')}", "", *_number_cells(without)))
    report.results.print(f"measured on {results[0].measured_on}", style="bold", markup=False)
    for line in aligned(rows):
        report.results.print(line, markup=False)
    report.table("training", {result.folder.name: result.folder for result in results}, peak_memory())


def _number_cells(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    fvu, l0, dead = (numbers[key] for key in ("fvu", "l0", "dead_share"))
    return ("-" if fvu is None else f"{fvu:.4f}", f"{l0:.1f}", f"{dead:.1%}")


# ---- Ctrl-C waits for a good moment: between two steps, so that what is saved can be gone on with

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the second is what torchrun and batch systems send


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.made = False
        self.can_wait = False
        """Whether training steps are under way, of which each end is a good moment; otherwise Ctrl-C stops at once."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """As long as the `with` lasts, the first Ctrl-C while `can_wait` only sets `made`; any other stops at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.made or not request.can_wait:
            raise KeyboardInterrupt
        request.made = True

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The script `train_sae.py`: returns the exit code."""
    return launch(TrainSAEOptions, run, argv, prog=prog)
