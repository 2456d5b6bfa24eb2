"""`flux-ir evaluate-sae`: how well autoencoders give back tokens they were not trained on, and what that does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, Checkpoints, Compute

WHAT, SPLICE = "what is measured", "splice"


@dataclass(frozen=True, kw_only=True)
class EvaluateSAEOptions(Compute, Checkpoints):
    """Measure autoencoders on the images and prompts they were not trained on: FVU, L0, dead features, cosine.

    Every autoencoder's folder gets metrics.json, density.png, fvu_per_step.png and curves.png; several together also
    get pareto.png, in the folder that holds them. With --splice their reconstructions are put back into the model.
    """

    sae: tuple[Path, ...] = option(
        REQUIRED, help="folders of autoencoders, or folders of such folders, as a sweep leaves them", group=WHAT
    )
    captures: Path = option(REQUIRED, help="the activations: a collection, captures, or an array", group=WHAT)
    site: str | None = option(
        None,
        help="the site to measure on, for an autoencoder that does not say one of these captures",
        group=WHAT,
        default_text="the one it was trained on",
    )
    baselines: tuple[Literal["pca", "random", "itda", "neurons"], ...] | None = option(
        ("pca",),
        help="what to compare with, at the same k: PCA, random directions, data points, the model's own neurons",
        group=WHAT,
    )
    max_tokens: int | None = option(
        None, help="most held-out tokens to read", group=WHAT, minimum=1, default_text="all of them"
    )
    fit_tokens: int = option(200_000, help="most training tokens that baselines are made from", group=WHAT, minimum=1)
    held_out: float = option(
        0.1,
        help="share of the prompts to measure on, for an autoencoder that does not say how it was trained",
        group=WHAT,
        minimum=0.0,
        maximum=0.99,
    )

    splice: bool = option(
        False, help="put reconstructions back into the model, with the captures' own noise", group=SPLICE
    )
    prompts: int = option(16, help="held-out generations to splice into", group=SPLICE, minimum=1)
    splice_steps: tuple[int, ...] | None = option(
        None,
        help="the steps to splice at, counted from 0",
        group=SPLICE,
        minimum=0,
        default_text="those the autoencoder was trained on",
    )
    pictures: bool = option(True, help="also run to the end and compare the pictures", group=SPLICE)
    splice_batch: int = option(4, help="generations that go through the model together", group=SPLICE, minimum=1)

    model: str | None = option(
        None, help="the model to splice into", group=MACHINE, default_text="the one that was captured"
    )
    batch_tokens: int = option(4096, help="tokens encoded at once", group=MACHINE, minimum=1)


def run(options: EvaluateSAEOptions) -> None:
    """Evaluate as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.commands.evaluating import evaluate_saes

    evaluate_saes(options)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(EvaluateSAEOptions, run, argv, prog=prog)
