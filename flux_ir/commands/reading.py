"""From a finished capture to pictures, numbers and a contact sheet: all of `lens`, the end of `capture`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flux_ir.capture.store import Capture, load_capture
from flux_ir.commands.lens import LensOptions
from flux_ir.commands.report import Report, peak_memory
from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder, write_json
from flux_ir.lens.decode import LensDecoder, lens_report
from flux_ir.lens.readout import Lens, readable_sites
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.sources import locate_autoencoder, locate_transformer
from flux_ir.models.transformer import Flux
from flux_ir.models.weights import load_autoencoder, load_flux
from flux_ir.shapes import Pixels
from flux_ir.visualize.sheet import Row, draw_sheet

LENSES: dict[str, tuple[Lens, ...]] = {"euler": ("euler",), "x0": ("x0",), "both": ("euler", "x0")}


def read_again(options: LensOptions) -> None:
    """`flux-ir lens`: decode the capture of an earlier run with the weights it was made with."""
    report = Report()
    folder = RunFolder(options.output_dir, options.generation_id)
    capture = load_capture(folder.find_capture())
    readable_sites(capture)
    made_with = json.loads(folder.find_metadata().read_text(encoding="utf-8")).get("options", {})
    spec = get_spec(capture.metadata["model"])
    checkpoint = options.checkpoint or made_with.get("checkpoint")
    transformer = locate_transformer(spec, checkpoint, announce=report.note)
    ae_checkpoint = options.ae_checkpoint or made_with.get("ae_checkpoint")
    autoencoder = locate_autoencoder(spec, ae_checkpoint, checkpoint=checkpoint, announce=report.note)
    placement = plan(torch.cuda.device_count(), device=options.device)
    report.note(f"{spec.name} on {placement.transformer} ({placement.reason})")
    with report.phase("load"):
        model = load_flux(spec, transformer, placement.transformer, capture.dtype)
        decoder = load_autoencoder(spec, autoencoder, placement.ae_decoder)
    written = decode_run(report, folder, capture, model, decoder, LENSES[options.lens], batch=options.decode_batch)
    report.table(f"generation {folder.generation_id}", written, peak_memory())


def decode_run(
    report: Report,
    folder: RunFolder,
    capture: Capture,
    model: Flux,
    autoencoder: AutoEncoder,
    lenses: Sequence[Lens],
    *,
    batch: int | None = None,
) -> dict[str, Path]:
    """Every picture of these lenses, `lens.json`, and one contact sheet per lens. What was written, by name."""
    decoder = LensDecoder(capture, model, autoencoder, folder, lenses, final_picture=final_picture(folder), batch=batch)
    pictures = list(report.follow("decode", decoder.pictures(), total=len(decoder)))
    write_json(folder.lens_json, lens_report(decoder, pictures, earlier_report(folder)))
    written = {"numbers": folder.lens_json}
    with report.phase("contact sheet"):
        for lens in lenses:
            draw_contact_sheet(folder, capture, lens)
            written[f"pictures, {lens}"] = folder.decoded(lens)
            written[f"contact sheet, {lens}"] = folder.sheet(lens)
    return written


def final_picture(folder: RunFolder) -> Pixels | None:
    """The run's picture as it was saved, or None if it is gone: what every decoded picture is compared with."""
    if not folder.image().exists():
        return None
    with Image.open(folder.image()) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))[None]


def earlier_report(folder: RunFolder) -> dict[str, Any] | None:
    """The run's `lens.json`, whose other lens this reading keeps. Raises FluxIRError if it is broken."""
    if not folder.lens_json.exists():
        return None
    try:
        earlier: dict[str, Any] = json.loads(folder.lens_json.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FluxIRError(f"{folder.lens_json} must be JSON: {error}", hint="delete it and run this again") from error
    return earlier


def draw_contact_sheet(folder: RunFolder, capture: Capture, lens: Lens) -> None:
    """Steps across, blocks down, titled with what was drawn by what."""
    facts = capture.metadata
    times = [capture.context(step) for step in capture.steps]
    columns = [f"step {step}, t {t.t_curr:.2f}" for step, t in zip(capture.steps, times, strict=True)]
    rows = [
        Row(
            f"{site.kind} {site.block}",
            [folder.decoded_image(lens, step, site.kind, site.block) for step in capture.steps],
        )
        for site in readable_sites(capture)
    ]
    reading = "the state each block would go to" if lens == "euler" else "the image each block believes in"
    subtitle = f"{facts['model']}, seed {facts['seed']}: {reading} ({lens})"
    draw_sheet(facts["prompt"], subtitle, columns, rows, folder.sheet(lens))
