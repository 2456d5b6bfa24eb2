"""`flux-ir export-features`: the table of features as CSV, Parquet, or in the layout of Neuronpedia."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, FolderOptions

WRITTEN = "what is written"


@dataclass(frozen=True, kw_only=True)
class ExportFeaturesOptions(FolderOptions):
    """Write what is known of every feature as other programs read it: a table, or folders that Neuronpedia imports."""

    format: tuple[Literal["csv", "parquet", "neuronpedia"], ...] = option(
        ("csv",), help="csv and parquet: a row per feature; neuronpedia: also its examples", group=WRITTEN
    )
    stream: Literal["img", "txt"] | None = option(
        None, help="features of image or of text tokens", group=WRITTEN, default_text="all there are"
    )
    tokenizer: Path | None = option(
        None, help="a folder with the tokenizer of the texts", group=MACHINE, default_text="the model's own"
    )
    output_dir: Path | None = option(
        None, help="where the files go", group=MACHINE, default_text="exports/ in the folder of features"
    )


def run(options: ExportFeaturesOptions) -> None:
    """Export as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.export_features import export_features
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        written = export_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    report.table("exported", written, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ExportFeaturesOptions, run, argv, prog=prog)
