"""`flux-ir attribute`: which features a part of one picture owes most to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    MACHINE,
    PICTURE,
    WHERE,
    BatchOptions,
    EmbeddedPromptOptions,
    ModelOptions,
    PictureOptions,
    RegionOptions,
)

if TYPE_CHECKING:
    from flux_ir.steering.removals import Agreement, Removal, Together

FEATURES, REMOVED = "Whose features", "What is estimated and what is removed"


@dataclass(frozen=True, kw_only=True)
class AttributeOptions(
    EmbeddedPromptOptions,
    PictureOptions,
    RegionOptions,
    ModelOptions,
    BatchOptions,
):
    """Say which features change a region of one picture most when they are removed.

    Estimates it for every feature at once, by gradients; then removes the best one by one, beside others that are drawn
    by chance, and the best of them all at once. Stopped at any moment, the same command goes on.
    """

    run: str | None = option(
        None,
        help="a run's folder, its id below output, latest, or a collection: its picture is asked about",
        group=PICTURE,
        default_text="the picture of --prompt and --seed",
    )
    generation: str | None = option(
        None, help="which generation of a collection: an id, or a number from 0", group=PICTURE, default_text="the only"
    )
    model: str | None = option(  # type: ignore[assignment]  # a run says it
        None,
        help="flux-schnell, flux-dev, flux-dev-krea, flux-dev-kontext or flux-tiny",
        group=PICTURE,
        default_text="the run's, or flux-schnell",
    )
    seed: int | None = option(None, help="seed of the noise", group=PICTURE, default_text="the run's, or 0")

    sae: tuple[str, ...] = option(
        (), help="the folder of an autoencoder, or several", group=FEATURES, default_text="none"
    )
    sites: tuple[str, ...] | None = option(
        None,
        help="where each of them is, for those that do not say",
        group=FEATURES,
        default_text="the site it was trained on",
    )
    steps: tuple[int, ...] | None = option(
        None, help="the steps to remove features at, counted from 0", group=WHERE, default_text="every step"
    )

    probes: int = option(16, help="draws that the estimate is a mean over, a backward pass each", group=REMOVED)
    candidates: int = option(20, help="features with the largest estimates to remove one by one", group=REMOVED)
    controls: int = option(20, help="other active features, drawn by chance, to remove likewise", group=REMOVED)
    best: int = option(8, help="of all these, how many to remove at once", group=REMOVED)

    name: str | None = option(
        None, help="what the folder is called", group=MACHINE, default_text="follows from the settings"
    )
    output_dir: Path = option(Path("attributions"), help="where the folders of attributions are", group=MACHINE)


def run(options: AttributeOptions) -> None:
    """Attribute as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.attribute import AttributeSettings, run_attribution
    from flux_ir.commands.report import Report, peak_memory

    settings = AttributeSettings(**options.given(AttributeSettings))
    with Report() as report:
        done = run_attribution(settings, report.watch)
    for line in [*removal_table(done.table), "", *summary(done.agreement, done.together)]:
        report.results.print(line, markup=False)
    written = {"sheet": done.sheet, "table": done.csv, "numbers": done.numbers, "estimates": done.estimates}
    report.table("attributed", written, peak_memory())


def removal_table(table: "Sequence[Removal]") -> list[str]:
    """One line per removed feature, the largest change of the region first, under headings."""
    from flux_ir.commands.report import aligned

    head = ("feature", "", "estimate", "inside", "outside", "inside [dB]", "outside [dB]", "active", "in region")
    rows = [
        (
            f"{row.site} {row.feature}",
            "" if row.chosen else "control",
            f"{row.estimate:.3f}",
            f"{row.latent_inside:.3f}",
            _said(row.latent_outside, 3),
            _said(row.psnr_inside_db, 1),
            _said(row.psnr_outside_db, 1),
            "" if row.active is None else f"{row.active:.0%}",
            "" if row.active_inside is None else f"{row.active_inside:.0%}",
        )
        for row in table
    ]
    return aligned([head, *rows])


def summary(agreement: "Agreement", together: "Together") -> list[str]:
    """How well the estimate foretold the removals, and what removing the best at once did."""
    count = len(together.features)
    return [
        f"rank correlation of estimate and removal: {_said(agreement.spearman, 2) or 'none'} over all, "
        f"{_said(agreement.spearman_candidates, 2) or 'none'} over candidates, "
        f"{_said(agreement.spearman_controls, 2) or 'none'} over controls; "
        f"{agreement.recall:.0%} of the {count} best have the best estimates",
        f"the best {count} at once change the region by {together.effect_of_sum:.3f}; their single changes add up to "
        f"{together.sum_of_effects:.3f} (ratio {_said(together.ratio, 2) or 'none'}, "
        f"cosine {_said(together.cosine, 2) or 'none'})",
    ]


def _said(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(AttributeOptions, run, argv, prog=prog)
