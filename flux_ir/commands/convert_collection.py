"""`flux-ir convert-collection`: an old collection becomes one of shards."""

from collections.abc import Sequence
from dataclasses import dataclass

from flux_ir.commands.cli.option import REQUIRED, Options, option
from flux_ir.commands.cli.parse import launch


@dataclass(frozen=True, kw_only=True)
class ConvertCollectionOptions(Options):
    """Make a collection of shards of an old one, which has a folder groups/ with a capture file per generation.

    The new collection is the one that collecting anew gives; the old one stays as it is. The same command goes on where
    it was stopped.
    """

    captures: str = option(REQUIRED, help="the old collection: its folder or URL")
    output_dir: str = option(REQUIRED, help="the new collection: a new folder or URL, or one to go on with")


def run(options: ConvertCollectionOptions) -> None:
    """Convert as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.convert_collection import convert_collection
    from flux_ir.commands.report import Report
    from flux_ir.errors import counted

    with Report() as report:
        done = convert_collection(options.captures, options.output_dir, progress=report.watch)
    report.rows("collection converted", [(counted(done.generations, "generation"), "", done.where)])


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ConvertCollectionOptions, run, argv, prog=prog)
