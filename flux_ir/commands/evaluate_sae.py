"""`flux-ir evaluate-sae`: how well autoencoders give back tokens they were not trained on, and what that does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, MEASURED, ActivationsOptions, CheckpointOptions, ComputeOptions
from flux_ir.errors import counted

if TYPE_CHECKING:
    from flux_ir.api.evaluate_sae import EvaluatedSAE
    from flux_ir.sae.evaluation.metrics import Evaluation, Numbers

SPLICE = "splice"


@dataclass(frozen=True, kw_only=True)
class EvaluateSAEOptions(ActivationsOptions, ComputeOptions, CheckpointOptions):
    """Measure autoencoders on the images and prompts they were not trained on: FVU, L0, dead features, cosine.

    Every autoencoder's folder gets metrics.json, density.png, fvu_per_step.png and curves.png; several together also
    get pareto.png, in the folder that holds them. With --splice their reconstructions are put back into the model.
    """

    sae: tuple[Path, ...] = option(
        REQUIRED, help="folders of autoencoders, or folders of such folders, as a sweep leaves them", group=MEASURED
    )
    site: str | None = option(
        None,
        help="the site to measure on, for an autoencoder that does not say one of these captures",
        group=MEASURED,
        default_text="the one it was trained on",
        elsewhere=("layer", "hook_point", "block"),
    )
    baselines: tuple[Literal["pca", "random", "itda", "neurons"], ...] | None = option(
        ("pca",),
        help="what to compare with, at the same k: PCA, random directions, data points, the model's own neurons",
        group=MEASURED,
    )
    max_tokens: int | None = option(
        None, help="most held-out tokens to read", group=MEASURED, default_text="all of them"
    )
    fit_tokens: int = option(200_000, help="most training tokens that baselines are made from", group=MEASURED)
    held_out: float = option(
        0.1,
        help="share of the prompts to measure on, for an autoencoder that does not say how it was trained",
        group=MEASURED,
        minimum=0.0,
        maximum=0.99,
    )

    splice: bool = option(
        False, help="put reconstructions back into the model, with the captures' own noise", group=SPLICE
    )
    prompts: int = option(16, help="held-out generations to splice into", group=SPLICE)
    splice_steps: tuple[int, ...] | None = option(
        None,
        help="the steps to splice at, counted from 0",
        group=SPLICE,
        default_text="those the autoencoder was trained on",
        elsewhere=("timestep", "timesteps"),
    )
    pictures: bool = option(True, help="also run to the end and compare the pictures", group=SPLICE)
    splice_batch: int = option(4, help="generations that go through the model together", group=SPLICE)

    model: str | None = option(
        None, help="the model to splice into", group=MACHINE, default_text="the one that was captured"
    )
    batch_tokens: int = option(4096, help="tokens encoded at once", group=MACHINE)


def run(options: EvaluateSAEOptions) -> None:
    """Evaluate as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.evaluate_sae import EvaluateSAESettings, draw_fronts, run_evaluation
    from flux_ir.commands.report import Report, peak_memory

    settings = EvaluateSAESettings(**options.given(EvaluateSAESettings))
    with Report() as report:
        judged = run_evaluation(settings, report.watch)
    names = titles(judged)
    written = {f"numbers, {name}": one.folder / "metrics.json" for name, one in zip(names, judged, strict=True)}
    if len(judged) > 1:
        written |= draw_fronts(judged)
    for line in result_table(judged):
        report.results.print(line, markup=False)
    report.table(f"{len(judged)} evaluated", written, peak_memory())


def titles(judged: "Sequence[EvaluatedSAE]") -> list[str]:
    """What to call autoencoders: by their folders' names, where those are different."""
    names = [one.folder.name for one in judged]
    return names if len(set(names)) == len(names) else [str(one.folder) for one in judged]


def result_table(judged: "Sequence[EvaluatedSAE]") -> list[str]:
    """One line per autoencoder and per baseline, and one per splice, under headings."""
    from flux_ir.api.evaluate_sae import BASELINE_NAMES, origin_of
    from flux_ir.commands.report import aligned
    from flux_ir.sae.architectures.config import HAS_K

    head = ("", "site", "features", "k", "L0", "FVU", "cosine", "dead")
    rows: list[tuple[str, ...]] = [head]
    names = titles(judged)
    for title, one in zip(names, judged, strict=True):
        config = one.config
        k = str(config.k) if config.architecture in HAS_K else ""
        rows.append((title, origin_of(one), str(config.d_sae), k, *_numbers(one.evaluation.overall)))
        rows += _without_outliers(one.evaluation)
        for name, (baseline_k, measured) in one.baselines.items():
            features = str(len(measured.frequency))
            rows.append((f"  {BASELINE_NAMES[name]}", "", features, str(baseline_k), *_numbers(measured.overall)))
            rows += _without_outliers(measured)
    lines = aligned(rows)
    for title, one in zip(names, judged, strict=True):
        lines += outlier_notes(title, one.evaluation)
    spliced: list[tuple[str, ...]] = [("spliced in", "velocity MSE", "of zero", "of mean", "picture [dB]")]
    for title, one in zip(names, judged, strict=True):
        for name, row in (one.splice or {"replacements": {}})["replacements"].items():
            recovered = [_share(row[f"recovered_from_{anchor}"]) for anchor in ("zero", "mean")]
            decibels = "" if row["image_psnr_db"] is None else f"{row['image_psnr_db']:.1f}"
            spliced.append((f"{title}: {name}", f"{row['velocity_mse']:.3g}", *recovered, decibels))
    return lines + (["", *aligned(spliced)] if len(spliced) > 1 else [])


def _without_outliers(evaluation: "Evaluation") -> list[tuple[str, ...]]:
    """A row with the numbers of the ordinary tokens alone, if there are outliers."""
    outliers = evaluation.outliers
    if outliers is None or not outliers.tokens:
        return []
    return [(f"  without {counted(outliers.tokens, 'outlier')}", "", "", "", *_numbers(outliers.overall))]


def outlier_notes(name: str, evaluation: "Evaluation") -> list[str]:
    """A line that says so, if a few tokens decide what the FVU is."""
    outliers = evaluation.outliers
    if outliers is None or not evaluation.decided_by_outliers:
        return []
    return [
        f"note: {name}: {outliers.tokens} of {evaluation.overall.tokens} tokens are more than {outliers.factor:g} "
        f"times as long as the median and decide the FVU: it is {_share(evaluation.overall.fvu)} with them and "
        f"{_share(outliers.overall.fvu)} without"
    ]


def _numbers(numbers: "Numbers") -> tuple[str, str, str, str]:
    return f"{numbers.l0:.1f}", _share(numbers.fvu), f"{numbers.cosine:.4f}", _share(numbers.dead_share)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(EvaluateSAEOptions, run, argv, prog=prog)
