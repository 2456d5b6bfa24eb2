"""`flux-ir explore`: one HTML page to look at runs with."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import Runs

PAGE = "explorer.html"


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(Runs):
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
    from flux_ir.explorer.data import find_runs
    from flux_ir.explorer.page import write_explorer

    ids = options.generation_id or tuple(find_runs(options.output_dir))
    note = f"thumbnails of {len(ids)} {'run' if len(ids) == 1 else 'runs'}: {', '.join(ids[:4])}"
    print(note + (", ..." if len(ids) > 4 else ""), file=sys.stderr)
    page = write_explorer(options.output_dir, ids, options.output_dir / PAGE, single_file=options.single_file)
    print(page)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ExploreOptions, run, argv, prog=prog)
