"""One generation from prompt to pictures: the heavy half of the command `capture`.

What can be wrong is found from the cheapest on: the options in `settle`, then the folder, then the files of the model,
then the space on the disk; and only then a weight is read.
"""

import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flux_ir.commands.capture import CaptureOptions
from flux_ir.commands.cli.option import to_json_dict
from flux_ir.commands.reading import LENSES, decode_run
from flux_ir.commands.report import Report, peak_memory
from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder, complete_file, disk_error, new_generation_id, write_json
from flux_ir.lens.readout import image_outputs
from flux_ir.models.compute_dtype import ComputeDtype, choose_dtype
from flux_ir.models.placement import Placement, plan
from flux_ir.models.registry import ModelSpec, get_spec
from flux_ir.models.sources import locate_model
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.recorder import Recorder, Sink
from flux_ir.recording.store import CapturePlan, CaptureWriter, load_capture
from flux_ir.sampling.generate import check_size, decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import image_ids
from flux_ir.sampling.schedule import get_schedule
from flux_ir.shapes import PackedLatent
from flux_ir.sites import Site, all_sites, block_outputs, match_sites

SEEDS = 2**31
MOST_EXIF_BYTES = 60_000  # a JPEG's EXIF data ends at 64 kB


class Files(NamedTuple):
    """What a generation writes before anything is decoded."""

    picture: Path
    capture: Path
    metadata: Path


class Job(NamedTuple):
    """A capture with every open question answered."""

    spec: ModelSpec
    placement: Placement
    compute: ComputeDtype
    width: int
    height: int
    seed: int
    guidance: float
    img_tokens: int
    timesteps: list[float]
    sites: list[Site]
    kept_steps: list[int]


def capture(options: CaptureOptions) -> None:
    """Sample, record, decode; print where everything is."""
    report = Report()
    job = settle(options)
    folder = RunFolder(options.output_dir, new_generation_id())
    with tidy(folder):
        source = locate_model(job.spec, options.checkpoint, options.ae_checkpoint, announce=report.note)
        report.results.print(f"generation id: {folder.generation_id}")
        where = f"{', '.join(job.placement.devices)} ({job.placement.reason})"
        report.note(f"{job.spec.name} on {where}, {job.compute}, seed {job.seed}")
        if job.compute.warning is not None:
            report.note(f"note: {job.compute.warning}")
        suite = Suite(job.spec, source, job.placement, job.compute.dtype)
        files = generate(options, job, folder, suite, report)
        written = files._asdict()
        if options.should_decode_intermediates:
            with suite.transformer() as model, suite.autoencoder() as autoencoder:
                recorded = load_capture(files.capture)
                written |= decode_run(report, folder, recorded, model, autoencoder, LENSES[options.lens])
    report.table(f"generation {folder.generation_id}", written, peak_memory())


def settle(options: CaptureOptions) -> Job:
    """Answer every question the options leave open. Raises FluxIRError for what a user can mend."""
    check_text(options)
    spec = get_spec(options.model)
    width, height = options.width or spec.default_side_px, options.height or spec.default_side_px
    check_size(height, width)
    num_steps = options.num_steps or spec.default_steps
    img_tokens = image_ids(1, height, width).shape[1]
    placement = plan(
        torch.cuda.device_count(), device=options.device, multi_gpu=options.multi_gpu, offload=options.offload
    )
    return Job(
        spec=spec,
        placement=placement,
        compute=choose_dtype(options.dtype, placement.devices),
        width=width,
        height=height,
        seed=secrets.randbelow(SEEDS) if options.seed is None else options.seed,
        guidance=spec.default_guidance if options.guidance is None else options.guidance,
        img_tokens=img_tokens,
        timesteps=get_schedule(num_steps, img_tokens, shift=spec.shifts_schedule),
        sites=choose_sites(options, spec),
        kept_steps=check_steps(options.steps, num_steps),
    )


def check_text(options: CaptureOptions) -> None:
    """Raises FluxIRError for text that no file could hold: broken UTF-8, or a prompt too long for the picture."""
    for name, value in to_json_dict(options).items():
        try:
            size = len(value.encode()) if isinstance(value, str) else 0
        except UnicodeEncodeError:  # bytes of another encoding reach Python as lone surrogates
            raise FluxIRError(
                f"--{name} must be UTF-8 text: got {value!r}", hint="check the encoding of the place it came from"
            ) from None
        if name == "prompt" and options.add_sampling_metadata and size > MOST_EXIF_BYTES:
            raise FluxIRError(
                f"a prompt in the picture's EXIF data has at most {MOST_EXIF_BYTES} bytes: got {size}",
                hint="shorten it, or leave it out with --add_sampling_metadata False",
            )


def choose_sites(options: CaptureOptions, spec: ModelSpec) -> list[Site]:
    """The sites to record. Raises FluxIRError if they match nothing, or nothing of them can be decoded but shall be."""
    flux = spec.flux
    if options.sites is None:
        return block_outputs(flux.depth, flux.depth_single_blocks)
    sites = match_sites(options.sites, all_sites(flux.depth, flux.depth_single_blocks))
    if options.should_decode_intermediates and not image_outputs(sites):
        raise FluxIRError(
            f"only image outputs of whole blocks can be decoded, and --sites keeps none: it keeps {sites[0]} and such",
            hint="add some, such as double.*.img or single.*, or pass --should_decode_intermediates False",
        )
    return sites


def check_steps(steps: tuple[int, ...] | None, num_steps: int) -> list[int]:
    """The steps to keep, in order, each once. Raises FluxIRError for one that the schedule does not have."""
    if steps is None:
        return list(range(num_steps))
    if beyond := [step for step in steps if step >= num_steps]:
        raise FluxIRError(
            f"--steps counts from 0 to {num_steps - 1} with {num_steps} steps: got {', '.join(map(str, beyond))}",
            hint="choose other --steps or more --num_steps",
        )
    return sorted(set(steps))


@contextmanager
def tidy(folder: RunFolder) -> Iterator[None]:
    """Makes the run's folder; whatever folder was made here and is still empty at the end is removed again.

    Raises FluxIRError where no folder can be made.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder.intermediates, *folder.intermediates.parents) if not path.exists()]
            folder.intermediates.mkdir(parents=True)
        except OSError as error:
            raise disk_error(folder.path, error) from error
        yield
    finally:
        for path in made:
            with suppress(OSError):  # it has something in it
                path.rmdir()


def generate(options: CaptureOptions, job: Job, folder: RunFolder, suite: Suite, report: Report) -> Files:
    """Sample with the recorder on, then save the picture."""
    timestamp = time.strftime("%Y%m%d_%H%M%S")
    files = Files(
        picture=folder.image(),
        capture=folder.capture_file(timestamp, job.spec.name),
        metadata=folder.metadata_file(timestamp, job.spec.name),
    )
    metadata = describe(options, job, folder, timestamp)
    planned = planned_file(options, job, metadata)
    with CaptureWriter(files.capture, planned) as sink:  # takes its disk space before a weight is read
        latent = paint(options, job, suite, sink, report)
    write_json(files.metadata, metadata | {"options": to_json_dict(options), **surroundings(job, suite)})
    with report.phase("picture"):
        save_picture(options, job, suite, latent, files.picture)
    return files


def planned_file(options: CaptureOptions, job: Job, metadata: dict[str, Any]) -> CapturePlan:
    """What the capture file will hold."""
    return CapturePlan(
        flux=job.spec.flux,
        sites=job.sites,
        timesteps=job.timesteps,
        txt_tokens=job.spec.text_tokens,
        img_tokens=job.img_tokens,
        guidance=job.guidance,
        metadata=metadata,
        steps=job.kept_steps,
        dtype=job.compute.dtype,
    )


def paint(options: CaptureOptions, job: Job, suite: Suite, sink: Sink, report: Report) -> PackedLatent:
    """Load the model and walk from noise to the finished latent, with everything recorded into `sink`."""
    for _ in report.follow("load", suite.load(), total=Suite.PARTS):
        pass
    text = embed(suite, options.prompt, report)
    noise = noise_for([job.seed], job.height, job.width, job.placement.transformer, job.compute.dtype)
    inputs = prepare(noise, text, job.height, job.width)
    latent = inputs.img
    with suite.transformer() as model, Recorder(model, job.sites, sink, steps=job.kept_steps):
        steps = sample(model, inputs, job.timesteps, job.guidance)
        for step in report.follow("sample", steps, total=len(job.timesteps) - 1):
            latent = step.after  # only the last is kept: memory does not grow with the steps
    return latent


def embed(suite: Suite, prompt: str, report: Report) -> TextEmbedding:
    """The prompt's embedding; what the encoders cannot make sense of is said in a note."""
    with report.phase("text"), suite.text_encoders() as text:
        for note in dict.fromkeys(text.t5.notes(prompt) + text.clip.notes(prompt)):
            report.note(f"note: {suite.spec.name}: {note}")
        return encode(text.t5, text.clip, [prompt])


def describe(options: CaptureOptions, job: Job, folder: RunFolder, timestamp: str) -> dict[str, Any]:
    """The metadata that stands in the capture file and in the JSON beside it."""
    return {
        "generation_id": folder.generation_id,
        "model": job.spec.name,
        "prompt": options.prompt,
        "width": job.width,
        "height": job.height,
        "num_steps": len(job.timesteps) - 1,
        "timesteps": job.timesteps,
        "seed": job.seed,
        "guidance": job.guidance,
        "timestamp": timestamp,
    }


def surroundings(job: Job, suite: Suite) -> dict[str, Any]:
    """What else the numbers depend on: versions, devices, precision, files."""
    weights = {"transformer": suite.source.transformer, "autoencoder": suite.source.autoencoder}
    return {
        "captured_steps": job.kept_steps,
        "sites": [str(site) for site in job.sites],
        "dtype": job.compute.name,
        "dtype_reason": job.compute.reason,
        "devices": {name: getattr(job.placement, name) for name in Placement.PARTS},
        "offload": job.placement.offload,
        "files": {
            part: {"path": str(file.path.absolute()), "origin": file.origin} for part, file in weights.items() if file
        },
        "versions": {
            # Not from the installed package: a clone that is run in place has none.
            "flux_ir": import_module("flux_ir").__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "rounding": "blocks run in dtype; flow time and guidance are rounded to it before they are embedded; "
        "RMS norms, rotary angles and the autoencoder's latents are float32, its convolutions in dtype",
    }


def save_picture(options: CaptureOptions, job: Job, suite: Suite, latent: PackedLatent, path: Path) -> None:
    """Decode the finished latent and save it with what made it."""
    with suite.autoencoder() as autoencoder:
        pixels = decode(autoencoder, latent, job.height, job.width, suite.dtype)
    prompt = options.prompt if options.add_sampling_metadata else None
    with complete_file(path) as beside:
        beside.write_bytes(jpeg_bytes(pixels, model=job.spec.name, prompt=prompt))
