"""What quantising does to a model: to the weights of each block, to what it puts out, and to a picture.

Both networks go through the same steps side by side. Nothing is stored but the outputs of one step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from flux_ir.api.arguments import check_least
from flux_ir.api.model_settings import Machine, PictureSettings, SettledPicture, identity_of_pictures
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, versions, write_json
from flux_ir.lens.measures import json_number, psnr_db, relative_distance
from flux_ir.models.architecture import TransformerParams, block_names, transformer_of
from flux_ir.models.checkpoints.load import Weights
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.memory import elements
from flux_ir.models.placement import OffloadWord
from flux_ir.models.quantisation import Method, codes_bytes, quantise, quantised_weights, widen
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode
from flux_ir.sampling.generate import Inputs, decode, noise_for, prepare
from flux_ir.shapes import Pixels, Tokens
from flux_ir.studies.paired_runs import ALONE, REFERENCE, PairedRun, PairedRuns

DEFAULT_PROMPT = "a beautiful landscape"


class BlockErrors(NamedTuple):
    """Relative errors of one block, ||quantised - exact|| / ||exact||; those of outputs are means over the steps."""

    block: str
    weights: float
    """Of its quantised matrices, taken together."""
    output: float
    """Of what it puts out, given what the exact block was given: what its own codes do."""
    output_in_run: float
    """Of what it puts out in the quantised run: what all codes before it, at all steps, have led to."""


@dataclass(frozen=True)
class QuantizedComparison:
    """What `compare_quantized` found, and where it lies."""

    model: str
    quantize: Method
    blocks: Sequence[BlockErrors]
    """In depth order."""
    picture_psnr_db: float | None
    """Of the quantised run's picture against the exact one's; None: they are equal."""
    latent_error: float
    """Relative error of the finished latent."""
    bytes_exact: int
    """Of the transformer's weights, in the compute dtype."""
    bytes_quantized: int
    """Of its codes, and of what is not quantised."""
    folder: Path
    numbers: Path
    """All of this as JSON."""
    pictures: Path
    """Both pictures side by side, the exact one left."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings(PictureSettings):
    """What is compared; see `compare_quantized`."""

    prompt: str | None = None
    seed: int = 0
    output_dir: str | Path = "quantized"


def compare_quantized(
    prompt: str | None = None,
    *,
    model: str = "flux-schnell",
    quantize: Method = "nf4",
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    num_steps: int | None = None,
    guidance: float | None = None,
    device: str | None = None,
    offload: OffloadWord = False,
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    output_dir: str | Path = "quantized",
    progress: Watch = unwatched,
) -> QuantizedComparison:
    """How much a model changes when the weights of its blocks are quantised, on the picture of one prompt and seed.

    Of every block: the relative error of its weights, of its output given the exact block's input, and of its output
    in a run of its own from the same noise; and of both runs the pictures. The exact network and the codes are in
    memory together, unless `offload` says otherwise. The folder `MODEL-METHOD` below `output_dir` is written anew.

    Raises FluxIRError for what a user can mend.
    """
    settings = CompareSettings(
        prompt=prompt,
        model=model,
        quantize=quantize,
        width=width,
        height=height,
        seed=seed,
        num_steps=num_steps,
        guidance=guidance,
        device=device,
        offload=offload,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        output_dir=output_dir,
    )
    return run_comparison(settings, progress)


def run_comparison(settings: CompareSettings, progress: Watch = unwatched) -> QuantizedComparison:
    """The same, with its settings in one object."""
    check_least(vars(settings))
    method = settings.quantize
    if isinstance(settings.model, Suite) or method is None:
        raise FluxIRError("a model is compared by its name and with a method", hint="--model flux-tiny --quantize nf4")
    picture, exact_settings = settings.settle_picture(), replace(settings, quantize=None)
    machine = exact_settings.settle_machine()
    quantized_machine = settings.settle_machine()
    exact = exact_settings.suite(machine, progress)
    for note in (f"{exact.spec.name} on {machine}", *machine.notes()):
        progress(Note(note))
    quantized = Suite(
        exact.spec,
        exact.source._replace(quantize=method),
        quantized_machine.placement,
        exact.dtype,
        announce=lambda line: progress(Note(line)),
    )
    prompt = DEFAULT_PROMPT if settings.prompt is None else settings.prompt
    inputs = _inputs(exact, prompt, settings.seed, picture, progress)
    blocks = block_names(exact.spec.flux)
    of_weights = dict(follow(progress, "weights", weight_errors(exact, method), total=len(blocks)))
    with exact.transformer() as ours, quantized.transformer() as theirs:
        compared = BlockOutputs(exact.spec.flux)
        run = PairedRun("quantized", theirs, inputs, picture.guidance)
        both = PairedRuns(ours, inputs, picture.timesteps, picture.guidance, [run], compared.take, alone=theirs)
        *_, last = follow(progress, "sample", both.steps(), total=picture.num_steps)
    (width, height), latents = picture.grid, (last[REFERENCE].after, last["quantized"].after)
    with exact.autoencoder() as autoencoder:
        pixels = [decode(autoencoder, latent, height, width, exact.dtype) for latent in latents]
    folder = Path(settings.output_dir) / f"{exact.spec.name}-{method}"
    params = exact.spec.flux
    kept = elements(params).total - sum(rows * columns for rows, columns in quantised_weights(params).values())
    found = QuantizedComparison(
        model=exact.spec.name,
        quantize=method,
        blocks=[
            BlockErrors(name, of_weights[name], *(_mean(errors[name]) for errors in (compared.alone, compared.in_run)))
            for name in blocks
        ],
        picture_psnr_db=psnr_db(pixels[1], pixels[0]),
        latent_error=relative_distance(latents[1], latents[0]),
        bytes_exact=elements(params).total * exact.dtype.itemsize,
        bytes_quantized=codes_bytes(params, method) + kept * exact.dtype.itemsize,
        folder=folder,
        numbers=folder / "comparison.json",
        pictures=folder / "pictures.png",
    )
    with phase(progress, "files"):
        _write(found, compared, pixels, _identity(exact, picture, machine, prompt, settings.seed))
    return found


def _inputs(suite: Suite, prompt: str, seed: int, picture: SettledPicture, progress: Watch) -> Inputs:
    """What both runs begin with."""
    with phase(progress, "text"), suite.text_encoders() as encoders, torch.no_grad():
        text = encode(encoders.t5, encoders.clip, [prompt])
    suite.free_text_encoders()
    width, height = picture.grid
    return prepare(noise_for([seed], height, width, suite.placement.transformer, suite.dtype), text, height, width)


def weight_errors(suite: Suite, method: Method) -> Iterator[tuple[str, float]]:
    """The relative error of the quantised weights of each block, in depth order: quantised anew, in float32."""
    params, source = suite.spec.flux, suite.source
    with torch.device("meta"):
        blank = transformer_of(params)
    read_into = Weights(blank, source.transformer, source.loras).read_into
    for block in block_names(params):
        lost = whole = 0.0
        for name, size in quantised_weights(params).items():
            if name.startswith(f"{block}."):
                weight, widened = torch.empty(size), torch.empty(size)
                read_into(weight, name)
                widen(quantise(weight, method), widened, method)
                whole += weight.double().square().sum().item()
                lost += (widened - weight).double().square().sum().item()
        yield block, (lost / whole) ** 0.5 if whole else 0.0


class BlockOutputs:
    """The relative errors of the outputs of blocks, as `PairedRuns` tells them."""

    def __init__(self, params: TransformerParams) -> None:
        self.alone: Mapping[str, list[float]] = {name: [] for name in block_names(params)}
        """Of every block and step, given the exact run's input."""
        self.in_run: Mapping[str, list[float]] = {name: [] for name in block_names(params)}

    def take(self, run: str, block: str, exact: Tokens, quantized: Tokens) -> None:
        """The outputs of one block at one step."""
        (self.alone if run == ALONE else self.in_run)[block].append(relative_distance(quantized, exact))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _identity(suite: Suite, picture: SettledPicture, machine: Machine, prompt: str, seed: int) -> dict[str, Any]:
    return {
        **identity_of_pictures(suite, picture),
        "prompt": prompt,
        "seed": seed,
        "dtype_reason": machine.compute.reason,
        "offload": machine.placement.offload,
        "versions": versions("torch"),
    }


def _write(
    found: QuantizedComparison, compared: BlockOutputs, pixels: Sequence[Pixels], identity: Mapping[str, Any]
) -> None:
    """The numbers and both pictures."""
    rows = [
        {name: json_number(value) if isinstance(value, float) else value for name, value in row._asdict().items()}
        | {
            "output_by_step": [json_number(value) for value in compared.alone[row.block]],
            "output_in_run_by_step": [json_number(value) for value in compared.in_run[row.block]],
        }
        for row in found.blocks
    ]
    numbers = {name: value for name, value in asdict(found).items() if not isinstance(value, Path)}
    write_json(found.numbers, {**numbers, **identity, "blocks": rows})
    side_by_side = np.concatenate([pixel[0].numpy() for pixel in pixels], axis=1)
    with complete_file(found.pictures) as beside:
        Image.fromarray(side_by_side).save(beside, format="PNG")
