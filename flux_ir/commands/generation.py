"""One generation from prompt to pictures: the heavy half of the command `capture`.

Everything that can be wrong with the options is found in `settle`, before a weight is read.
"""

import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flux_ir.capture.recorder import Recorder
from flux_ir.capture.store import CapturePlan, CaptureWriter, load_capture
from flux_ir.commands.capture import CaptureOptions
from flux_ir.commands.reading import LENSES, decode_run
from flux_ir.commands.report import Report, peak_memory
from flux_ir.errors import FluxIRError
from flux_ir.layout import RunFolder, complete_file, new_generation_id, write_json
from flux_ir.models.placement import Placement, plan
from flux_ir.models.registry import ModelSpec, get_spec
from flux_ir.models.sources import ModelSource, locate_model
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.options import to_json_dict
from flux_ir.sampling.generate import check_size, decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import image_ids
from flux_ir.sampling.schedule import get_schedule
from flux_ir.shapes import PackedLatent
from flux_ir.sites import Site, all_sites, block_outputs, match_sites

SEEDS = 2**31


class Job(NamedTuple):
    """A capture with every open question answered and every part of the model found."""

    spec: ModelSpec
    source: ModelSource
    placement: Placement
    dtype: torch.dtype
    width: int
    height: int
    seed: int
    timesteps: list[float]
    sites: list[Site]
    kept_steps: list[int]


def capture(options: CaptureOptions) -> None:
    """Sample, record, decode; print where everything is."""
    report = Report()
    job = settle(options, report)
    folder = RunFolder(options.output_dir, new_generation_id())
    report.results.print(f"generation id: {folder.generation_id}")
    where = f"{', '.join(job.placement.devices)} ({job.placement.reason})"
    report.note(f"{job.spec.name} on {where}, {options.dtype}, seed {job.seed}")
    with tidy(folder):
        suite = Suite(job.spec, job.source, job.placement, job.dtype)
        for _ in report.follow("load", suite.load(), total=Suite.PARTS):
            pass
        text = embed(suite, options.prompt, report)
        written = generate(options, job, folder, suite, text, report)
        if options.should_decode_intermediates:
            with suite.transformer() as model, suite.autoencoder() as autoencoder:
                recorded = load_capture(written["capture"])
                written |= decode_run(report, folder, recorded, model, autoencoder, LENSES[options.lens])
    report.table(f"generation {folder.generation_id}", written, peak_memory())


def settle(options: CaptureOptions, report: Report) -> Job:
    """Answer every question the options leave open. Raises FluxIRError for what a user can mend."""
    spec = get_spec(options.model)
    width, height = options.width or spec.default_side_px, options.height or spec.default_side_px
    check_size(height, width)
    num_steps = options.num_steps or spec.default_steps
    flux = spec.flux
    sites = block_outputs(flux.depth, flux.depth_single_blocks)
    if options.sites is not None:
        sites = match_sites(options.sites, all_sites(flux.depth, flux.depth_single_blocks))
    return Job(
        spec=spec,
        placement=plan(
            torch.cuda.device_count(), device=options.device, multi_gpu=options.multi_gpu, offload=options.offload
        ),
        dtype=getattr(torch, options.dtype),
        width=width,
        height=height,
        seed=secrets.randbelow(SEEDS) if options.seed is None else options.seed,
        timesteps=get_schedule(num_steps, image_ids(1, height, width).shape[1], shift=spec.shifts_schedule),
        sites=sites,
        kept_steps=check_steps(options.steps, num_steps),
        source=locate_model(spec, options.checkpoint, options.ae_checkpoint, announce=report.note),
    )


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
    """Makes the run's folder, and removes it again if the run fails before anything was finished in it."""
    folder.intermediates.mkdir(parents=True)
    try:
        yield
    finally:
        for empty in (folder.intermediates, folder.path):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


def embed(suite: Suite, prompt: str, report: Report) -> TextEmbedding:
    """The prompt's embedding; what the encoders cannot make sense of is said in a note."""
    with report.phase("text"), suite.text_encoders() as text:
        for note in text.t5.notes(prompt):
            report.note(f"note: {suite.spec.name}: {note}")
        return encode(text.t5, text.clip, [prompt])


def generate(
    options: CaptureOptions, job: Job, folder: RunFolder, suite: Suite, text: TextEmbedding, report: Report
) -> dict[str, Path]:
    """Sample with the recorder on, then save the picture. What was written, by name."""
    timestamp = time.strftime("%Y%m%d_%H%M%S")
    files = {
        "picture": folder.image(),
        "capture": folder.capture_file(timestamp, job.spec.name),
        "metadata": folder.metadata_file(timestamp, job.spec.name),
    }
    device = job.placement.transformer
    noise = noise_for([job.seed], job.height, job.width, device, job.dtype)
    inputs = prepare(noise, text, job.height, job.width)
    metadata = describe(options, job, folder, timestamp)
    planned = CapturePlan(
        flux=job.spec.flux,
        sites=job.sites,
        timesteps=job.timesteps,
        txt_tokens=inputs.txt.shape[1],
        img_tokens=inputs.img.shape[1],
        guidance=options.guidance,
        metadata=metadata,
        steps=job.kept_steps,
        dtype=job.dtype,
    )
    with (
        suite.transformer() as model,
        CaptureWriter(files["capture"], planned) as sink,
        Recorder(model, job.sites, sink, steps=job.kept_steps),
    ):
        steps = sample(model, inputs, job.timesteps, options.guidance)
        *_, last = report.follow("sample", steps, total=len(job.timesteps) - 1)
    write_json(files["metadata"], metadata | {"options": to_json_dict(options), **surroundings(job)})
    with report.phase("picture"):
        save_picture(options, job, suite, last.after, files["picture"])
    return files


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
        "guidance": options.guidance,
        "timestamp": timestamp,
    }


def surroundings(job: Job) -> dict[str, Any]:
    """What else the numbers depend on: versions, devices, precision, files."""
    return {
        "captured_steps": job.kept_steps,
        "sites": [str(site) for site in job.sites],
        "dtype": str(job.dtype).removeprefix("torch."),
        "devices": {name: getattr(job.placement, name) for name in Placement.PARTS},
        "offload": job.placement.offload,
        "files": {"transformer": str(job.source.transformer.path), "autoencoder": str(job.source.autoencoder.path)},
        "versions": {
            "flux_ir": version("flux-ir"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "rounding": "blocks run in dtype; flow time and guidance are rounded to it before they are embedded; "
        "RMS norms, rotary angles and the autoencoder's latents are float32, its convolutions bfloat16",
    }


def save_picture(options: CaptureOptions, job: Job, suite: Suite, latent: PackedLatent, path: Path) -> None:
    """Decode the finished latent and save it with what made it."""
    with suite.autoencoder() as autoencoder:
        pixels = decode(autoencoder, latent, job.height, job.width)
    prompt = options.prompt if options.add_sampling_metadata else None
    with complete_file(path) as beside:
        beside.write_bytes(jpeg_bytes(pixels, model=job.spec.name, prompt=prompt))
