"""One generation from prompt to pictures: `run_capture` is the whole of it, and what it calls follows in its order.

What can be wrong is found from the cheapest on: the settings in `settle`, then the folder, then the files of the model,
then the space on the disk; and only then a weight is read.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.lens import LENSES, CaptureResult, LensWord, decode_run, fitted_lens_of, lens_weights
from flux_ir.api.model_settings import BegunPictureSettings, Machine, SettledPicture, provenance_of
from flux_ir.api.models import read_prompt_embeds
from flux_ir.api.progress import Begun, Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, versions, write_json
from flux_ir.layout import RunFolder, new_generation_id
from flux_ir.lens.readout import image_outputs
from flux_ir.models.checkpoints.locate import ModelSource
from flux_ir.models.checkpoints.paths import CACHE, HUB, PACKAGE
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import ModelSpec
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.reader import load_capture
from flux_ir.recording.recorder import Recorder, TextRecorder, TextSink
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sampling.generate import (
    OTHER_FAMILY,
    check_steps,
    decode,
    noise_for,
    prepare,
    round_trip_error,
    sample,
)
from flux_ir.sampling.image import MOST_EXIF_BYTES, jpeg_bytes
from flux_ir.sampling.pictures import PictureGiven
from flux_ir.shapes import PackedLatent
from flux_ir.sites import Site, SiteNames, block_outputs, site_names, sites_among
from flux_ir.steering.apply import Steering, steered, steered_text
from flux_ir.steering.edits import Edit, as_edits

SEEDS = 2**31  # a seed that is drawn is below this; one that is asked for may be larger
DEFAULT_PROMPT = "a beautiful landscape"


@dataclass(frozen=True, kw_only=True)
class CaptureSettings(BegunPictureSettings):
    """What a capture is asked for; see `capture`. What is None is settled by the model or the machine."""

    prompt: str | None = None
    prompt_embeds: str | Path | None = None
    seed: int | None = None
    add_sampling_metadata: bool = True
    edit: str | Path | Edit | Sequence[Edit] | None = None
    sites: SiteNames | None = None
    steps: Iterable[int] | None = None
    should_decode_intermediates: bool = True
    lens: LensWord = "both"
    fitted_lens: str | Path | None = None
    output_dir: str | Path = "output"

    def to_json(self) -> dict[str, Any]:
        """The settings by name, as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        several = None if self.lora is None or isinstance(self.lora, str | Path) else [str(path) for path in self.lora]
        return values | {
            "lora": several or values["lora"],
            "model": self.model.spec.name if isinstance(self.model, Suite) else self.model,
            "sites": None if self.sites is None else list(site_names(self.sites)),
            "steps": None if self.steps is None else list(self.steps),
            "edit": None if self.edit is None else str(self.edit) if isinstance(self.edit, str | Path) else "given",
            **self.given_as_json(),
        }


class Job(NamedTuple):
    """A capture with every open question of its `CaptureSettings` answered, and nothing done yet."""

    spec: ModelSpec
    prompt: str
    text: TextEmbedding | None
    """None: the prompt is still to be encoded."""
    machine: Machine
    picture: SettledPicture
    seed: int
    txt_tokens: int
    sites: list[Site]
    """Those in the transformer."""
    text_sites: list[Site]
    """Those in the text encoders."""
    kept_steps: list[int]
    steering: Steering | None
    """The edits it is made with."""


def capture(
    prompt: str | None = None,
    *,
    prompt_embeds: str | Path | None = None,
    model: str | Suite = "flux-schnell",
    width: int | None = None,
    height: int | None = None,
    seed: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    init_image: PictureGiven | None = None,
    strength: float | None = None,
    reference_image: PictureGiven | None = None,
    keep_reference_size: bool = False,
    add_sampling_metadata: bool = True,
    edit: str | Path | Edit | Sequence[Edit] | None = None,
    sites: SiteNames | None = None,
    steps: Iterable[int] | None = None,
    should_decode_intermediates: bool = True,
    lens: LensWord = "both",
    fitted_lens: str | Path | None = None,
    device: str | None = None,
    multi_gpu: MultiGpuWord = False,
    offload: OffloadWord = False,
    compile: bool = False,
    attention: AttentionWord = "auto",
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    quantize: Method | None = None,
    output_dir: str | Path = "output",
    progress: Watch = unwatched,
) -> CaptureResult:
    """Sample one picture, record what `sites` put out at `steps`, and decode what each block would have drawn.

    The prompt is a text, or the file of its embeddings that `encode_prompt` has saved (`prompt_embeds`): then no text
    encoder is needed. Sizes are in px and multiples of 16; None for a size, `num_steps` or `guidance` is the model's
    own, None for `seed` draws one. `sites` None records every block's output, `steps` None every step; layers of the
    text encoders (`t5.*`) are recorded once, and read without a step. With `edit`, an `Edit`, several or their file,
    the run is steered, and what is recorded is what the edits made of it. `lens` says what is decoded
    (`should_decode_intermediates` False: nothing); the fitted ones read through `fitted_lens`, of `train_lens`.

    `init_image` is a picture to begin with: its file, a picture of Pillow, or pixels as `decode` gives them. Only the
    last `strength` of the steps are run (None: 0.6), and keep their numbers and times; at 1 nothing of it is left. It
    has the size of the run and is never scaled or cut. `reference_image` is a picture that models such as
    flux-dev-kontext are told beside the prompt. It is fitted to a size they were trained on, unless
    `keep_reference_size`; its tokens have sites of their own (`double.3.cond`).

    `model` is the name of one: `device`, `multi_gpu`, `offload` and `dtype` say where and in which precision,
    `compile` whether its blocks are compiled, `checkpoint` and `ae_checkpoint` where the weights are; `lora`, one file
    or several, is merged into them with `lora_strength`; `quantize` keeps the blocks as codes. Or it is a loaded
    `Suite`, which has settled all of these; it is not loaded again and stays as it is.

    Everything goes into a new folder below `output_dir`. Raises FluxIRError for what a user can mend, as early as
    it is known.
    """
    settings = CaptureSettings(
        prompt=prompt,
        prompt_embeds=prompt_embeds,
        model=model,
        width=width,
        height=height,
        seed=seed,
        num_steps=num_steps,
        guidance=guidance,
        init_image=init_image,
        strength=strength,
        reference_image=reference_image,
        keep_reference_size=keep_reference_size,
        add_sampling_metadata=add_sampling_metadata,
        edit=edit,
        sites=sites,
        steps=steps,
        should_decode_intermediates=should_decode_intermediates,
        lens=lens,
        fitted_lens=fitted_lens,
        device=device,
        multi_gpu=multi_gpu,
        offload=offload,
        compile=compile,
        attention=attention,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        quantize=quantize,
        output_dir=output_dir,
    )
    return run_capture(settings, progress)


def run_capture(settings: CaptureSettings, progress: Watch = unwatched) -> CaptureResult:
    """One capture, as `capture` describes it, with its settings in one object.

    The weights are loaded and the network runs inside the `with` of the capture file; the picture and the lens follow
    when that is complete.
    """
    job = settle(settings)
    fitted = fitted_lens_of(settings.lens, settings.fitted_lens)
    folder, timestamp = RunFolder(Path(settings.output_dir), new_generation_id()), time.strftime("%Y%m%d_%H%M%S")
    result = CaptureResult(
        generation_id=folder.generation_id,
        folder=folder.path,
        picture=folder.image(),
        capture=folder.capture_file(timestamp, job.spec.name),
        metadata=folder.metadata_file(timestamp, job.spec.name),
        lens=None,
    )
    with folder.made():
        suite = settings.suite(job.machine, progress, text=job.text is None)
        if fitted is not None:
            fitted.check_weights(job.spec.name, lens_weights(suite.source), job.spec.flux.hidden_size)
        metadata = describe(job, folder, timestamp, suite.source)
        announce(job, folder, progress)
        # The writer takes its disk space on entering: a disk that is too small is known before a weight is read.
        with CaptureWriter(result.capture, planned_file(job, metadata)) as sink:
            load(suite, job, progress)
            text = job.text or embed(suite, job, progress, sink)
            latent = sample_recorded(suite, job, text, sink, progress)
        for name, given in job.picture.given.given().items():
            with complete_file(folder.given_picture(name)) as beside:
                given.image().save(beside, "PNG")
        write_json(result.metadata, metadata | {"options": settings.to_json(), **provenance(job, suite)})
        with phase(progress, "picture"):
            save_picture(job, suite, latent, result.picture, progress, keep_prompt=settings.add_sampling_metadata)
        if not settings.should_decode_intermediates:
            return result
        with suite.transformer() as model, suite.autoencoder() as autoencoder:
            recorded, lenses = load_capture(result.capture), LENSES[settings.lens]
            if fitted is not None:
                fitted.check(recorded, has_guidance=job.spec.flux.guidance_embed)
            decoded = decode_run(progress, folder, recorded, model, autoencoder, lenses, fitted=fitted)
            return result._replace(lens=decoded)


def settle(settings: CaptureSettings) -> Job:
    """Answer every question that is left open. Raises FluxIRError for what a user can mend."""
    check_words(CaptureSettings, vars(settings))
    check_least(vars(settings))
    spec, picture, machine = settings.spec, settings.settle_picture(), settings.settle_machine()
    prompt, text = settle_text(settings.prompt, settings.prompt_embeds, spec)
    check_text(settings, prompt)
    sites = choose_sites(settings, spec)
    return Job(
        spec=spec,
        prompt=prompt,
        text=text,
        machine=machine,
        picture=picture,
        seed=secrets.randbelow(SEEDS) if settings.seed is None else settings.seed,
        txt_tokens=spec.text_tokens if text is None else text.txt.shape[1],
        sites=[site for site in sites if not site.per_prompt],
        text_sites=[site for site in sites if site.per_prompt],
        kept_steps=check_steps(settings.steps, picture.num_steps, picture.first_step),
        steering=settle_edit(settings, spec, picture, text, machine),
    )


def settle_text(
    prompt: str | None, prompt_embeds: str | Path | None, spec: ModelSpec
) -> tuple[str, TextEmbedding | None]:
    """The prompt, and its embedding if that is given as a file."""
    if prompt_embeds is None:
        return DEFAULT_PROMPT if prompt is None else prompt, None
    if prompt is not None:
        raise FluxIRError(
            "--prompt_embeds is what a prompt is encoded to: got --prompt as well",
            hint="leave one of them out; the file says which prompt it is of",
        )
    given = read_prompt_embeds(prompt_embeds, spec)
    return given.prompt or f"the embeddings in {Path(prompt_embeds).name}", given.text


def check_text(settings: CaptureSettings, prompt: str) -> None:
    """Raises FluxIRError for text that no file could hold: broken UTF-8, or a prompt too long for the picture."""
    for name, value in (settings.to_json() | {"prompt": prompt}).items():
        try:
            size = len(value.encode()) if isinstance(value, str) else 0
        except UnicodeEncodeError:  # bytes of another encoding reach Python as lone surrogates
            raise FluxIRError(
                f"--{name} must be UTF-8 text: got {value!r}", hint="check the encoding of the place it came from"
            ) from None
        if name == "prompt" and settings.add_sampling_metadata and size > MOST_EXIF_BYTES:
            raise FluxIRError(
                f"a prompt in the picture's EXIF data has at most {MOST_EXIF_BYTES} bytes: got {size}",
                hint="shorten it, or leave it out with --add_sampling_metadata False",
            )


def settle_edit(
    settings: CaptureSettings,
    spec: ModelSpec,
    picture: SettledPicture,
    text: TextEmbedding | None,
    machine: Machine,
) -> Steering | None:
    """The edits to make the run with."""
    if settings.edit is None:
        return None
    steering = Steering(
        as_edits(settings.edit),
        spec,
        grid=picture.grid,
        num_steps=picture.num_steps,
        first_step=picture.first_step,
        txt_tokens=None if text is None else text.txt.shape[1],
        device=machine.placement.transformer,
    )
    steering.check_encodes(encodes=text is None)
    return steering


def choose_sites(settings: CaptureSettings, spec: ModelSpec) -> list[Site]:
    """The sites to record. Raises FluxIRError if they match nothing, or nothing of them can be decoded but shall be."""
    if settings.sites is None:
        return block_outputs(spec.flux.depth, spec.flux.depth_single_blocks)
    sites = sites_among(settings.sites, spec.sites)
    if sites[0].per_prompt and settings.prompt_embeds is not None:
        raise FluxIRError(
            f"{sites[0]} is recorded while a prompt is encoded, and --prompt_embeds is one that was encoded before",
            hint="pass its --prompt, or leave the layers of text encoders out of --sites",
        )
    if settings.should_decode_intermediates and not image_outputs(sites):
        raise FluxIRError(
            f"only image outputs of whole blocks can be decoded, and --sites keeps none: it keeps {sites[0]} and such",
            hint="add some, such as double.*.img or single.*, or pass --should_decode_intermediates False",
        )
    return sites


def announce(job: Job, folder: RunFolder, progress: Watch) -> None:
    """Say that all questions are answered, and how: from here on it takes long."""
    progress(Begun(folder.generation_id))
    progress(Note(f"{job.spec.name} on {job.machine}, seed {job.seed}"))
    edited = [] if job.steering is None else job.steering.sites
    for note in job.machine.notes([*job.sites, *edited]) + job.picture.given.notes(job.picture.timesteps):
        progress(Note(note))
    for note in job.steering.notes() if job.steering is not None else ():
        progress(Note(note))


def planned_file(job: Job, metadata: dict[str, Any]) -> CapturePlan:
    """What the capture file will hold."""
    return CapturePlan(
        flux=job.spec.flux,
        sites=job.sites,
        timesteps=job.picture.timesteps,
        txt_tokens=job.txt_tokens,
        img_tokens=job.picture.grid.tokens,
        guidance=job.picture.guidance,
        metadata=metadata,
        steps=job.kept_steps,
        dtype=job.machine.compute.dtype,
        text_sites={site: job.spec.text_shape(site) for site in job.text_sites},
        cond_tokens=job.picture.given.cond_tokens,
    )


def load(suite: Suite, job: Job, progress: Watch) -> None:
    """Read the weights of every part that is needed: text encoders only for a prompt that is still a text."""
    parts = [part for part in suite.parts if part != "text" or job.text is None]
    for part in follow(progress, "load", parts, total=len(parts)):
        suite.load_part(part)


def embed(suite: Suite, job: Job, progress: Watch, sink: TextSink) -> TextEmbedding:
    """The prompt's embedding; what the encoders cannot make sense of is said in a note.

    Their layers go to `sink`, as far as they are recorded, and are edited before.
    """
    with phase(progress, "text"), suite.text_encoders() as encoders:
        for note in dict.fromkeys(encoders.t5.notes(job.prompt) + encoders.clip.notes(job.prompt)):
            progress(Note(f"note: {suite.spec.name}: {note}"))
        with TextRecorder(encoders, job.text_sites, sink), steered_text(encoders, job.steering):
            text = encode(encoders.t5, encoders.clip, [job.prompt])
    return text if job.steering is None else text._replace(y=job.steering.edit_pooled(text.y))


def sample_recorded(suite: Suite, job: Job, text: TextEmbedding, sink: CaptureWriter, progress: Watch) -> PackedLatent:
    """Walk from noise, or a picture, to the finished latent, with every step that is kept recorded into `sink`."""
    (width, height), machine = job.picture.grid, job.machine
    noise = noise_for([job.seed], height, width, machine.placement.transformer, machine.compute.dtype)
    inputs, first_step = prepare(noise, text, height, width), job.picture.first_step
    if job.picture.given.given():
        with suite.autoencoder() as autoencoder:
            inputs = job.picture.given.encoded(autoencoder, job.picture.timesteps).put_into(inputs)
    latent = inputs.img
    with ExitStack() as stack:
        model = stack.enter_context(suite.transformer())
        stack.enter_context(steered(model, [job.steering], first_step=first_step))
        stack.enter_context(Recorder(model, job.sites, sink, steps=job.kept_steps, first_step=first_step))
        steps = sample(model, inputs, job.picture.timesteps, job.picture.guidance, first_step=first_step)
        for step in follow(progress, "sample", steps, total=job.picture.num_steps - first_step):
            latent = step.after  # only the last is kept: memory does not grow with the steps
    return latent


def save_picture(
    job: Job, suite: Suite, latent: PackedLatent, path: Path, progress: Watch, *, keep_prompt: bool
) -> None:
    """Decode the finished latent and save it with what made it.

    An autoencoder that the user named is tried on the latent: those of other families may have the same tensors.
    """
    source, (width, height) = suite.source.autoencoder, job.picture.grid
    with suite.autoencoder() as autoencoder:
        if source is not None and source.origin not in (PACKAGE, CACHE, HUB):
            error = round_trip_error(autoencoder, latent, height, width)
            if error > OTHER_FAMILY:
                progress(
                    Note(
                        f"note: {source.path} may be the autoencoder of another model, such as Stable Diffusion 3: "
                        f"of the picture it draws it makes latents that are {error:.0%} off the sampler's"
                    )
                )
        pixels = decode(autoencoder, latent, height, width, suite.dtype)
    with complete_file(path) as beside:
        beside.write_bytes(jpeg_bytes(pixels, model=job.spec.name, prompt=job.prompt if keep_prompt else None))


def describe(job: Job, folder: RunFolder, timestamp: str, source: ModelSource | None = None) -> dict[str, Any]:
    """What is known before the first step: it stands in the capture file, and in the JSON beside it."""
    metadata = {
        "generation_id": folder.generation_id,
        "model": job.spec.name,
        "prompt": job.prompt,
        "width": job.picture.grid.width,
        "height": job.picture.grid.height,
        "num_steps": job.picture.num_steps,
        "timesteps": job.picture.timesteps,
        "seed": job.seed,
        "guidance": job.picture.guidance,
        "timestamp": timestamp,
    }
    if job.text is not None:
        # A digest: the embedding itself is not kept, and a reader must know that the prompt does not lead to it again.
        metadata["prompt_embeds"] = job.text.digest()
    metadata |= job.picture.given.described(job.picture.timesteps)
    if job.steering is not None:
        metadata["edits"] = job.steering.described(with_strength=True)
    if source is not None and source.loras:
        metadata["loras"] = [lora.to_json() for lora in source.loras]
    if source is not None and source.quantize is not None:
        metadata["quantize"] = source.quantize
    return metadata


def provenance(job: Job, suite: Suite) -> dict[str, Any]:
    """What else the numbers depend on, for the JSON alone: versions, devices, precision, files."""
    return {
        "captured_steps": job.kept_steps,
        "sites": [str(site) for site in (*job.text_sites, *job.sites)],
        **provenance_of(suite, job.machine),
        "versions": versions("torch", "tokenizers"),
        "rounding": "blocks run in dtype; flow time and guidance are rounded to it before they are embedded; "
        "RMS norms, rotary angles and the autoencoder's latents are float32, its convolutions in dtype",
    }
