"""One collection, from what was asked to a complete folder: activations of many generations, computed once.

    settle_collection   every open question answered, the model located; nothing is loaded or written
    run_collection      verify what is there -> encode the prompts -> load -> record what is missing -> merge

Next: `collecting.collector`, which does each of these, shard by shard.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.model_settings import BegunPictureSettings, Machine, SettledPicture
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.collection import Collection, CollectSettings, read_index
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.prompts import read_prompts
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.storage import one_job_at, open_storage
from flux_ir.distributed import Ranks, all_sum, arrivals, joined
from flux_ir.errors import FluxIRError
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.registry import ModelSpec
from flux_ir.models.suite import Suite
from flux_ir.sampling.generate import check_steps
from flux_ir.sampling.pictures import PictureGiven
from flux_ir.sites import SiteNames, sites_among
from flux_ir.steering.apply import Steering
from flux_ir.steering.edits import Edit, as_edits

NOTED_PROMPTS = 256

StoreDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn"]


class Collected(NamedTuple):
    """What a complete collection holds."""

    where: str
    generations: int
    made: int
    """How many of them were made now, by all processes."""
    tokens: int
    """Tokens that are kept, over all sites and steps."""
    bytes: int
    """What shards, pictures and latents take: without the index, the statistics and the embedded prompts."""


@dataclass(frozen=True, kw_only=True)
class CollectArguments(BegunPictureSettings):
    """The arguments of `collect`, which says what they mean."""

    prompts: str | Path | Sequence[str]
    sites: SiteNames
    output_dir: str | Path
    max_prompts: int | None = None
    repeats: int = 1
    seed: int = 0
    edit: str | Path | Edit | Sequence[Edit] | None = None
    steps: Iterable[int] | None = None
    tokens_per_image: int | None = None
    store_dtype: StoreDtype = "bfloat16"
    save_images: bool = False
    save_latents: bool = False
    batch_size: int | None = None
    verify: Literal["checksums", "sizes"] = "checksums"
    fsdp: bool = False


class CollectionJob(NamedTuple):
    """What is to be collected, with which model, and where: what `collect` was asked, with nothing left open."""

    settings: CollectSettings
    suite: Suite
    machine: Machine
    output_dir: str


def collect(
    prompts: str | Path | Sequence[str],
    sites: SiteNames,
    output_dir: str | Path,
    *,
    model: str | Suite = "flux-schnell",
    max_prompts: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    init_image: PictureGiven | None = None,
    strength: float | None = None,
    reference_image: PictureGiven | None = None,
    keep_reference_size: bool = False,
    edit: str | Path | Edit | Sequence[Edit] | None = None,
    steps: Iterable[int] | None = None,
    tokens_per_image: int | None = None,
    dtype: DtypeWord = "auto",
    store_dtype: StoreDtype = "bfloat16",
    save_images: bool = False,
    save_latents: bool = False,
    batch_size: int | None = None,
    verify: Literal["checksums", "sizes"] = "checksums",
    fsdp: bool = False,
    device: str | None = None,
    multi_gpu: MultiGpuWord = False,
    offload: OffloadWord = False,
    compile: bool = False,
    attention: AttentionWord = "auto",
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    checkpoint: Path | None = None,
    ae_checkpoint: Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    quantize: Method | None = None,
    progress: Watch = unwatched,
) -> Collected:
    """Collect what some sites put out over many prompts, into shards; goes on with what is there.

    `prompts` is a list, or a .txt, .jsonl or .csv file, of which the first `max_prompts` are taken (None: all); each is
    sampled `repeats` times, from noise that follows from `seed`, the prompt and the repeat. `sites` are names or
    patterns, `steps` the steps to keep (None: all); no step runs after the last of them unless pictures or latents are
    kept. With `edit`, an `Edit`, several or their file, every run is steered. `init_image` and `reference_image` are
    one picture for all runs, as in `capture`. `output_dir` is a folder or a URL.
    `model` is the name of one, or a loaded `Suite`, which brings its own device and dtype. What the network computes in
    `dtype` is kept in `store_dtype`. Under torchrun all processes call this alike and share the work;
    with `fsdp` they also share the transformer's weights, of which each has a part.

    Raises FluxIRError for what a user can mend: before a weight is read where that is possible.
    """
    arguments = CollectArguments(
        prompts=prompts,
        sites=sites,
        output_dir=output_dir,
        model=model,
        max_prompts=max_prompts,
        repeats=repeats,
        seed=seed,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        init_image=init_image,
        strength=strength,
        reference_image=reference_image,
        keep_reference_size=keep_reference_size,
        edit=edit,
        steps=steps,
        tokens_per_image=tokens_per_image,
        dtype=dtype,
        store_dtype=store_dtype,
        save_images=save_images,
        save_latents=save_latents,
        batch_size=batch_size,
        verify=verify,
        fsdp=fsdp,
        device=device,
        multi_gpu=multi_gpu,
        offload=offload,
        compile=compile,
        attention=attention,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        quantize=quantize,
    )
    return run_collection(arguments, progress)


def run_collection(arguments: CollectArguments, progress: Watch = unwatched) -> Collected:
    """`collect`, with its arguments in one object."""
    with joined() as ranks:
        job = settle_collection(arguments, ranks, progress)
        watch = progress if ranks.is_first else unwatched
        watch(Note(_opening(job, ranks)))
        recipe = job.settings.recipe
        edits = recipe.edits
        of_edits = edits if isinstance(edits, Steering) else None
        sites = [*recipe.sites, *(of_edits.sites if of_edits else [])]
        given = recipe.given.notes(recipe.timesteps)
        for note in given + job.machine.notes(sites) + (of_edits.notes() if of_edits else []):
            watch(Note(note))
        storage = open_storage(job.output_dir, rank=ranks.rank)
        with one_job_at(storage, ranks):
            collector = Collector(job.settings, job.suite, storage, ranks)
            made = _collect(collector, watch)
        return _collected(collector.collection, made)


def _collect(collector: Collector, watch: Watch) -> int:
    """Verify, encode, load, record, merge; returns how many generations all ranks made. Stages count those of all."""
    ranks = collector.ranks
    shards = collector.collection.shards if collector.was_begun else 0
    _follow_all_ranks(watch, "verify", collector.verify(), ranks, total=shards)
    if ranks.is_first:
        _note_on_prompts(collector, watch)
    to_encode, missing = all_sum(torch.tensor([collector.prompts_to_encode, collector.missing]), ranks).tolist()
    _follow_all_ranks(watch, "text", collector.encode(), ranks, total=to_encode)
    if missing:  # on any rank: `load` may have to agree on a batch size, so every rank calls it
        # A stage of its own: reading 24 GB of weights would drown the tokens/s of a small run.
        with phase(watch, "load"):
            collector.load()
    _follow_all_ranks(watch, "collect", collector.record(), ranks, total=missing)
    merged = collector.merge()
    for _ in follow(watch, "merge", merged, collector.collection.shards) if ranks.is_first else merged:
        pass
    return int(missing)


# ---- The settings, from the arguments and the model's defaults


def settle_collection(asked: CollectArguments, ranks: Ranks, progress: Watch = unwatched) -> CollectionJob:
    """Checks the arguments, the cheapest first, fills in the model's defaults, and locates the model.

    Loads and writes nothing. Raises FluxIRError for what a user can mend.
    """
    check_words(CollectArguments, vars(asked))
    check_least(vars(asked))
    if not str(asked.output_dir).strip():
        raise FluxIRError(
            f"--output_dir must name a folder or a URL: got {str(asked.output_dir)!r}",
            hint="write --output_dir captures/NAME",
        )
    spec, picture = asked.spec, asked.settle_picture()
    chosen = sites_among(asked.sites, spec.sites)
    if asked.fsdp:
        _check_fsdp(asked, ranks)
    machine = asked.settle_machine(ranks=ranks)
    sites, to_the_end = tuple(site for site in chosen if not site.per_prompt), asked.save_images or asked.save_latents
    # Layers of the text encoders alone need no forward of the transformer: none is made before the first step recorded.
    first = picture.first_step
    last = picture.num_steps if sites or to_the_end else first + 1
    steps = range(first, last) if asked.steps is None else asked.steps
    recipe = Recipe(
        spec=spec,
        width=picture.grid.width,
        height=picture.grid.height,
        num_steps=picture.num_steps,
        guidance=picture.guidance,
        sites=sites,
        text_sites=tuple(site for site in chosen if site.per_prompt),
        steps=tuple(steps),
        stored_dtype=getattr(torch, asked.store_dtype),
        network_dtype=machine.compute.dtype,
        tokens_per_image=asked.tokens_per_image,
        to_the_end=to_the_end,
        edits=_edits(asked, spec, picture, machine),
        given=picture.given,
        compiled=machine.compiled,
        attention=machine.attention,
    )
    _check_tokens(recipe)
    recipe.plan()  # it raises for steps that the schedule does not have
    check_steps(recipe.steps, recipe.num_steps, recipe.first_step)
    settings = CollectSettings(
        recipe=recipe,
        prompts=_prompts(asked.prompts)[: asked.max_prompts],
        repeats=asked.repeats,
        seed=asked.seed,
        batch_size=asked.batch_size,
        save_images=asked.save_images,
        save_latents=asked.save_latents,
        verify=asked.verify,
    )
    suite = asked.suite(
        machine,
        progress if ranks.is_first else unwatched,
        autoencoder=asked.save_images or bool(picture.given.given()),
        sharded_over=ranks.world_size if asked.fsdp else 1,
    )
    return CollectionJob(settings, suite, machine, str(asked.output_dir))


def _edits(asked: CollectArguments, spec: ModelSpec, picture: SettledPicture, machine: Machine) -> Steering | None:
    if asked.edit is None:
        return None
    edits, device = as_edits(asked.edit), machine.placement.transformer
    return Steering(
        edits,
        spec,
        grid=picture.grid,
        num_steps=picture.num_steps,
        first_step=picture.first_step,
        device=device,
    )


def _check_fsdp(asked: CollectArguments, ranks: Ranks) -> None:
    if ranks.world_size == 1:
        raise FluxIRError(
            "--fsdp shards the transformer over processes: there is one",
            hint="start with torchrun --nproc_per_node N -m flux_ir collect",
        )
    others = {"offload": asked.offload, "vram_gb": asked.vram_gb, "memory_gb": asked.memory_gb}
    if given := [f"--{name}" for name, value in others.items() if value]:
        raise FluxIRError(
            f"--fsdp keeps a part of every weight on each device, {given[0]} is for a network of one process: got both",
            hint=f"leave out --fsdp or {given[0]}",
        )
    if isinstance(asked.model, Suite):
        raise FluxIRError("--fsdp says how a model is loaded: got a loaded one", hint="pass the model by its name")


def _check_tokens(recipe: Recipe) -> None:
    if recipe.tokens_per_image is not None and not 1 <= recipe.tokens_per_image <= recipe.img_tokens:
        raise FluxIRError(
            f"--tokens_per_image must be from 1 to the {recipe.img_tokens} image tokens of a picture of "
            f"{recipe.width} x {recipe.height} px: got {recipe.tokens_per_image}",
            hint="leave it out to keep all of them",
        )


def _prompts(given: str | Path | Sequence[str]) -> list[str]:
    if isinstance(given, str | Path):
        return read_prompts(Path(given))
    if not given:
        raise FluxIRError("there must be a prompt: got an empty list", hint="pass a list of texts, or a file of them")
    for number, prompt in enumerate(given):
        if not prompt.strip():
            raise FluxIRError(f"prompts must not be empty: number {number} of the list is", hint="leave it out")
    return [prompt.strip() for prompt in given]  # as they are read from a file


# ---- Progress and notes


def _opening(job: CollectionJob, ranks: Ranks) -> str:
    """The first note: which model, where, in which dtype, and how much there is to do."""
    recipe, placement = job.settings.recipe, job.suite.placement
    where = f"{', '.join(placement.devices)} ({placement.reason})"
    if ranks.world_size > 1:
        where = f"{ranks.world_size} processes, each on a {torch.device(placement.transformer).type} device"
        if job.suite.sharded_over > 1:
            where += ", the transformer's blocks sharded over all"
    generations = len(job.settings.prompts) * job.settings.repeats
    runs = "no step runs" if not recipe.sites and recipe.steps == (0,) else f"no step runs after {recipe.steps[-1]}"
    until = "all steps run" if recipe.to_the_end else runs
    work = f"generations {generations}, sites {len(recipe.sites) + len(recipe.text_sites)}, {until}"
    return f"{recipe.spec.name} on {where}, {job.machine.compute}: {work}"


def _follow_all_ranks(watch: Watch, stage: str, own: Iterable[object], ranks: Ranks, *, total: int) -> None:
    """Does this rank's part of a stage (`own`) and waits for the others. Rank 0 tells how far all of them are."""
    done = _done_by_all_ranks(stage, own, ranks)
    for _ in follow(watch, stage, done, total) if ranks.is_first and total else done:
        pass


def _done_by_all_ranks(stage: str, own: Iterable[object], ranks: Ranks) -> Iterator[None]:
    """Does this rank's part, then waits; yields once for each thing that any rank has done."""
    seen = 0
    for _ in own:
        done = ranks.count(stage) or seen + 1  # one process alone shares no counter: `count` is 0
        yield from repeat(None, done - seen)
        seen = done
    for _ in arrivals(f"{stage} is done", ranks):
        done = ranks.count(stage, 0) or seen
        yield from repeat(None, done - seen)
        seen = done


def _note_on_prompts(collector: Collector, watch: Watch) -> None:
    """Says if the encoders cannot make sense of some new prompts: of the first `NOTED_PROMPTS` alone, to be quick."""
    looked_at = collector.new_prompts(NOTED_PROMPTS)
    if not looked_at:
        return
    with collector.suite.text_encoders() as text:
        notes = {prompt: [*text.t5.notes(prompt), *text.clip.notes(prompt)] for prompt in looked_at}
    if noted := [prompt for prompt in looked_at if notes[prompt]]:
        share = f"{len(noted)} of the first {len(looked_at)} new prompts"
        watch(Note(f"note: {collector.recipe.spec.name}: {share}, such as {noted[0][:60]!r}: {notes[noted[0]][0]}"))


def _collected(collection: Collection, made: int) -> Collected:
    settings, generations = collection.settings, len(collection.work)
    rows = read_index(collection.storage) if settings.extras else ()
    extras = sum(row[extra]["bytes"] for row in rows for extra in settings.extras)
    shards = sum(collection.storage.size(collection.shard(number).name) or 0 for number in range(collection.shards))
    tokens = generations * tokens_per_generation(settings.recipe)
    return Collected(collection.storage.where, generations, made, tokens, shards + extras)


def tokens_per_generation(recipe: Recipe) -> int:
    """Tokens that are kept of one generation, over all sites and steps."""
    plan = recipe.plan()
    return sum(plan.shape(site)[1] for _, site in recipe.steps_and_sites)
