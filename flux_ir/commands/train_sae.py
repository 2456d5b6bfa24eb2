"""`flux-ir train-sae` (and `train_sae.py`): train sparse autoencoders on activations, stored or made on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import Device
from flux_ir.errors import FluxIRError

DATA, WHAT, HOW, LIVE, WHERE = "the data", "the autoencoder", "the training", "live data", "where and when"
SPARSE = ("topk", "batch_topk", "matryoshka")  # the architectures that are given k


@dataclass(frozen=True, kw_only=True)
class TrainSAEOptions(Device):
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
        default_text="the only one there is",
    )
    steps: tuple[int, ...] | None = option(
        None, help="sampling steps to train on, counted from 0", group=DATA, minimum=0, default_text="all there are"
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
    max_tokens: int | None = option(
        None, help="tokens to train on", group=DATA, minimum=1, default_text="one epoch, or --epochs"
    )
    epochs: int | None = option(None, help="how often to go through the data", group=DATA, minimum=1, default_text="1")
    pool_gb: float = option(1.0, help="memory in which tokens are shuffled", unit="GB", group=DATA, minimum=0.0)

    arch: Literal["topk", "batch_topk", "l1", "jumprelu", "gated", "matryoshka"] = option(
        "topk", help="kind of autoencoder", group=WHAT
    )
    k: tuple[int, ...] | None = option(
        None,
        help="active features per token, of topk, batch_topk (on average) and matryoshka",
        group=WHAT,
        minimum=1,
        default_text="32",
    )
    expansion: tuple[int, ...] = option((8,), help="features per dimension of the activations", group=WHAT, minimum=1)
    seed: tuple[int, ...] = option((0,), help="seed of the start and, the first, of the order", group=WHAT, minimum=0)
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
    k_aux: int | None = option(
        None, help="dead features that explain each token's residual", group=WHAT, minimum=0, default_text="d / 2"
    )
    dead_after: int | None = option(
        None,
        help="tokens without firing after which a feature is dead",
        group=WHAT,
        minimum=1,
        default_text="10 million, at most a twentieth of the run",
    )
    resample: int | None = option(
        None,
        help="optimiser steps from one resampling of dead features to the next, in the first half of the run",
        group=WHAT,
        minimum=1,
        default_text="never",
    )

    batch_tokens: int = option(2048, help="tokens per optimiser step, of all processes together", group=HOW, minimum=1)
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
        minimum=1,
        default_text="k",
    )
    ema: float | None = option(
        None,
        help="decay per step of the average of the weights that is written in their place, such as 0.999",
        group=HOW,
        minimum=0.0,
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
        None, help="generations per prompt", group=LIVE, minimum=1, default_text="1, or what --max_tokens needs"
    )

    name: str | None = option(
        None, help="name of the folder in --output_dir", group=WHERE, default_text="that of the captures, or the model"
    )
    output_dir: Path = option(Path("saes"), help="where the autoencoders go: one folder each", group=WHERE)
    checkpoint_minutes: float = option(
        10.0, help="time from one checkpoint to the next", unit="minutes", group=WHERE, minimum=0.0
    )
    checkpoint_tokens: int | None = option(
        None, help="also a checkpoint after so many tokens", group=WHERE, minimum=1, default_text="by time alone"
    )
    log: Literal["none", "tensorboard", "wandb"] = option("none", help="where curves go as well", group=WHERE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_data()
        self._check_architecture()
        for name in ("lr", "clip", "pool_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FluxIRError(f"--{name} must be above 0: got {value}")

    def _check_data(self) -> None:
        """One source of data, and one length of the run."""
        live = self.model is not None or self.prompts is not None
        if self.captures is not None and live:
            raise FluxIRError(
                "--captures reads what is stored, --model with --prompts makes it on the way: got both",
                hint="leave one of them out",
            )
        if self.captures is None and (self.model is None or self.prompts is None):
            raise FluxIRError(
                "there must be data to train on: --captures, or --model with --prompts",
                hint="make captures with flux-ir collect, or pass --model flux-tiny --prompts prompts.txt",
            )
        if self.captures is not None and self.repeats is not None:
            raise FluxIRError("--repeats is for live data: got --captures", hint="leave it out, or raise --epochs")
        if live and self.epochs is not None:
            raise FluxIRError("live data come once: got --epochs", hint="pass --repeats or --max_tokens instead")
        if self.max_tokens is not None and self.epochs is not None:
            raise FluxIRError("--max_tokens and --epochs both say when to stop: got both", hint="leave one out")
        if live and self.site is None:
            raise FluxIRError("live data need a --site to record", hint="pass one such as --site single.6.img")

    def _check_architecture(self) -> None:
        """No option that the architecture has no use for: a sweep over it would train the same thing again."""
        if self.k is not None and self.arch not in SPARSE:
            hint = "pass --target_l0 instead" if self.arch == "jumprelu" else "pass --l1_coefficient instead"
            raise FluxIRError(f"{self.arch} is not given its k: got --k", hint=hint)
        if self.k_start is not None and self.arch not in SPARSE:
            raise FluxIRError(f"{self.arch} is not given its k: got --k_start", hint="leave it out")
        if self.k_start is not None and self.k is not None and self.k_start < max(self.k):
            raise FluxIRError(
                f"k comes down from --k_start, so it is at least --k {max(self.k)}: got {self.k_start}",
                hint="give a larger --k_start, or leave it out",
            )
        if self.l1_coefficient is not None and self.arch not in ("l1", "gated"):
            raise FluxIRError(f"{self.arch} has no L1 penalty: got --l1_coefficient", hint="it is for l1 and gated")
        if self.target_l0 is not None and self.arch != "jumprelu":
            raise FluxIRError(f"{self.arch} does not steer its L0: got --target_l0", hint="it is for jumprelu")


def run(options: TrainSAEOptions) -> int:
    """Train as the options say; returns the exit code. Raises FluxIRError for what a user can mend."""
    from flux_ir.commands.training import train_saes

    return train_saes(options)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The script `train_sae.py`: returns the exit code."""
    return launch(TrainSAEOptions, run, argv, prog=prog)
