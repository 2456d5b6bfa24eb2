"""Steering: the same noise with an edit at several strengths, what each of them costs, and the same with controls.

    done = steer("a red circle on a white background", sae="saes/mine", feature=12, strength=(0, 1, 2, 4))
    done.table      one row per strength, the means over seeds with their intervals

Every picture is kept with its numbers as soon as it is made: the same call again makes what is missing.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.capture import settle_text
from flux_ir.api.model_settings import (
    GivenPictureSettings,
    Machine,
    SettledPicture,
    identity_of_pictures,
    note_trained_on_others,
)
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.sampling.generate import check_steps
from flux_ir.sampling.pictures import EncodedPictures, PictureGiven
from flux_ir.sites import Site, SiteNames
from flux_ir.steering.apply import Steering, steered_text
from flux_ir.steering.dose import Made, Painter, Variant, aligned_neurons, moved, price, random_directions, windows
from flux_ir.steering.edits import Edit, EditKind, Gate, Unit, as_edits
from flux_ir.steering.folder import SteeringFolder
from flux_ir.steering.perceptual import Lpips, find_lpips
from flux_ir.steering.regions import given_region
from flux_ir.steering.settle import is_settled, settled, stand_in
from flux_ir.steering.table import EDIT, NEURON, RANDOM, UNSTEERED, DoseRow, Run, tabulate


@dataclass(frozen=True, kw_only=True)
class SteerSettings(GivenPictureSettings):
    """What a steering is asked for; see `steer`. What is None is settled by the model, the machine or the edit."""

    prompt: str | None = None
    prompt_embeds: str | Path | None = None
    edit: str | Path | Edit | Sequence[Edit] | None = None
    sae: str | Path | None = None
    feature: tuple[int, ...] = ()
    vector: str | Path | None = None
    steering_prompt: str | None = None
    kind: EditKind = "add"
    sites: SiteNames | None = None
    unit: Unit | None = None
    gate: Gate | float = "all"
    region: tuple[int, ...] | None = None
    mask: str | Path | None = None
    above: float = 0.5
    steps: tuple[int, ...] | None = None
    schedule: tuple[float, ...] | None = None
    weights: Literal["presence"] | tuple[float, ...] | None = None
    strength: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    seed: int = 0
    seeds: int = 4
    controls: int = 20
    init_strength: float | None = None
    batch_size: int = 8
    name: str | None = None
    output_dir: str | Path = "steering"

    @property
    def strength_flag(self) -> str:
        """The name of the strength of `init_image`: `strength` is that of the edit."""
        return "init_strength"


class Steered(NamedTuple):
    """What a steering has written, and its table."""

    folder: Path
    table: list[DoseRow]
    numbers: Path
    edit: Path
    drawn: dict[str, Path]
    """doses, controls, windows: sheets; film: a GIF from weak to strong."""
    notes: list[str]


class SteeringJob(NamedTuple):
    """A steering with every open question answered; nothing of the model is loaded yet."""

    settings: SteerSettings
    suite: Suite
    prompt: str
    text: TextEmbedding | None
    """None: the prompt is still to be encoded."""
    machine: Machine
    picture: SettledPicture
    edits: tuple[Edit, ...]
    """As they were given."""
    steering: Steering
    """The same in numbers, at whatever strength they were given; stand-ins until they are measured."""

    @property
    def seeds(self) -> range:
        """One for each noise."""
        return range(self.settings.seed, self.settings.seed + self.settings.seeds)


def steer(
    prompt: str | None = None,
    *,
    prompt_embeds: str | Path | None = None,
    model: str | Suite = "flux-schnell",
    edit: str | Path | Edit | Sequence[Edit] | None = None,
    sae: str | Path | None = None,
    feature: int | Iterable[int] = (),
    vector: str | Path | None = None,
    steering_prompt: str | None = None,
    kind: EditKind = "add",
    sites: SiteNames | None = None,
    unit: Unit | None = None,
    gate: Gate | float = "all",
    region: Iterable[int] | None = None,
    mask: str | Path | None = None,
    above: float = 0.5,
    steps: Iterable[int] | None = None,
    schedule: Iterable[float] | None = None,
    weights: Literal["presence"] | float | Iterable[float] | None = None,
    strength: float | Iterable[float] = (0.0, 1.0, 2.0, 4.0),
    seed: int = 0,
    seeds: int = 4,
    controls: int = 20,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    init_image: PictureGiven | None = None,
    init_strength: float | None = None,
    reference_image: PictureGiven | None = None,
    keep_reference_size: bool = False,
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
    batch_size: int = 8,
    name: str | None = None,
    output_dir: str | Path = "steering",
    progress: Watch = unwatched,
) -> Steered:
    """Sample one prompt with an edit at every `strength`, from `seeds` noises, beside the unsteered pictures.

    The edit is given by `edit`, an `Edit`, several or their file, or by `sae` and `feature` (or `steering_prompt`, or a
    `vector` alone) and the other fields of one: `region` is left, top, right, bottom in px, `mask` a picture or a .npy
    map that is `above` a threshold where the edit holds. `controls` random directions move every token as far, and so
    does the best aligned neuron; at the largest strength the edit is also made in each third of the steps alone.

    `init_image`, `init_strength` and `reference_image` are as `init_image`, `strength` and so on of `capture`: then
    a given picture is steered, and the unsteered ones are begun with it, too.

    Goes into a folder below `output_dir`, named by `name` or by the settings; the same call again goes on with what is
    there. Raises FluxIRError for what a user can mend, before a weight is loaded where that is possible.
    """
    settings = SteerSettings(
        prompt=prompt,
        prompt_embeds=prompt_embeds,
        model=model,
        edit=edit,
        sae=sae,
        feature=_tuple(feature),
        vector=vector,
        steering_prompt=steering_prompt,
        kind=kind,
        sites=sites,
        unit=unit,
        gate=gate,
        region=None if region is None else _tuple(region),
        mask=mask,
        above=above,
        steps=None if steps is None else _tuple(steps),
        schedule=None if schedule is None else _tuple(schedule),
        weights=weights if isinstance(weights, str | None) else _tuple(weights),
        strength=_tuple(strength),
        seed=seed,
        seeds=seeds,
        controls=controls,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        init_image=init_image,
        init_strength=init_strength,
        reference_image=reference_image,
        keep_reference_size=keep_reference_size,
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
        batch_size=batch_size,
        name=name,
        output_dir=output_dir,
    )
    return run_steering(settings, progress)


def run_steering(settings: SteerSettings, progress: Watch = unwatched) -> Steered:
    """The same, with its settings in one object."""
    job = settle(settings, progress)
    plain = text_of(job, progress)
    given = given_of(job)
    job = measured(job, plain, given, progress)
    identity = identity_of(job)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = settings.name or f"{job.suite.spec.name}_{digest}"
    folder = SteeringFolder(Path(settings.output_dir) / name, identity, job.steering.edits)
    notes = job.steering.notes()
    for note in notes:
        progress(Note(note))
    texts = texts_of(job, plain)
    with job.suite.transformer() as model, job.suite.autoencoder() as autoencoder:
        painter = Painter(
            model,
            autoencoder,
            job.picture.grid,
            job.picture.timesteps,
            job.picture.guidance,
            job.machine.compute.dtype,
            meter=job.steering,
            batch=settings.batch_size,
            given=given,
        )
        variants = variants_of(job, texts, neurons_of(job, model, texts[None]))
        make_missing(job, folder, painter, variants, progress)
    runs = measure_lpips(job, folder, variants, notes, progress)
    table = tabulate(runs)
    with phase(progress, "sheets"):
        drawn = folder.draw(job.prompt, runs)
    chosen = {"prompt": job.prompt, "seeds": list(job.seeds), "strength": list(settings.strength)}
    return Steered(folder.path, table, folder.write_numbers(chosen, runs, table), folder.edit, drawn, notes)


# ---- What is asked for


def settle(settings: SteerSettings, progress: Watch) -> SteeringJob:
    """Answer every question that is left open, and find the files. Raises FluxIRError for what a user can mend."""
    check_words(SteerSettings, {name: getattr(settings, name) for name in ("kind", "unit", "dtype")})
    check_least(vars(settings))
    if not settings.strength:
        raise FluxIRError("a steering has at least one strength: got none", hint="--strength 0,1,2,4")
    spec, picture = settings.spec, settings.settle_picture()
    check_steps(settings.steps, picture.num_steps, picture.first_step)
    edits, machine = edits_of(settings), settings.settle_machine()
    prompt, text = settle_text(settings.prompt, settings.prompt_embeds, spec)
    empty = Steering(
        (),
        spec,
        grid=picture.grid,
        num_steps=picture.num_steps,
        first_step=picture.first_step,
        txt_tokens=None if text is None else text.txt.shape[1],
        device=machine.placement.transformer,
    )
    steering = empty.of([stand_in(edit, empty) for edit in edits])
    steering.check_encodes(encodes=text is None)
    suite = settings.suite(machine, progress, text=text is None)
    named = {edit.sae if isinstance(edit.sae, str | Path) else "": edit for edit in edits if edit.sae is not None}
    read = {f"the autoencoder {name}".rstrip(): steering.sae_of(edit) for name, edit in named.items()}
    note_trained_on_others(read, suite, progress)
    given = picture.given.notes(picture.timesteps)
    for note in (f"{spec.name} on {machine}", *machine.notes(steering.sites), *given):
        progress(Note(note))
    return SteeringJob(settings, suite, prompt, text, machine, picture, edits, steering)


def edits_of(settings: SteerSettings) -> tuple[Edit, ...]:
    """The edits that are meant. Raises FluxIRError where they are given twice, or not at all."""
    fields = (
        "sae",
        "feature",
        "vector",
        "steering_prompt",
        "sites",
        "unit",
        "region",
        "mask",
        "steps",
        "schedule",
        "weights",
    )
    given = [name for name in fields if getattr(settings, name) not in (None, ())]
    if settings.edit is not None:
        if given:
            raise FluxIRError(
                f"--edit says everything about the edit: got --{given[0]} as well", hint="change it in the file"
            )
        return as_edits(settings.edit)
    region = given_region(settings.region, settings.mask, settings.above)
    return (
        Edit(
            kind=settings.kind,
            sae=settings.sae,
            feature=settings.feature,
            vector=settings.vector,
            prompt=settings.steering_prompt,
            sites=settings.sites,
            unit=settings.unit,
            gate=settings.gate,
            region=region,
            steps=settings.steps,
            schedule=settings.schedule,
            weights=settings.weights,
        ),
    )


# ---- The pictures


def text_of(job: SteeringJob, progress: Watch) -> TextEmbedding:
    """What the transformer is told without an edit."""
    if job.text is not None:
        return job.text
    with phase(progress, "text"), job.suite.text_encoders() as encoders:
        return encode(encoders.t5, encoders.clip, [job.prompt])


def given_of(job: SteeringJob) -> EncodedPictures:
    """The latents of the pictures that every run begins with, or refers to."""
    if not job.picture.given.given():
        return EncodedPictures()
    with job.suite.autoencoder() as autoencoder:
        return job.picture.given.encoded(autoencoder, job.picture.timesteps)


def measured(job: SteeringJob, plain: TextEmbedding, given: EncodedPictures, progress: Watch) -> SteeringJob:
    """The job with every edit in numbers: steering prompts and presences are measured in a run of the first noise."""
    if all(map(is_settled, job.edits)):
        return job
    edits = []
    for edit, stand in zip(job.edits, job.steering.edits, strict=True):
        if is_settled(edit):
            edits.append(edit)
            continue
        with phase(progress, "measure"):
            alone = job.steering.of([stand])
            seed, times, guidance = job.settings.seed, job.picture.timesteps, job.picture.guidance
            run = settled(edit, alone, job.suite, plain, seed=seed, timesteps=times, guidance=guidance, given=given)
            edits.append(run)
    return job._replace(steering=job.steering.of(edits))


def texts_of(job: SteeringJob, plain: TextEmbedding) -> dict[float | None, TextEmbedding]:
    """What the transformer is told at every strength, and (None) without the edit."""
    texts: dict[float | None, TextEmbedding] = {None: plain}
    with ExitStack() as stack:
        encoders = stack.enter_context(job.suite.text_encoders()) if job.steering.text_sites else None
        for strength in job.settings.strength:
            steering, text = job.steering.at(strength), plain
            if encoders is not None:
                with steered_text(encoders, steering):
                    text = encode(encoders.t5, encoders.clip, [job.prompt])
            texts[strength] = text._replace(y=steering.edit_pooled(text.y))
    return texts


def neurons_of(job: SteeringJob, model: Transformer, text: TextEmbedding) -> dict[Site, tuple[int, Tensor]]:
    """The best aligned neuron of each site, under the conditioning at the middle of the schedule."""
    device, dtype = model.img_in.weight.device, job.machine.compute.dtype
    middle = job.picture.timesteps[job.picture.num_steps // 2]
    times, guidance = (torch.tensor([value], device=device, dtype=dtype) for value in (middle, job.picture.guidance))
    with torch.no_grad():
        vec = model.conditioning(times, text.y.to(device, dtype), guidance)
        return aligned_neurons(model, job.steering, vec)


def variants_of(
    job: SteeringJob, texts: Mapping[float | None, TextEmbedding], neurons: Mapping[Site, tuple[int, Tensor]]
) -> list[Variant]:
    """Every picture to make: the unsteered ones, the doses, their controls, and each window of steps by itself."""
    settings, plain = job.settings, texts[None]
    variants = [Variant(UNSTEERED, 0.0, seed, plain, None) for seed in job.seeds]
    doses = {strength: job.steering.at(strength) for strength in settings.strength}
    for strength, steering in doses.items():
        variants += [Variant(EDIT, strength, seed, texts[strength], steering) for seed in job.seeds]
    if not job.steering.sites:  # only the text is edited: there is no direction to compare with
        return variants
    directions = {f"{RANDOM}_{number}": random_directions(job.steering, number) for number in range(settings.controls)}
    if settings.controls and len(neurons) == len(job.steering.sites):
        directions[NEURON] = {site: direction for site, (_, direction) in neurons.items()}
    for strength, steering in doses.items():
        for number, (row, along) in enumerate(directions.items()):
            # A random direction is one draw and gets one noise; the neuron is compared on all.
            seeds = list(job.seeds) if row == NEURON else [job.seeds[number % len(job.seeds)]]
            variants += [Variant(row, strength, seed, plain, steering.along(along)) for seed in seeds]
    strongest = max(settings.strength, key=abs)
    for row, steps in windows(job.steering.num_steps, job.steering.first_step).items():
        steering = doses[strongest].at_steps(steps)
        variants += [Variant(row, strongest, seed, texts[strongest], steering) for seed in job.seeds]
    return variants


def make_missing(
    job: SteeringJob, folder: SteeringFolder, painter: Painter, variants: Sequence[Variant], progress: Watch
) -> None:
    """Makes the pictures that are not there, and keeps each with its numbers as soon as it is made."""
    missing = [variant for variant in variants if not folder.has(variant)]
    needed = {variant.seed for variant in missing}
    unsteered = [variant for variant in variants if variant.row == UNSTEERED and variant.seed in needed]
    others = [variant for variant in missing if variant.row != UNSTEERED]
    baselines: dict[int, Made] = {}
    inside = job.steering.region_of_image()
    made_now = painter.make([*unsteered, *others])
    for made in follow(progress, "pictures", made_now, total=len(unsteered) + len(others)):
        variant = made.variant
        if variant.row == UNSTEERED:
            baselines[variant.seed] = made
        baseline = baselines[variant.seed]
        active, then = made.activity, baseline.activity
        run = Run(
            variant.row,
            variant.strength,
            variant.seed,
            activation=None if active is None else active.after,
            carried=None if active is None else active.carried,
            moved=None if active is None or then is None else moved(job.steering, active, then),
            price=None if variant.row == UNSTEERED else price(made, baseline, inside, job.picture.grid),
        )
        folder.keep(run, made)


def measure_lpips(
    job: SteeringJob, folder: SteeringFolder, variants: Sequence[Variant], notes: list[str], progress: Watch
) -> list[Run]:
    """The numbers of all pictures, with LPIPS where the user has it; a note says why it is left out."""
    lpips = find_lpips(job.machine.placement.transformer, job.picture.grid)
    if isinstance(lpips, Lpips):
        measured_now = folder.add_lpips(variants, lpips, job.steering.region_of_image(), job.picture.grid)
        return list(follow(progress, "lpips", measured_now, total=len(variants)))
    runs = [folder.read(variant) for variant in variants]
    without = [run.price.lpips is None for run in runs if run.price is not None]
    if lpips is None and any(without) and not all(without):
        lpips = (
            f"note: {len(without) - sum(without)} of {len(without)} pictures have LPIPS from an earlier run: "
            "pip install lpips for the others"
        )
    if lpips is not None:
        notes.append(lpips)
        progress(Note(lpips))
    return runs


# ---- What the pictures' bits depend on


def identity_of(job: SteeringJob) -> dict[str, Any]:
    """What the pictures' bits depend on, but for seeds and strengths: any of these may be added later."""
    return {
        **identity_of_pictures(job.suite, job.picture),
        "prompt": job.prompt if job.text is None else job.text.digest(),
        "edits": job.steering.described(with_strength=False),
    }


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)
