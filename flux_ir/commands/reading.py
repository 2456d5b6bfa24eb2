"""From a finished capture to pictures, numbers and a contact sheet: all of `lens`, the end of `capture`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flux_ir.commands.lens import LensOptions
from flux_ir.commands.report import Report, peak_memory
from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder, write_json
from flux_ir.lens.decode import LensDecoder, lens_report, read_picture
from flux_ir.lens.readout import Lens, readable_sites
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.paths import CACHE, HUB, PACKAGE
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.sources import locate_autoencoder, locate_transformer
from flux_ir.models.transformer import Flux
from flux_ir.models.weights import load_autoencoder, load_flux
from flux_ir.recording.store import Capture, load_capture
from flux_ir.shapes import Pixels
from flux_ir.visualize.sheet import MOST_COLUMNS, Column, Row, draw_sheet

LENSES: dict[str, tuple[Lens, ...]] = {"euler": ("euler",), "x0": ("x0",), "both": ("euler", "x0")}

ROUNDING = 0.01  # of a bf16 state on another device than it was sampled on, with much to spare


def read_again(options: LensOptions) -> None:
    """`flux-ir lens`: decode the capture of an earlier run with the weights it was made with."""
    report = Report()
    folder = RunFolder(options.output_dir, options.generation_id)
    capture = load_capture(folder.find_capture())
    readable_sites(capture)
    earlier = earlier_report(folder)
    made_with = read_json(folder.find_metadata()).get("files", {})
    spec = get_spec(capture.metadata["model"])
    transformer = locate_transformer(
        spec, options.checkpoint or recorded_path(made_with, "transformer"), announce=report.note
    )
    autoencoder = locate_autoencoder(
        spec,
        options.ae_checkpoint or recorded_path(made_with, "autoencoder"),
        checkpoint=options.checkpoint,
        announce=report.note,
    )
    placement = plan(torch.cuda.device_count(), device=options.device)
    compute = choose_dtype(options.dtype, placement.devices, recorded=capture.dtype)
    report.note(f"{spec.name} on {placement.transformer} ({placement.reason}), {compute}")
    if compute.warning is not None:
        report.note(f"note: {compute.warning}")
    if compute.dtype != capture.dtype:
        recorded = str(capture.dtype).removeprefix("torch.")
        report.note(f"note: the capture is {recorded}: its last block gives the sampler's next state but for rounding")
    with report.phase("load"):
        model = load_flux(spec, transformer, placement.transformer, compute.dtype)
        decoder = load_autoencoder(spec, autoencoder, placement.ae_decoder)
    lenses = LENSES[options.lens]
    written = decode_run(report, folder, capture, model, decoder, lenses, earlier=earlier, batch=options.decode_batch)
    report.table(f"generation {folder.generation_id}", written, peak_memory())


def decode_run(
    report: Report,
    folder: RunFolder,
    capture: Capture,
    model: Flux,
    autoencoder: AutoEncoder,
    lenses: Sequence[Lens],
    *,
    earlier: dict[str, Any] | None = None,
    batch: int | None = None,
) -> dict[str, Path]:
    """Every picture of these lenses, `lens.json`, and one contact sheet per lens. What was written, by name.

    `earlier` is what `lens.json` held before: the numbers of the lenses that are not read now are kept.
    """
    decoder = LensDecoder(capture, model, autoencoder, folder, lenses, final_picture=final_picture(folder), batch=batch)
    pictures = list(report.follow("decode", decoder.pictures(), total=len(decoder)))
    if decoder.drift > ROUNDING:
        report.note(
            "note: these are not the weights the capture was made with: read at the last block, the next state is "
            f"{decoder.drift:.1%} off the sampler's"
        )
    write_json(folder.lens_json, lens_report(decoder, pictures, earlier))
    written = {"numbers": folder.lens_json}
    with report.phase("contact sheet"):
        for lens in lenses:
            draw_contact_sheet(folder, capture, lens)
            written[f"pictures, {lens}"] = folder.decoded(lens)
            written[f"contact sheet, {lens}"] = folder.sheet(lens)
    return written


def final_picture(folder: RunFolder) -> Pixels | None:
    """The run's picture as it was saved, or None if it is gone: what every decoded picture is compared with."""
    return read_picture(folder.image()) if folder.image().exists() else None


def earlier_report(folder: RunFolder) -> dict[str, Any] | None:
    """The run's `lens.json`, or None if there is none yet. Raises FluxIRError if it is broken."""
    return read_json(folder.lens_json) if folder.lens_json.exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """One of the run's own JSON files. Raises FluxIRError if it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FluxIRError(f"{path} must be JSON: {error}", hint="delete it, or make the run again") from error
    if not isinstance(value, dict):
        raise FluxIRError(f"{path} must be a JSON object: got {value!r:.40}", hint="delete it, or make the run again")
    return value


def recorded_path(files: dict[str, Any], part: str) -> Path | None:
    """The file a part of the model was read from when the capture was made; None: wherever such files are.

    A file the user named then must still be there. One from the package or the hub's cache may have moved since.
    """
    recorded = files.get(part)
    if recorded is None:
        return None
    path = Path(recorded["path"])
    return path if path.exists() or recorded["origin"] not in (PACKAGE, CACHE, HUB) else None


def draw_contact_sheet(folder: RunFolder, capture: Capture, lens: Lens) -> None:
    """Steps across, blocks down, titled with what was drawn by what."""
    facts, every = capture.metadata, math.ceil(len(capture.steps) / MOST_COLUMNS)
    steps = capture.steps[::every]
    columns = [Column(f"step {step}, t {capture.context(step).t_curr:.2f}", str(step)) for step in steps]
    rows = [
        Row(f"{site.kind} {site.block}", [folder.decoded_image(lens, step, site.kind, site.block) for step in steps])
        for site in readable_sites(capture)
    ]
    reading = "the state each block would go to" if lens == "euler" else "the image each block believes in"
    subtitle = f"{facts['model']}, seed {facts['seed']}: {reading} ({lens})"
    if every > 1:
        subtitle += f", one step in {every}"
    draw_sheet(facts["prompt"], subtitle, columns, rows, folder.sheet(lens))
