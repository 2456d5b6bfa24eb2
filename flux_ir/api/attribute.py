"""Attribution: which features a part of one picture owes most to, by estimate for all and by removal for the best.

    done = attribute("output/1a2b3c4d", sae="saes/mine", region=(0, 0, 64, 128))
    done.table      one row per removed feature, the largest change of the region first

Every picture is kept as soon as it is made: the same call again makes what is missing.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.api.arguments import check_least
from flux_ir.api.lens import CaptureResult
from flux_ir.api.model_settings import PictureSettings, identity_of_pictures
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.api.recorded_run import Recorded, as_recorded, check_run, recorded_run
from flux_ir.api.steer import SteeringJob, SteerSettings, settle, text_of
from flux_ir.errors import FluxIRError
from flux_ir.lens.decode import ROUNDING_DRIFT
from flux_ir.models.architecture import Transformer
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sampling.generate import Inputs, check_steps, noise_for, prepare
from flux_ir.sites import SiteNames, site_names
from flux_ir.steering.attribution import (
    DRAWS_TOGETHER,
    PROBES,
    Estimates,
    Inside,
    Source,
    Walk,
    estimate_in_parts,
    joined,
    signs,
    sources_of,
    states_of,
)
from flux_ir.steering.attribution_folder import AttributionFolder, removal_name
from flux_ir.steering.directions import tensors_digest
from flux_ir.steering.dose import Made, Painter, Variant
from flux_ir.steering.edits import Edit
from flux_ir.steering.regions import given_region
from flux_ir.steering.removals import (
    UNSTEERED,
    Agreement,
    Asked,
    Chosen,
    FeatureKey,
    Removal,
    Together,
    agreement,
    choose,
)

AutoencoderGiven = str | Path | SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(PictureSettings):
    """What an attribution is asked for; see `attribute`. None is settled by the run, the model, the machine."""

    run: str | Path | CaptureResult | None = None
    generation: str | None = None
    prompt: str | None = None
    prompt_embeds: str | Path | None = None
    model: str | Suite | None = None
    """None: that of the run."""
    seed: int | None = None
    sae: tuple[AutoencoderGiven, ...] = ()
    sites: SiteNames | None = None
    steps: tuple[int, ...] | None = None
    region: tuple[int, ...] | None = None
    mask: str | Path | None = None
    above: float = 0.5
    probes: int = PROBES
    candidates: int = 20
    controls: int = 20
    best: int = 8
    batch_size: int = 8
    name: str | None = None
    output_dir: str | Path = "attributions"


class Attributed(NamedTuple):
    """What an attribution has written, and its table."""

    folder: Path
    table: list[Removal]
    """Every feature that was removed, the largest change of the region first."""
    agreement: Agreement
    together: Together
    numbers: Path
    csv: Path
    sheet: Path
    estimates: Path
    """Of every feature of every autoencoder: a .safetensors."""
    notes: list[str]


def attribute(
    run: str | Path | CaptureResult | None = None,
    *,
    generation: str | None = None,
    prompt: str | None = None,
    prompt_embeds: str | Path | None = None,
    model: str | Suite | None = None,
    seed: int | None = None,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    sae: AutoencoderGiven | Sequence[AutoencoderGiven] = (),
    sites: SiteNames | None = None,
    steps: Iterable[int] | None = None,
    region: Iterable[int] | None = None,
    mask: str | Path | None = None,
    above: float = 0.5,
    probes: int = PROBES,
    candidates: int = 20,
    controls: int = 20,
    best: int = 8,
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
    output_dir: str | Path = "attributions",
    progress: Watch = unwatched,
) -> Attributed:
    """Say which features of `sae`, one or several, change a region of one picture most when they are removed.

    The picture is that of `run` (a run's folder or its id below `output`, what `capture` returned, or a collection with
    its `generation`), or that of a prompt and a seed. `region` is left, top, right, bottom in px, `mask` as for
    `steer`; without both it is the whole picture. A removal is of all tokens, at `steps` (None: all).

    The change of the finished latent is estimated for every feature to first order, by `probes` draws of signs; the
    `candidates` with the largest estimates, and `controls` that are drawn among the other active features, are then
    removed one by one, and the `best` of them all at once.

    Goes into a folder below `output_dir`, named by `name` or by the settings; the same call again goes on with what is
    there. Raises FluxIRError for what a user can mend, before a weight is loaded where that is possible.
    """
    settings = AttributeSettings(
        run=run,
        generation=generation,
        prompt=prompt,
        prompt_embeds=prompt_embeds,
        model=model,
        seed=seed,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        sae=(sae,) if isinstance(sae, AutoencoderGiven) else tuple(sae),
        sites=sites,
        steps=None if steps is None else tuple(steps),
        region=None if region is None else tuple(region),
        mask=mask,
        above=above,
        probes=probes,
        candidates=candidates,
        controls=controls,
        best=best,
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
    return run_attribution(settings, progress)


def run_attribution(settings: AttributeSettings, progress: Watch = unwatched) -> Attributed:
    """The same, with its settings in one object."""
    check_least(vars(settings))
    recorded = run_asked(settings)
    job = settle(steer_settings(settings, recorded), progress)
    check_steps(settings.steps, job.steering.num_steps)
    sources, inside = sources_of(job.steering), region_tokens(job, settings)
    check_counts(settings, sources)
    if recorded is not None:
        check_run(recorded, job.suite, job.picture.timesteps)
    identity = identity_of(job, settings, sources, inside, recorded)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = settings.name or f"{job.suite.spec.name}_{digest}"
    folder = AttributionFolder(Path(settings.output_dir) / name, identity)
    text, notes = text_of(job, progress), Notes(progress)
    with job.suite.transformer() as model, job.suite.autoencoder() as autoencoder:
        estimates = folder.read_estimates()
        if estimates is None:
            states = find_states(job, model, text, recorded, notes, progress)
            estimates = estimate(job, model, text, states, sources, inside, settings.probes, progress)
            folder.keep_estimates(estimates)
        chosen = choose(estimates, settings.candidates, settings.controls)
        note_fewer(chosen, settings, notes)
        painter = Painter(
            model,
            autoencoder,
            job.picture.grid,
            job.picture.timesteps,
            job.picture.guidance,
            job.machine.compute.dtype,
            meter=None,
            batch=settings.batch_size,
        )
        alone = {key: variant_of(job, text, [key]) for key in (*chosen.candidates, *chosen.controls)}
        made = make_missing(folder, painter, [variant_of(job, text, []), *alone.values()], progress)
        sites = [str(source.site) for source in sources]
        asked = Asked(made[UNSTEERED], inside, job.picture.grid, estimates, sites, len(steps_of(job)))
        removals = [asked.removal(key, made[v.row], chosen=key in chosen.candidates) for key, v in alone.items()]
        removals.sort(key=lambda removal: -removal.latent_inside)
        best = [(removal.sae, removal.feature) for removal in removals[: settings.best]]
        at_once = variant_of(job, text, best)
        made |= make_missing(folder, painter, [at_once], progress)
    together = asked.together([(key, made[alone[key].row]) for key in best], made[at_once.row])
    agreed = agreement(removals, settings.best)
    how_many = {name: getattr(settings, name) for name in ("candidates", "controls", "best")}
    folder.write({"prompt": job.prompt, **how_many}, removals, agreed, together)
    with phase(progress, "sheet"):
        whose, grid, several = f"{job.suite.spec.name}, seed {job.settings.seed}", job.picture.grid, len(sources) > 1
        folder.draw(job.prompt, whose, removals[: settings.best], at_once.row, together, inside, grid, several=several)
    return Attributed(
        folder.path,
        removals,
        agreed,
        together,
        folder.numbers,
        folder.table,
        folder.sheet,
        folder.estimates,
        notes.texts,
    )


class Notes:
    """What is worth knowing, told and kept."""

    def __init__(self, progress: Watch) -> None:
        self.progress, self.texts = progress, list[str]()

    def add(self, text: str) -> None:
        """One more."""
        self.texts.append(text)
        self.progress(Note(text))


# ---- What is asked for


def run_asked(settings: AttributeSettings) -> Recorded | None:
    """The run that is named; None: the picture is that of a prompt. Raises FluxIRError where both are said."""
    if settings.run is None:
        if settings.generation is not None:
            raise FluxIRError(
                "--generation is one of a collection: got no --run", hint="--run captures/NAME names the collection"
            )
        return None
    of_picture = ("prompt", "prompt_embeds", "seed", *settings.picture_choices())
    if given := [name for name in of_picture if getattr(settings, name) is not None]:
        raise FluxIRError(
            f"--run says everything about the picture: got --{given[0]} as well", hint="leave one of them out"
        )
    return recorded_run(settings.run, settings.generation)


def steer_settings(settings: AttributeSettings, recorded: Recorded | None) -> SteerSettings:
    """The same picture as `steer` would make it, with one removal per autoencoder, so that all of it is checked."""
    if not settings.sae:
        raise FluxIRError("an attribution is to the features of an autoencoder: got none", hint="--sae FOLDER")
    sites: Sequence[str | None] = [None] * len(settings.sae) if settings.sites is None else site_names(settings.sites)
    if len(sites) != len(settings.sae):
        raise FluxIRError(
            f"--sites says where each autoencoder is: got {len(sites)} for {len(settings.sae)} autoencoders",
            hint="leave it out for autoencoders that say so themselves",
        )
    edits = [
        Edit(kind="ablate", sae=sae, feature=0, sites=site, steps=settings.steps)
        for sae, site in zip(settings.sae, sites, strict=True)
    ]
    model: str | Suite = settings.model or (recorded and recorded.model) or "flux-schnell"
    like = SteerSettings(model=model, edit=edits, batch_size=settings.batch_size, **settings.model_choices())
    if recorded is None:
        like = replace(like, prompt=settings.prompt, prompt_embeds=settings.prompt_embeds, seed=settings.seed or 0)
        return replace(like, **settings.picture_choices())
    return as_recorded(like, recorded)


def steps_of(job: SteeringJob) -> list[int]:
    """The steps that features are removed at: the same for all autoencoders."""
    return sorted(job.steering.ready[0].steps)


def region_tokens(job: SteeringJob, settings: AttributeSettings) -> Inside:
    """The image tokens of the region. Raises FluxIRError where it has none."""
    region = given_region(settings.region, settings.mask, settings.above)
    if region is None:
        return torch.ones(job.picture.grid.tokens, dtype=torch.bool)
    inside = torch.from_numpy(region.mask("img", job.picture.grid.tokens, job.picture.grid))
    if not inside.any():
        raise FluxIRError("the region has no token, so nothing in it can change", hint="lower --above, or leave it out")
    return inside


def check_counts(settings: AttributeSettings, sources: Sequence[Source]) -> None:
    """Raises FluxIRError for more features than there are."""
    features = sum(source.sae.config.d_sae for source in sources)
    if settings.candidates > features:
        raise FluxIRError(f"there are {features} features: got --candidates {settings.candidates}", hint="ask for less")
    if settings.best > settings.candidates:
        raise FluxIRError(
            f"--best is at most --candidates, {settings.candidates}: got {settings.best}", hint="raise --candidates"
        )


def identity_of(
    job: SteeringJob,
    settings: AttributeSettings,
    sources: Sequence[Source],
    inside: Inside,
    recorded: Recorded | None,
) -> dict[str, Any]:
    """What the numbers depend on, but for which features are removed: more of these may be asked for later."""
    states = recorded.states if recorded is not None else {}
    return {
        **identity_of_pictures(job.suite, job.picture),
        "prompt": job.prompt if job.text is None else job.text.digest(),
        "seed": job.settings.seed,
        "states": {str(step): tensors_digest(state) for step, state in sorted(states.items())},
        "saes": [{"digest": source.digest, "site": str(source.site)} for source in sources],
        "steps": steps_of(job),
        "region": None if bool(inside.all()) else inside.nonzero().flatten().tolist(),
        "probes": settings.probes,
    }


# ---- The estimate


def find_states(
    job: SteeringJob,
    model: Transformer,
    text: TextEmbedding,
    recorded: Recorded | None,
    notes: Notes,
    progress: Watch,
) -> tuple[Tensor, ...]:
    """What every step began with: as the run kept it, else sampled. Raises FluxIRError for a run of other weights."""
    with phase(progress, "states"):
        stored = recorded.states if recorded is not None else {}
        found = states_of(model, inputs_of(job, model, text), job.picture.timesteps, job.picture.guidance, stored)
    if recorded is not None and not stored:
        notes.add("note: the run kept no whole states: they are sampled again from its seed")
    if not found.drift <= ROUNDING_DRIFT:
        raise FluxIRError(
            f"these are not the weights or the text encoders the run was made with: its states are {found.drift:.1%} "
            "off those that are sampled here",
            hint="name the weights it was made with: --checkpoint and --ae_checkpoint",
        )
    if found.drift > 0:
        notes.add(f"note: the run's states are off those that are sampled here, by {found.drift:.1g} of their length")
    return found.before


def inputs_of(job: SteeringJob, model: Transformer, text: TextEmbedding) -> Inputs:
    """What the network is called with at the first step."""
    width, height = job.picture.grid
    noise = noise_for([job.settings.seed], height, width, model.img_in.weight.device, job.machine.compute.dtype)
    return prepare(noise, text, height, width)


def estimate(
    job: SteeringJob,
    model: Transformer,
    text: TextEmbedding,
    states: Sequence[Tensor],
    sources: Sequence[Source],
    inside: Inside,
    probes: int,
    progress: Watch,
) -> list[Estimates]:
    """What removing each feature does to the region, to first order: one walk back through the sampler."""
    inputs = inputs_of(job, model, text)
    draws = signs(probes, inside, inputs.img.shape[2], seed=job.settings.seed)
    walk = Walk(inputs, states, job.picture.timesteps, job.picture.guidance, sources, steps_of(job), inside)
    parts = follow(progress, "gradients", estimate_in_parts(model, walk, draws), total=-(-len(draws) // DRAWS_TOGETHER))
    return [joined(of_one) for of_one in zip(*parts, strict=True)]


# ---- The removals


def note_fewer(chosen: Chosen, settings: AttributeSettings, notes: Notes) -> None:
    """Says where there are fewer features than were asked for."""
    for what, asked, found in (
        ("candidates", settings.candidates, chosen.candidates),
        ("controls", settings.controls, chosen.controls),
    ):
        if len(found) < asked:
            notes.add(f"note: {chosen.active} features are active here, so there are {len(found)} {what}, not {asked}")


def variant_of(job: SteeringJob, text: TextEmbedding, keys: Sequence[FeatureKey]) -> Variant:
    """The picture without these features; without any, the unsteered one."""
    if not keys:
        return Variant(UNSTEERED, 0.0, job.settings.seed, text, None)
    edits = []
    for number, edit in enumerate(job.steering.edits):
        if features := tuple(feature for sae, feature in keys if sae == number):
            edits.append(replace(edit, feature=features))
    if len(keys) == 1:
        row = removal_name(*keys[0])
    else:
        row = "without_" + hashlib.sha256(repr(sorted(keys)).encode()).hexdigest()[:8]
    return Variant(row, 1.0, job.settings.seed, text, job.steering.of(edits))


def make_missing(
    folder: AttributionFolder, painter: Painter, variants: Sequence[Variant], progress: Watch
) -> dict[str, Made]:
    """The pictures by their names: those that are not there are made, and kept."""
    missing = [variant for variant in variants if not folder.has(variant)]
    for made in follow(progress, "pictures", painter.make(missing), total=len(missing)) if missing else ():
        folder.keep(made)
    return {variant.row: folder.read(variant) for variant in variants}
