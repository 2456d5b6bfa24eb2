"""`flux-ir export-sae`: an autoencoder for another program, from another program, or for the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.commands.cli.option import REQUIRED, Options, option
from flux_ir.commands.cli.parse import launch
from flux_ir.errors import in_units


@dataclass(frozen=True, kw_only=True)
class ExportSAEOptions(Options):
    """Write an autoencoder as another program reads it, or put it on the hub.

    What flux-ir trains is read by sae-lens as it stands. Folders of sparsify, dictionary_learning and earlier
    autoencoders for flow-matching models are read as well, so this also turns theirs into ours (--format sae_lens).
    """

    sae: str = option(REQUIRED, help="the autoencoder: a folder, or the name of a repository on the hub")
    format: Literal["sae_lens", "sparsify", "dictionary_learning"] = option(
        "sae_lens", help="the program that shall read it; sparsify knows topk only"
    )
    output_dir: Path | None = option(
        None, help="the folder to write; sparsify takes its name for the site", default_text="nothing is written"
    )
    push_to: str | None = option(
        None,
        help="a repository on the hub to put it into, with a model card",
        default_text="nothing is sent",
    )
    private: bool = option(False, help="make the repository private, if it is made")


def run(options: ExportSAEOptions) -> None:
    """Export as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.export_sae import export_sae
    from flux_ir.commands.report import Report, bytes_at

    with Report() as report:
        exported = export_sae(
            options.sae,
            output_dir=options.output_dir,
            format=options.format,
            push_to=options.push_to,
            private=options.private,
            progress=report.watch,
        )
    config = exported.config
    line = f"{config.architecture}, {config.d_in} wide, {config.d_sae} features: {exported.where}"
    if options.output_dir is not None:
        line += f" ({in_units(bytes_at(options.output_dir))}, as {options.format} reads it)"
    report.results.print(line, markup=False)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ExportSAEOptions, run, argv, prog=prog)
