"""`flux-ir train-lens`: a tuned or a Jacobian lens from a collection."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, MEASURED, ActivationsOptions, DeviceOptions


@dataclass(frozen=True, kw_only=True)
class TrainLensOptions(ActivationsOptions, DeviceOptions):
    """Fit a lens to a collection of all blocks' image tokens, and judge it on held-out prompts.

    flux-ir lens --lens tuned (or jacobian) --fitted_lens lenses/NAME reads a run by it. Prints the error of the
    velocity at every block, plain and through the lens, beside a map from the network's input and the mean velocity.
    """

    kind: Literal["tuned", "jacobian"] = option(
        "tuned", help="an affine map per block and step, or the network's mean derivative by each block", group=MEASURED
    )
    gradients: int = option(
        16, help="with --kind jacobian: generations whose derivatives are averaged", group=MEASURED, minimum=1
    )
    patch: tuple[int, ...] | None = option(
        None,
        help="with --kind jacobian: row,column of the image token whose receptive fields are drawn",
        group=MEASURED,
        default_text="the middle",
    )
    held_out: float = option(
        0.2, help="share of the prompts that is only judged on", group=MEASURED, minimum=0.01, maximum=0.99
    )
    checkpoint: Path | None = option(
        None,
        help="the transformer's weights, which must be those of the collection",
        group=MACHINE,
        default_text="environment, package, hub",
    )
    name: str | None = option(
        None, help="the lens's folder below --output_dir", group=MACHINE, default_text="that of the captures"
    )
    output_dir: Path = option(Path("lenses"), help="where the folders of lenses are", group=MACHINE)


def run(options: TrainLensOptions) -> None:
    """Fit as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.train_lens import rows_of, train_lens, transfer_of
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        trained = train_lens(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    steps = trained.result["steps"]
    table = [("error of the velocity", *(f"step {step}" for step in steps))]
    table += [(name, *(f"{value:.3f}" for value in values)) for name, values in rows_of(trained.result)]
    if (transfer := transfer_of(trained.result)) is not None:
        table.append(("fitted at, judged at", *(f"step {step}" for step in steps)))
        rows = zip(steps, transfer, strict=True)
        table += [(f"step {step}", *(f"{value:.3f}" for value in row)) for step, row in rows]
    for line in aligned(table):
        report.results.print(line, markup=False)
    report.results.print()
    written = {"lens": trained.lens, "numbers": trained.folder / "evaluation.json"}
    report.table("fitted lens", written, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(TrainLensOptions, run, argv, prog=prog)
