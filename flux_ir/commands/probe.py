"""`flux-ir probe`: which site and step know what, by linear probes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import KNOWN, MACHINE, MEASURED, ActivationsOptions, LabelsOptions


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(ActivationsOptions, LabelsOptions):
    """Fit a linear probe for every label at every site and step, and judge it on prompts it was not fitted on.

    A grid that says which site and step know colours, shapes, places, or whatever a file of labels names: AUROC of
    words and masks, R^2 of numbers. Writes probes.json and probes.png; a run that was stopped goes on.
    """

    report: Path | None = option(
        None, help="the collection to judge on", group=MEASURED, default_text="held-out prompts of --captures"
    )
    sites: tuple[str, ...] | None = option(
        None,
        help="sites to probe, as patterns such as single.*.img",
        group=MEASURED,
        default_text="all that were collected",
        elsewhere=("layer", "layers", "hook_point", "block"),
    )
    steps: tuple[int, ...] | None = option(
        None,
        help="steps to probe, counted from 0",
        group=MEASURED,
        default_text="all that were collected",
        elsewhere=("timestep", "timesteps"),
    )
    held_out: float = option(
        0.3, help="share of the prompts to judge on, without --report", group=MEASURED, minimum=0.01, maximum=0.99
    )

    levels: tuple[Literal["interior", "any", "image"], ...] = option(
        ("any", "image"), help="whole pictures, any patch, or patches inside one object", group=KNOWN
    )

    name: str | None = option(
        None, help="the name of the folder below --output_dir", group=MACHINE, default_text="that of the captures"
    )
    output_dir: Path = option(Path("probes"), help="where the folders of probes are", group=MACHINE)


def run(options: ProbeOptions) -> None:
    """Probe as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.probe import probe, table_of
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        probed = probe(**{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch)
    sites, columns, means = table_of(probed.result)
    table = [("mean AUROC", *sites)]
    for number, column in enumerate(columns):
        cells = [row[number] for row in means]
        table.append((column, *("" if cell is None else f"{cell:.3f}" for cell in cells)))
    for line in aligned(table):
        report.results.print(line, markup=False)
    report.results.print()
    written = {"numbers": probed.folder / "probes.json", "picture": probed.folder / "probes.png"}
    report.table("probed", written, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ProbeOptions, run, argv, prog=prog)
