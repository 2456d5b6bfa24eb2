"""From a finished capture to pictures, numbers and a contact sheet: all of `read_lens`, the end of `capture`.

What `capture` returns stands here too, because `read_capture` and `read_lens` take it as the name of a run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flux_ir.api.arguments import check_words
from flux_ir.api.model_settings import ModelSettings, with_loras
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.collection import weights_digest
from flux_ir.errors import FluxIRError
from flux_ir.files import read_json, write_json
from flux_ir.layout import Lens, RunFolder, find_run, is_run_name, newest_capture, run_of
from flux_ir.lens.decode import ROUNDING_DRIFT, LensDecoder, lens_report, read_picture
from flux_ir.lens.fitted import FittedLens
from flux_ir.lens.jacobian import load_jacobian_lens
from flux_ir.lens.readout import readable_sites
from flux_ir.lens.tuned import load_tuned_lens
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.load import load_autoencoder, stream_flux
from flux_ir.models.checkpoints.locate import ModelSource, locate_autoencoder, locate_transformer
from flux_ir.models.checkpoints.lora.read import read_loras
from flux_ir.models.checkpoints.paths import CACHE, HUB, PACKAGE
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.registry import get_spec
from flux_ir.recording.reader import Capture, load_capture
from flux_ir.shapes import Pixels
from flux_ir.visualize.sheet import MOST_COLUMNS, SheetColumn, SheetRow, draw_sheet

LensWord = Literal["euler", "x0", "both", "tuned", "jacobian", "jacobian_summed"]
LENSES: dict[LensWord, tuple[Lens, ...]] = {
    "euler": ("euler",),
    "x0": ("x0",),
    "both": ("euler", "x0"),
    "tuned": ("tuned",),
    "jacobian": ("jacobian",),
    "jacobian_summed": ("jacobian_summed",),
}
FITTED: dict[LensWord, Callable[[str | Path], FittedLens]] = {
    "tuned": load_tuned_lens,
    "jacobian": load_jacobian_lens,
    "jacobian_summed": partial(load_jacobian_lens, version="summed"),
}
"""The lenses that are read from a file."""
READINGS: dict[Lens, str] = {
    "euler": "the state each block would go to",
    "x0": "the image each block believes in",
    "tuned": "the image each block believes in, through a tuned lens",
    "jacobian": "the image each block points at, by the mean Jacobian of its own tokens",
    "jacobian_summed": "the image each block points at, by the mean Jacobian summed over tokens",
}


class LensResult(NamedTuple):
    """What reading a capture has written."""

    generation_id: str
    numbers: Path
    """lens.json: how far each block is from the final answer."""
    pictures: dict[Lens, Path]
    """The folder of the decoded pictures, of each lens."""
    sheets: dict[Lens, Path]
    """The contact sheet of each lens: steps across, blocks down."""


class CaptureResult(NamedTuple):
    """Where everything of a generation is."""

    generation_id: str
    folder: Path
    picture: Path
    capture: Path
    """What was recorded: `read_capture` opens it, and `torch.load` gives a dictionary."""
    metadata: Path
    lens: LensResult | None
    """None: nothing was decoded."""


def read_capture(run: str | Path | CaptureResult = "latest", *, output_dir: str | Path = "output") -> Capture:
    """Opens a capture. Tensors are mapped from the file when they are asked for.

    `run` is what `capture` returned, the path of a capture's file or of the folder of its run, or the name of a run
    below `output_dir`: its generation id, or "latest" for the newest.

    `capture.read("double.3.img", step=2)` is [batch, tokens, d]; `capture.sites`, `capture.steps` and
    `capture.metadata` say what there is. Raises FluxIRError for a run or a file that is missing, broken, or no capture.
    """
    return load_capture(capture_file(run, Path(output_dir)))


def read_lens(
    generation_id: str | Path | CaptureResult = "latest",
    *,
    lens: LensWord = "both",
    fitted_lens: str | Path | None = None,
    output_dir: str | Path = "output",
    decode_batch: int | None = None,
    device: str | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    progress: Watch = unwatched,
) -> LensResult:
    """Decode what each block of an earlier run would have drawn, without sampling again.

    The run is named as for `read_capture`; its pictures, lens.json and contact sheets are written anew. The
    weights are those the capture was made with, unless `checkpoint` and `ae_checkpoint` name others; its LoRAs are
    merged again. `lens` "tuned", "jacobian" and "jacobian_summed" read the clean image through `fitted_lens`, a folder
    that `train_lens` made of these weights.

    Raises FluxIRError for a run that is not there or has nothing to decode, before anything heavy where possible.
    """

    def announce(text: str) -> None:
        progress(Note(text))

    check_words(read_lens, {"lens": lens, "dtype": dtype})
    fitted = fitted_lens_of(lens, fitted_lens)
    file = capture_file(generation_id, Path(output_dir))
    folder = run_of(file)
    capture = load_capture(file)
    readable_sites(capture)  # raises where nothing can be read, before a weight is looked for
    earlier = earlier_report(folder)
    made_with = read_json(folder.find_metadata()).get("files", {})
    settings = with_loras(ModelSettings(device=device, dtype=dtype), capture.metadata.get("loras", []))
    spec = get_spec(capture.metadata["model"])
    transformer_source = locate_transformer(
        spec, checkpoint, recorded=recorded_path(made_with, "transformer"), announce=announce
    )
    autoencoder_source = locate_autoencoder(
        spec,
        ae_checkpoint,
        checkpoint=checkpoint,
        recorded=recorded_path(made_with, "autoencoder"),
        announce=announce,
    )
    loras = read_loras(spec, settings.lora, settings.lora_strength, announce)
    if fitted is not None:
        quantize = capture.metadata.get("quantize")
        weights = lens_weights(ModelSource(transformer_source, None, None, tuple(loras), quantize))
        fitted.check_weights(spec.name, weights, spec.flux.hidden_size)
        fitted.check(capture, has_guidance=spec.flux.guidance_embed)
    if (codes := capture.metadata.get("quantize")) is not None:
        announce(f"quantised: {codes}, the blocks of the run; what a lens reads them with is not quantised")
    machine = settings.settle_machine(recorded=capture.dtype)
    placement, compute = machine.placement, machine.compute
    for note in (f"{spec.name} on {machine}", *machine.notes()):
        announce(note)
    if compute.dtype != capture.dtype:
        recorded = str(capture.dtype).removeprefix("torch.")
        announce(f"note: the capture is {recorded}: its last block gives the sampler's next state but for rounding")
    with phase(progress, "load"):
        # A lens reads out, and runs no block: none of their weights is read, 23.8 GB for FLUX.1.
        model = stream_flux(spec, transformer_source, placement.transformer, compute.dtype, loras=loras)
        autoencoder = load_autoencoder(spec, autoencoder_source, placement.ae_decoder)
    return decode_run(
        progress,
        folder,
        capture,
        model,
        autoencoder,
        LENSES[lens],
        earlier=earlier,
        batch=decode_batch,
        other_weights=checkpoint is not None,
        fitted=fitted,
    )


def fitted_lens_of(lens: LensWord, path: str | Path | None) -> FittedLens | None:
    """The fitted lens that is asked for. Raises FluxIRError where the lens lacks its file, or a file its lens."""
    if (lens in FITTED) != (path is not None):
        words = " or ".join(f"--lens {word}" for word in FITTED)
        got = f"--lens {lens} without it" if path is None else f"--fitted_lens with --lens {lens}"
        raise FluxIRError(
            f"--fitted_lens goes with {words}: got {got}",
            hint="make one: flux-ir train-lens" if path is None else "choose one of these, or leave --fitted_lens out",
        )
    return None if path is None else FITTED[lens](path)


def lens_weights(source: ModelSource) -> str:
    """The digest a fitted lens is bound to: of the transformer alone, with its LoRAs and how it is quantised."""
    return weights_digest(source._replace(autoencoder=None, text=None), autoencoder=False)


def capture_file(run: object, output_dir: Path) -> Path:
    """The capture of a run, which is named as for `read_capture`. Raises FluxIRError for what names none."""
    match run:
        case CaptureResult():
            return run.capture
        case str() if is_run_name(run):
            return find_run(output_dir, run).find_capture()
        case str() | Path():
            path = Path(run).absolute()
            return newest_capture(path) if path.is_dir() else path
        case _:
            raise FluxIRError(
                f"a run is a path, a generation id, or what capture returned: got {type(run).__name__}",
                hint='pass the folder of the run, or "latest"',
            )


def decode_run(
    progress: Watch,
    folder: RunFolder,
    capture: Capture,
    model: Transformer,
    autoencoder: AutoEncoder,
    lenses: Sequence[Lens],
    *,
    earlier: dict[str, Any] | None = None,
    batch: int | None = None,
    other_weights: bool = False,
    fitted: FittedLens | None = None,
) -> LensResult:
    """Every picture of these lenses, `lens.json`, and one contact sheet per lens.

    `earlier` is what `lens.json` held before: the numbers of the lenses that are not read now are kept.
    `other_weights`: the weights may be others than the capture was made with, as the user wishes.
    """
    decoder = LensDecoder(
        capture,
        model,
        autoencoder,
        folder,
        lenses,
        final_picture=final_picture(folder),
        batch=batch,
        other_weights=other_weights,
        fitted=fitted,
    )
    pictures = list(follow(progress, "decode", decoder.pictures(), total=len(decoder)))
    if decoder.drift > ROUNDING_DRIFT:
        progress(
            Note(
                "note: these are not the weights the capture was made with: read at the last block, the next state is "
                f"{decoder.drift:.1%} off the sampler's"
            )
        )
    write_json(folder.lens_json, lens_report(decoder, pictures, earlier))
    with phase(progress, "contact sheet"):
        for lens in lenses:
            draw_contact_sheet(folder, capture, lens)
    return LensResult(
        generation_id=folder.generation_id,
        numbers=folder.lens_json,
        pictures={lens: folder.decoded(lens) for lens in lenses},
        sheets={lens: folder.sheet(lens) for lens in lenses},
    )


def final_picture(folder: RunFolder) -> Pixels | None:
    """The run's picture as it was saved, or None if it is gone: what every decoded picture is compared with."""
    return read_picture(folder.image()) if folder.image().exists() else None


def earlier_report(folder: RunFolder) -> dict[str, Any] | None:
    """The run's `lens.json`, or None if there is none yet. Raises FluxIRError if it is broken."""
    return read_json(folder.lens_json) if folder.lens_json.exists() else None


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
    metadata, every = capture.metadata, math.ceil(len(capture.steps) / MOST_COLUMNS)
    steps = capture.steps[::every]
    columns = [SheetColumn(f"step {step}, t {capture.context(step).t_curr:.2f}", str(step)) for step in steps]
    rows = [
        SheetRow(
            f"{site.kind} {site.block}", [folder.decoded_image(lens, step, site.kind, site.block) for step in steps]
        )
        for site in readable_sites(capture)
    ]
    subtitle = f"{metadata['model']}, seed {metadata['seed']}: {READINGS[lens]} ({lens})"
    if every > 1:
        subtitle += f", one step in {every}"
    draw_sheet(metadata["prompt"], subtitle, columns, rows, folder.sheet(lens))
