"""`flux-ir lens`: decode an existing capture again, without sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import Checkpoints, Compute, Readings, Runs


@dataclass(frozen=True, kw_only=True)
class LensOptions(Readings, Compute, Checkpoints, Runs):
    """Decode what each block of an existing capture would have drawn, without sampling again.

    Pictures, lens.json and the contact sheet of the run are written anew; everything else stays as it is.
    """

    generation_id: str = option(REQUIRED, help="the run: the name of its folder below --output_dir")
    decode_batch: int | None = option(
        None, help="pictures decoded at once", minimum=1, default_text="as many as fit a fixed number of pixels"
    )


def run(options: LensOptions) -> None:
    """Decode as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.commands.reading import read_again

    read_again(options)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(LensOptions, run, argv, prog=prog)
