"""`flux-ir explore`: one HTML page to look at runs with."""

from collections.abc import Sequence
from dataclasses import dataclass

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import RunsOptions


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(RunsOptions):
    """Write explorer.html beside the runs: every decoded picture in a grid of blocks by steps, with its numbers.

    The page needs no server and no network: open it in a browser. It reads the runs' own pictures where they are, and
    its thumbnails from explorer_files/; keep them together, or ask for a single file.
    """

    generation_id: tuple[str, ...] | None = option(
        None,
        help="which runs to show: the names of their folders below --output_dir",
        default_text="every run with decoded pictures",
    )
    single_file: bool = option(False, help="put every picture inside the page, so that it can be sent as one file")


def run(options: ExploreOptions) -> None:
    """Write the page and print its path. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.visualize import explore
    from flux_ir.commands.report import Report

    with Report() as report:
        page = explore(
            options.generation_id,
            output_dir=options.output_dir,
            single_file=options.single_file,
            progress=report.watch,
        )
    report.results.print(str(page))


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ExploreOptions, run, argv, prog=prog)
