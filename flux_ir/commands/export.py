"""`flux-ir export`: captured activations as plain arrays, for other programs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.front import launch
from flux_ir.options import REQUIRED, Options, option


@dataclass(frozen=True)
class ExportOptions(Options):
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
    steps: tuple[int, ...] | None = option(
        None, help="which steps, counted from 0", minimum=0, default_text="all there are"
    )


def run(options: ExportOptions) -> None:
    """Export as the options say. Raises FluxIRError for what a user can mend, before anything is written."""
    from flux_ir.commands.exporting import export

    export(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return launch(ExportOptions, run, argv, prog="flux-ir export")


if __name__ == "__main__":
    sys.exit(main())
