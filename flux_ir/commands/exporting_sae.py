"""An autoencoder goes to another program or to the hub: the heavy half of the command `export-sae`."""

from pathlib import Path

from flux_ir.commands.export_sae import ExportSAEOptions
from flux_ir.commands.report import Report, bytes_at
from flux_ir.errors import FluxIRError, in_units
from flux_ir.sae.hub import from_pretrained, push_to_hub
from flux_ir.sae.interop.formats import export


def export_sae(options: ExportSAEOptions) -> None:
    """Write or push the autoencoder; print where it went."""
    report = Report()
    sae = from_pretrained(options.sae, announce=report.note)
    described = f"{sae.config.architecture}, {sae.config.d_in} wide, {sae.config.d_sae} features"
    if options.push_to is not None:
        folder = Path(options.sae)
        if not folder.is_dir():
            raise FluxIRError(f"--push_to takes a local folder: got {options.sae}", hint="export it to a folder first")
        report.results.print(f"{described}: {push_to_hub(folder, options.push_to, private=options.private)}")
    elif options.output_dir is not None:
        folder = export(sae, options.format, options.output_dir)
        report.results.print(f"{described}: {folder} ({in_units(bytes_at(folder))}, as {options.format} reads it)")
