"""`flux-ir transfer`: one prompt's region in another prompt's picture, by features and other methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    COMPARED,
    MACHINE,
    PICTURE,
    WHERE,
    BatchOptions,
    EditedRunsOptions,
    ModelOptions,
    PictureOptions,
)

if TYPE_CHECKING:
    from flux_ir.steering.table import Estimate
    from flux_ir.steering.tradeoff import Area, TransferRow

WHAT = "What is transferred"


@dataclass(frozen=True, kw_only=True)
class TransferOptions(
    EditedRunsOptions,
    PictureOptions,
    ModelOptions,
    BatchOptions,
):
    """Turn one prompt's picture into another's in a region, from the same noise, by the features of autoencoders.

    The features that are stronger in the original are subtracted, those that are stronger in the edited prompt's run
    are added. Says how near every k and strength comes to the edited prompt's picture and what the rest of the picture
    pays, and the same of whole activations, neurons, the mean difference and random features. Stopped at any moment,
    the same command goes on.
    """

    prompt: str | None = option(
        None, help="what the picture shows", group=PICTURE, free_text=True, default_text="those of --pairs"
    )
    edited_prompt: str | None = option(
        None, help="what it shall show", group=PICTURE, free_text=True, default_text="those of --pairs"
    )
    pairs: Path | None = option(
        None,
        help="many pairs, a .jsonl file: prompt, edited_prompt, and if need be region or mask, and seed",
        group=PICTURE,
        default_text="the one pair of --prompt and --edited_prompt",
    )

    sae: tuple[Path, ...] = option(REQUIRED, help="folders of autoencoders, each of another site", group=WHAT)
    k: tuple[int, ...] = option(
        (1, 2, 5, 10, 20, 40), help="how many features are subtracted, and how many added", group=WHAT
    )
    strength: tuple[float, ...] = option(
        (0.5, 1.0, 2.0), help="what the change is multiplied by; 1 sets a feature to its value", group=WHAT
    )
    values: Literal["spatial", "quantile"] = option(
        "spatial",
        help="the value of a feature. spatial: the edited run's at each token and step; quantile: 0 for those that are "
        "subtracted, the .95 quantile over the region's tokens for those that are added",
        group=WHAT,
    )

    region: tuple[int, ...] | None = option(
        None,
        help="a rectangle of the picture: left,top,right,bottom",
        unit="px",
        group=WHERE,
        default_text="for captions of flux-tiny where the judge sees the difference, else the whole picture",
    )
    mask: Path | None = option(
        None,
        help="a picture that is bright, or a .npy map that is high, in the region",
        group=WHERE,
        default_text="as --region",
    )
    above: float = option(0.5, help="with --mask: where it is more than this", group=WHERE)

    seeds: int = option(4, help="noises of each pair, for the intervals", group=COMPARED)
    controls: int = option(1, help="draws of random features; 0: none", group=COMPARED)

    output_dir: Path = option(Path("transfers"), help="where the folders of transfers are", group=MACHINE)


def run(options: TransferOptions) -> None:
    """Transfer as the options say. Raises FluxIRError for what a user can mend, before anything heavy if possible."""
    from flux_ir.api.transfer import TransferSettings, run_transfer
    from flux_ir.commands.report import Report, peak_memory

    settings = TransferSettings(**options.given(TransferSettings))
    with Report() as report:
        done = run_transfer(settings, report.watch)
    for line in (*transfer_table(done.table), *([""] if done.areas else []), *area_table(done.areas)):
        report.results.print(line, markup=False)
    written = {"the curve": done.curve, "pictures": done.pictures, "table": done.csv, "numbers": done.numbers}
    report.table("transferred", {name: path for name, path in written.items() if path is not None}, peak_memory())


def transfer_table(table: "Sequence[TransferRow]") -> list[str]:
    """One line per method, k and strength, under headings; intervals where there are several pairs or noises."""
    from flux_ir.commands.report import aligned

    head = ("", "k", "strength", "used", "distance", "edited [dB]", "outside", "outside [dB]", "front")
    rows = [
        (
            row.method,
            "" if row.k is None else str(row.k),
            f"{row.strength:g}",
            "" if row.used is None else f"{row.used.mean:.3g}",
            _said(row.distance, 3),
            _said(row.psnr_edited_db, 1),
            _said(row.outside, 4),
            "identical" if row.identical == row.pictures else _said(row.psnr_outside_db, 1),
            "best" if row.best else "*" if row.front else "",
        )
        for row in table
    ]
    return aligned([head, *rows])


def area_table(areas: "Sequence[Area]") -> list[str]:
    """One line per method."""
    from flux_ir.commands.report import aligned

    if not areas:
        return []
    return aligned([("", "dominated area"), *((area.method, _said(area.area, 3)) for area in areas)])


def _said(estimate: "Estimate | None", digits: int) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} ± {estimate.high - estimate.mean:.{digits}f}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(TransferOptions, run, argv, prog=prog)
