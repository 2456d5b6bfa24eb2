"""`flux-ir export`: captured activations as plain arrays, for other programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import StepOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(StepOptions):
    """Write captured activations as plain arrays [tokens, d], with all that is known of each generation beside them.

    The same captures give the same bytes. What is written can be trained on like the captures it came from.
    """

    captures: str = option(
        REQUIRED,
        help="a collection (also an unfinished one, or its URL), a capture, or a folder of captures or of runs",
    )
    output_dir: Path = option(REQUIRED, help="a new folder, or that of the same export, which is written anew")
    format: Literal["safetensors", "npy"] = option(
        "safetensors",
        help="safetensors: one file per generation, {id}.safetensors, with the keys {site}/step_{s}; npy: one file per "
        "array, {site}/step_{s}/{id}.npy, and {id}.json. Float8 is written as the bfloat16 it stands for, and npy, "
        "which has no bfloat16, holds that as float32",
    )
    sites: tuple[str, ...] | None = option(
        None, help="which sites, as shell patterns such as double.*.img or single.3.img", default_text="all there are"
    )


def run(options: ExportOptions) -> None:
    """Export as the options say. Raises FluxIRError for what a user can mend, before anything is written."""
    from flux_ir.api.export import export
    from flux_ir.commands.report import Report
    from flux_ir.errors import counted

    with Report() as report:
        done = export(
            options.captures,
            options.output_dir,
            format=options.format,
            sites=options.sites,
            steps=options.steps,
            progress=report.watch,
        )
    report.table(counted(done.generations, "generation"), {"arrays": done.folder}, {})


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ExportOptions, run, argv, prog=prog)
