"""`flux-ir find-examples`: the images that show what each feature of a scored autoencoder responds to."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import FolderOptions

EACH = "images of each feature"


@dataclass(frozen=True, kw_only=True)
class FindExamplesOptions(FolderOptions):
    """Find the images that show what each feature responds to: strong, weak, random, and look-alikes it ignores.

    Reads what flux-ir score-features left, and writes examples.safetensors there. A row has one image of a prompt.
    """

    top: int = option(24, help="the strongest", group=EACH)
    quantiles: int = option(
        5, help="equal shares of the images it fires on, from strong to weak", group=EACH, minimum=1
    )
    per_quantile: int = option(8, help="images of each share, at random", group=EACH, minimum=1)
    random: int = option(8, help="images it fires on, at random", group=EACH, minimum=1)
    silent: int = option(8, help="images on which it is silent, most like its strongest", group=EACH, minimum=1)
    seed: int = option(0, help="of the draws", group=EACH)


def run(options: FindExamplesOptions) -> None:
    """Find them as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.find_examples import find_examples
    from flux_ir.commands.report import Report, peak_memory
    from flux_ir.features.examples import FILE

    with Report() as report:
        folder = find_examples(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        report.table("examples found", {"examples": folder.path / FILE}, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(FindExamplesOptions, run, argv, prog=prog)
