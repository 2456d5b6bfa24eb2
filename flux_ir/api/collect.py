"""Collections: activations of many generations, or of many pictures under CLIP, in shards that are computed once."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.models import check_settled, dtype_as_loaded, side_px
from flux_ir.api.progress import Note, Progress, Watch, follow, phase, unwatched
from flux_ir.collecting.clip_images import ClipCollection, ClipProgress, ClipSettings, Networks
from flux_ir.collecting.collection import Collection, CollectSettings, read_index
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.convert import Conversion
from flux_ir.collecting.image_sources import FolderImages, check_images, open_images
from flux_ir.collecting.prompts import read_prompts
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.shard_notes import files_digest
from flux_ir.collecting.storage import one_job_at, open_storage
from flux_ir.distributed import Ranks, all_sum, arrivals, joined
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.clip import TokenChoice, load_vision, locate_clip, read_preprocessing
from flux_ir.models.compute_dtype import ComputeDtype, DtypeWord, choose_dtype
from flux_ir.models.placement import Placement, plan
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import load_clip
from flux_ir.sampling.generate import check_size
from flux_ir.sites import SiteNames, sites_among

NOTED_PROMPTS = 256

StoreDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn"]


class Collected(NamedTuple):
    """What a complete collection holds."""

    where: str
    generations: int
    made: int
    """How many of them were made now, by all processes."""
    tokens: int
    """That are kept, over all sites and steps."""
    bytes: int
    """What shards, pictures and latents take: without the index, the statistics and the embedded prompts."""


class CollectionJob(NamedTuple):
    """What is to be collected, with which model, and where."""

    settings: CollectSettings
    suite: Suite
    compute: ComputeDtype
    output_dir: str


def collect(
    prompts: str | Path | Sequence[str],
    sites: SiteNames,
    output_dir: str | Path,
    *,
    model: str | Suite = "flux-schnell",
    repeats: int = 1,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    steps: Iterable[int] | None = None,
    tokens_per_image: int | None = None,
    dtype: DtypeWord = "auto",
    store_dtype: StoreDtype = "bfloat16",
    save_images: bool = False,
    save_latents: bool = False,
    batch_size: int | None = None,
    verify: Literal["checksums", "sizes"] = "checksums",
    device: str | None = None,
    offload: bool = False,
    checkpoint: Path | None = None,
    ae_checkpoint: Path | None = None,
    progress: Watch = unwatched,
) -> Collected:
    """Collect what some sites put out over many prompts, into shards; goes on with what is there.

    `prompts` is a list, or a .txt, .jsonl or .csv file; each is sampled `repeats` times, from noise that follows from
    `seed`, the prompt and the repeat. `sites` are names or patterns, `steps` the steps to keep (None: all); no step
    runs after the last of them unless pictures or latents are kept. `output_dir` is a folder or a URL. `model` is the
    name of one, or a loaded `Suite`, which brings its own device and dtype. What the network computes in `dtype` is
    kept in `store_dtype`. Under torchrun all processes call this alike and share the work.

    Raises FluxIRError for what a user can mend: before a weight is read where that is possible.
    """
    with joined() as ranks:
        job = collection_job(
            prompts,
            sites,
            output_dir,
            model=model,
            repeats=repeats,
            seed=seed,
            width=width,
            height=height,
            num_steps=num_steps,
            guidance=guidance,
            steps=steps,
            tokens_per_image=tokens_per_image,
            dtype=dtype,
            store_dtype=store_dtype,
            save_images=save_images,
            save_latents=save_latents,
            batch_size=batch_size,
            verify=verify,
            device=device,
            offload=offload,
            checkpoint=checkpoint,
            ae_checkpoint=ae_checkpoint,
            ranks=ranks,
            progress=progress,
        )
        watch = progress if ranks.is_first else unwatched
        watch(Note(_opening(job, ranks)))
        if job.compute.warning:
            watch(Note(f"note: {job.compute.warning}"))
        storage = open_storage(job.output_dir, rank=ranks.rank)
        with one_job_at(storage, ranks):
            collector = Collector(job.settings, job.suite, storage, ranks)
            made = _work(collector, watch)
        return _collected(collector.collection, made)


def collection_job(
    prompts: str | Path | Sequence[str],
    sites: SiteNames,
    output_dir: str | Path,
    *,
    model: str | Suite,
    repeats: int,
    seed: int,
    width: int | None,
    height: int | None,
    num_steps: int | None,
    guidance: float | None,
    steps: Iterable[int] | None,
    tokens_per_image: int | None,
    dtype: DtypeWord,
    store_dtype: StoreDtype,
    save_images: bool,
    save_latents: bool,
    batch_size: int | None,
    verify: Literal["checksums", "sizes"],
    device: str | None,
    offload: bool,
    checkpoint: Path | None,
    ae_checkpoint: Path | None,
    ranks: Ranks,
    progress: Watch = unwatched,
) -> CollectionJob:
    """Answers every question that is left open, the cheapest first, and locates the model; loads and writes nothing.

    The arguments are those of `collect`. Raises FluxIRError for what a user can mend.
    """
    check_words(collection_job, {"dtype": dtype, "store_dtype": store_dtype, "verify": verify})
    check_least({"seed": 0, "repeats": 1}, {"seed": seed, "repeats": repeats})
    if not str(output_dir).strip():
        raise FluxIRError(
            f"--output_dir must name a folder or a URL: got {str(output_dir)!r}",
            hint="write --output_dir captures/NAME",
        )
    spec = model.spec if isinstance(model, Suite) else get_spec(model)
    width, height = side_px(width, spec), side_px(height, spec)
    check_size(height, width)
    num_steps = spec.default_steps if num_steps is None else num_steps
    chosen = sites_among(sites, spec.sites)
    if isinstance(model, Suite):
        check_settled(dtype=dtype, device=device, offload=offload, checkpoint=checkpoint, ae_checkpoint=ae_checkpoint)
        placement, compute = model.placement, dtype_as_loaded(model)
    else:
        placement = _place(device, ranks, offload=offload)
        compute = choose_dtype(dtype, placement.devices, ranks=ranks)
    recipe = Recipe(
        spec=spec,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=spec.default_guidance if guidance is None else guidance,
        sites=tuple(site for site in chosen if not site.per_prompt),
        text_sites=tuple(site for site in chosen if site.per_prompt),
        steps=tuple(range(num_steps) if steps is None else steps),
        stored_dtype=getattr(torch, store_dtype),
        network_dtype=compute.dtype,
        tokens_per_image=tokens_per_image,
        to_the_end=save_images or save_latents,
    )
    _check(recipe)
    settings = CollectSettings(
        recipe=recipe,
        prompts=read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else _checked_prompts(prompts),
        repeats=repeats,
        seed=seed,
        batch_size=batch_size,
        save_images=save_images,
        save_latents=save_latents,
        verify=verify,
    )
    if isinstance(model, Suite):
        return CollectionJob(settings, model, compute, str(output_dir))

    def announce(text: str) -> None:
        progress(Note(text))

    source = locate_model(
        spec, checkpoint, ae_checkpoint, autoencoder=save_images, announce=announce if ranks.is_first else None
    )
    return CollectionJob(settings, Suite(spec, source, placement, compute.dtype), compute, str(output_dir))


def tokens_per_generation(recipe: Recipe) -> int:
    """Tokens that are kept of one generation, over all sites and steps."""
    shape = recipe.plan()
    return sum(shape.shape(site)[1] for _, site in recipe.places)


def _check(recipe: Recipe) -> None:
    if recipe.tokens_per_image is not None and not 1 <= recipe.tokens_per_image <= recipe.img_tokens:
        raise FluxIRError(
            f"--tokens_per_image must be at most the {recipe.img_tokens} image tokens of a picture of "
            f"{recipe.width} x {recipe.height} px: got {recipe.tokens_per_image}",
            hint="leave it out to keep all of them",
        )
    recipe.plan()  # it raises for steps that the schedule does not have


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if not prompts:
        raise FluxIRError("there must be a prompt: got an empty list", hint="pass a list of texts, or a file of them")
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise FluxIRError(f"prompts must not be empty: number {number} of the list is", hint="leave it out")
    return [prompt.strip() for prompt in prompts]  # as they are read from a file


def _place(device: str | None, ranks: Ranks, *, offload: bool) -> Placement:
    """Everything on one device: the one that is named, or the GPU of this rank."""
    own = device if ranks.world_size == 1 else str(ranks.device(device))
    return plan(torch.cuda.device_count(), device=own, offload=offload)


def _opening(job: CollectionJob, ranks: Ranks) -> str:
    recipe, placement = job.settings.recipe, job.suite.placement
    where = f"{', '.join(placement.devices)} ({placement.reason})"
    if ranks.world_size > 1:
        where = f"{ranks.world_size} processes, each on a {torch.device(placement.transformer).type} device"
    generations = len(job.settings.prompts) * job.settings.repeats
    until = "all steps run" if recipe.to_the_end else f"no step runs after {recipe.steps[-1]}"
    work = f"generations {generations}, sites {len(recipe.sites) + len(recipe.text_sites)}, {until}"
    return f"{recipe.spec.name} on {where}, {job.compute}: {work}"


def _work(job: Collector, watch: Watch) -> int:
    """Verify, encode, record, merge; returns how many generations were made by all ranks. Stages count all of them."""
    ranks = job.ranks
    shards = job.collection.shards if job.was_begun else 0
    _together(watch, "verify", job.verify(), ranks, total=shards)
    if ranks.is_first:
        _note_on_prompts(job, watch)
    to_encode, missing = all_sum(torch.tensor([job.prompts_to_encode, job.missing]), ranks).tolist()
    _together(watch, "text", job.encode(), ranks, total=to_encode)
    _together(watch, "collect", job.record(), ranks, total=missing)
    merged = job.merge()
    for _ in follow(watch, "merge", merged, job.collection.shards) if ranks.is_first else merged:
        pass
    return int(missing)


def _together(watch: Watch, stage: str, own: Iterable[object], ranks: Ranks, *, total: int) -> None:
    """Does this rank's part and waits for the others'. Rank 0 tells how far all of them are."""
    everyones = _everyones(stage, own, ranks)
    for _ in follow(watch, stage, everyones, total) if ranks.is_first and total else everyones:
        pass


def _everyones(stage: str, own: Iterable[object], ranks: Ranks) -> Iterator[None]:
    """Yields once for each thing that any rank has done since the last look."""
    seen = 0
    for _ in own:
        done = ranks.count(stage) or seen + 1
        yield from repeat(None, done - seen)
        seen = done
    for _ in arrivals(f"{stage} is done", ranks):
        done = ranks.count(stage, 0) or seen
        yield from repeat(None, done - seen)
        seen = done


def _note_on_prompts(job: Collector, watch: Watch) -> None:
    """Says if the encoders cannot make sense of some of the prompts that are new: of the first ones, to be quick."""
    looked_at = job.new_prompts(NOTED_PROMPTS)
    if not looked_at:
        return
    with job.suite.text_encoders() as text:
        notes = {prompt: [*text.t5.notes(prompt), *text.clip.notes(prompt)] for prompt in looked_at}
    if noted := [prompt for prompt in looked_at if notes[prompt]]:
        of = f"{len(noted)} of the first {len(looked_at)} new prompts"
        watch(Note(f"note: {job.recipe.spec.name}: {of}, such as {noted[0][:60]!r}: {notes[noted[0]][0]}"))


def _collected(collection: Collection, made: int) -> Collected:
    settings, generations = collection.settings, len(collection.work)
    rows = read_index(collection.storage) if settings.extras else ()
    extras = sum(row[extra]["bytes"] for row in rows for extra in settings.extras)
    shards = sum(collection.storage.size(collection.shard(number).name) or 0 for number in range(collection.shards))
    tokens = generations * tokens_per_generation(settings.recipe)
    return Collected(collection.storage.where, generations, made, tokens, shards + extras)


class Converted(NamedTuple):
    """A collection of shards that came of an old one."""

    where: str
    generations: int


def convert_collection(captures: str | Path, output_dir: str | Path, *, progress: Watch = unwatched) -> Converted:
    """Makes a collection of shards of an old one, which had a capture file for every generation and stays as it is.

    The new folder has the bytes that collecting anew gives; the same call goes on where it was stopped. Raises
    FluxIRError for a folder that holds no complete old collection, and for files of it that are broken.
    """
    conversion = Conversion(open_storage(str(captures)), open_storage(str(output_dir)))
    generations = len(conversion.collection.work)
    progress(Progress("convert", 0, generations))
    for done in conversion.run():
        progress(Progress("convert", done, generations))
    return Converted(conversion.new.where, generations)


class CollectedImages(NamedTuple):
    """What a complete collection of CLIP's activations holds."""

    where: str
    images: int
    earlier: int
    """How many of them earlier calls had made."""
    cut_captions: int
    """Captions of those made now that are longer than CLIP reads."""


def collect_clip(
    images: str | Path,
    output_dir: str | Path,
    *,
    clip: str = "openai/clip-vit-large-patch14",
    tokens: TokenChoice = "cls",
    captions: str | Path | None = None,
    dtype: DtypeWord = "auto",
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    batch_size: int = 32,
    device: str | None = None,
    progress: Watch = unwatched,
) -> CollectedImages:
    """Collect CLIP's activations of pictures, the vision hidden_states[-2], and the pooled text of their captions.

    `images` is a folder of pictures, or of shards of (image, caption): parquet files or tars of webdataset, which are
    streamed. `captions` are those of a folder of pictures: a file, or a folder of text files. `clip` is a folder as
    transformers saves it or a repository of the hub; `tokens` says which of a picture's tokens are kept. The same call
    goes on where it was stopped.

    Raises FluxIRError for what a user can mend: a picture or a caption that cannot be read is named.
    """
    check_words(collect_clip, {"tokens": tokens, "dtype": dtype, "store_dtype": store_dtype})
    source = open_images(Path(images), None if captions is None else Path(captions))
    placement = plan(torch.cuda.device_count(), device=device)
    compute = choose_dtype(dtype, placement.devices)

    def announce(text: str) -> None:
        progress(Note(text))

    if isinstance(source, FolderImages):
        with phase(progress, "check"):
            check_images(source)
    folder = locate_clip(clip, announce=announce)
    with_captions = "with captions" if source.has_captions else "without captions"
    announce(f"pictures {len(source)}, {with_captions}, {clip} on {placement.clip} ({placement.reason}), {compute}")
    if compute.warning:
        announce(f"note: {compute.warning}")
    with phase(progress, "load"):
        text = load_clip(folder, folder, placement.clip, compute.dtype) if source.has_captions else None
        vision = load_vision(folder, placement.clip, compute.dtype)
        networks = Networks(vision, read_preprocessing(folder), text)
    weights = files_digest(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    settings = ClipSettings(clip, weights, tokens, compute.dtype, getattr(torch, store_dtype), batch_size)
    collection = ClipCollection(open_storage(str(output_dir)), settings, source, networks)
    progress(Progress("collect", 0, len(source)))
    now = ClipProgress(0, 0, 0)
    for now in collection.collect():
        progress(Progress("collect", now.images, len(source)))
    return CollectedImages(collection.storage.where, now.images, now.earlier, now.cut_captions)
