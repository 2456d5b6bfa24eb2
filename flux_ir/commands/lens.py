"""`flux-ir lens`: decode an existing capture again, without sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import CheckpointOptions, ComputeOptions, ReadingOptions, RunOptions

if TYPE_CHECKING:
    from flux_ir.api.lens import LensResult


@dataclass(frozen=True, kw_only=True)
class LensOptions(ReadingOptions, ComputeOptions, CheckpointOptions, RunOptions):
    """Decode what each block of an existing capture would have drawn, without sampling again.

    Pictures, lens.json and the contact sheet of the run are written anew; everything else stays as it is.
    """

    decode_batch: int | None = option(
        None, help="pictures decoded at once", minimum=1, default_text="as many as fit a fixed number of pixels"
    )


def run(options: LensOptions) -> None:
    """Decode as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.api.lens import read_lens
    from flux_ir.commands.report import Report, peak_memory
    from flux_ir.layout import find_run

    find_run(options.output_dir, options.generation_id)  # a flag names a run below the folder, never a path
    with Report() as report:
        done = read_lens(
            options.generation_id,
            lens=options.lens,
            fitted_lens=options.fitted_lens,
            output_dir=options.output_dir,
            decode_batch=options.decode_batch,
            device=options.device,
            dtype=options.dtype,
            checkpoint=options.checkpoint,
            ae_checkpoint=options.ae_checkpoint,
            progress=report.watch,
        )
    report.table(f"generation {done.generation_id}", lens_files(done), peak_memory())


def lens_files(done: "LensResult") -> dict[str, Path]:
    """What a lens has written, by the names of the closing table."""
    written = {"numbers": done.numbers}
    for lens in done.pictures:
        written |= {f"pictures, {lens}": done.pictures[lens], f"contact sheet, {lens}": done.sheets[lens]}
    return written


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(LensOptions, run, argv, prog=prog)
