"""The heavy half of the command `collect`: questions first, then the four parts of a job, then what came of it."""

from collections.abc import Iterable, Iterator
from itertools import repeat

import torch
from rich.text import Text

from flux_ir.collecting.batches import Recipe
from flux_ir.collecting.collection import Collection, CollectSettings, read_index
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.groups import EXTRAS
from flux_ir.collecting.one_job import one_job_at
from flux_ir.collecting.prompts import read_prompts
from flux_ir.collecting.storage import Storage, open_storage
from flux_ir.commands.cli.parse import INTERRUPTED
from flux_ir.commands.collect import CollectOptions
from flux_ir.commands.generation import check_steps
from flux_ir.commands.report import Report, counted, in_units, peak_memory
from flux_ir.distributed import Ranks, all_sum, arrivals, joined
from flux_ir.errors import FluxIRError
from flux_ir.models.placement import Placement, plan
from flux_ir.models.registry import ModelSpec, get_spec
from flux_ir.models.sources import locate_model
from flux_ir.models.suite import Suite
from flux_ir.sampling.generate import check_size
from flux_ir.sites import Site, all_sites, match_sites

NOTED_PROMPTS = 256


def collect(options: CollectOptions) -> int:
    """Collect, and print what there is then; returns the exit code."""
    report = Report()
    settings = settle(options)
    with joined() as ranks:
        placement = place(options, ranks)
        storage = open_storage(options.output_dir, rank=ranks.rank)
        announce = report.note if ranks.is_first else None
        source = locate_model(
            settings.recipe.spec,
            options.checkpoint,
            options.ae_checkpoint,
            autoencoder=options.save_images,
            announce=announce,
        )
        suite = Suite(settings.recipe.spec, source, placement, settings.recipe.network_dtype)
        if ranks.is_first:
            report.note(_opening(settings, placement, ranks))
        with one_job_at(storage, ranks):
            return _collect(settings, suite, storage, ranks, report)


def _collect(settings: CollectSettings, suite: Suite, storage: Storage, ranks: Ranks, report: Report) -> int:
    job = Collector(settings, suite, storage, ranks)
    try:
        made = work(job, report)
    except KeyboardInterrupt:
        if ranks.is_first:
            report.note(f"stopped: what is finished is kept in {storage.where}; the same command goes on from there")
        return INTERRUPTED
    if ranks.is_first:
        conclude(job.collection, storage, report, made)
    return 0


def settle(options: CollectOptions) -> CollectSettings:
    """Answer every question the options leave open. Raises FluxIRError for what a user can mend, cheapest first."""
    if not options.output_dir.strip():
        raise FluxIRError(
            f"--output_dir must name a folder or a URL: got {options.output_dir!r}",
            hint="write --output_dir captures/NAME",
        )
    spec = get_spec(options.model)
    width, height = options.width or spec.default_side_px, options.height or spec.default_side_px
    check_size(height, width)
    num_steps = options.num_steps or spec.default_steps
    recipe = Recipe(
        spec=spec,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=spec.default_guidance if options.guidance is None else options.guidance,
        sites=tuple(choose_sites(options.sites, spec)),
        steps=tuple(check_steps(options.steps, num_steps)),
        stored_dtype=getattr(torch, options.dtype),
        network_dtype=torch.float32 if options.dtype == "float32" else torch.bfloat16,
        tokens_per_image=options.tokens_per_image,
        to_the_end=options.save_images or options.save_latents,
    )
    if options.tokens_per_image is not None and options.tokens_per_image > recipe.img_tokens:
        raise FluxIRError(
            f"--tokens_per_image must be at most the {recipe.img_tokens} image tokens of a picture of "
            f"{width} x {height} px: got {options.tokens_per_image}",
            hint="leave it out to keep all of them",
        )
    return CollectSettings(
        recipe=recipe,
        prompts=read_prompts(options.prompts),
        repeats=options.repeats,
        seed=options.seed,
        batch_size=options.batch_size,
        save_images=options.save_images,
        save_latents=options.save_latents,
        verify=options.verify,
    )


def choose_sites(patterns: tuple[str, ...], spec: ModelSpec) -> list[Site]:
    """The sites to keep. Raises FluxIRError for a pattern that matches none, naming the nearest."""
    return match_sites(patterns, all_sites(spec.flux.depth, spec.flux.depth_single_blocks))


def place(options: CollectOptions, ranks: Ranks) -> Placement:
    """Everything on one device: the one that is named, or the GPU of this rank."""
    device = options.device if ranks.world_size == 1 else str(ranks.device(options.device))
    return plan(torch.cuda.device_count(), device=device, offload=options.offload)


def work(job: Collector, report: Report) -> int:
    """Verify, encode, record, merge, with one progress bar each for all ranks; returns how many were made by all."""
    ranks = job.ranks
    _together(report, "verify", job.verify(), ranks, total=len(job.collection.work) if job.was_begun else 0)
    if ranks.is_first:
        _note_on_prompts(job, report)
    to_encode, to_record, missing = _sums(ranks, job.prompts_to_encode, job.open_generations, job.missing)
    _together(report, "text", job.encode(), ranks, total=to_encode)
    _together(report, "collect", job.record(), ranks, total=to_record)
    for _ in job.merge():
        pass
    return missing


def _note_on_prompts(job: Collector, report: Report) -> None:
    """Says if the encoders cannot make sense of some of the prompts that are new: of the first ones, to be quick."""
    looked_at = job.new_prompts(NOTED_PROMPTS)
    if not looked_at:
        return
    with job.suite.text_encoders() as text:
        notes = {prompt: [*text.t5.notes(prompt), *text.clip.notes(prompt)] for prompt in looked_at}
    if noted := [prompt for prompt in looked_at if notes[prompt]]:
        of = f"{len(noted)} of the first {len(looked_at)} new prompts"
        report.note(f"note: {job.recipe.spec.name}: {of}, such as {noted[0][:60]!r}: {notes[noted[0]][0]}")


def _sums(ranks: Ranks, *numbers: int) -> list[int]:
    return all_sum(torch.tensor(numbers), ranks).tolist()


def _together(report: Report, name: str, own: Iterable[object], ranks: Ranks, *, total: int) -> None:
    """Does this rank's part and waits for the others'. Rank 0 draws how far all of them are."""
    everyones = _everyones(name, own, ranks)
    for _ in report.follow(name, everyones, total) if ranks.is_first and total else everyones:
        pass


def _everyones(name: str, own: Iterable[object], ranks: Ranks) -> Iterator[None]:
    """Yields once for each thing that any rank has done since the last look."""
    seen = 0
    for _ in own:
        done = ranks.count(name) or seen + 1
        yield from repeat(None, done - seen)
        seen = done
    for _ in arrivals(f"{name} is done", ranks):
        done = ranks.count(name, 0) or seen
        yield from repeat(None, done - seen)
        seen = done


def _opening(settings: CollectSettings, placement: Placement, ranks: Ranks) -> str:
    recipe = settings.recipe
    where = f"{', '.join(placement.devices)} ({placement.reason})"
    if ranks.world_size > 1:
        where = f"{ranks.world_size} processes, each on a {torch.device(placement.transformer).type} device"
    generations = counted(len(settings.prompts) * settings.repeats, "generation")
    until = "all steps run" if recipe.to_the_end else f"no step runs after {recipe.steps[-1]}"
    return f"{recipe.spec.name} on {where}: {generations}, {counted(len(recipe.sites), 'site')}, {until}"


def conclude(collection: Collection, storage: Storage, report: Report, made: int) -> None:
    """Say that the collection is complete, and print what it holds and what it took."""
    each = tokens_per_generation(collection.settings.recipe)
    generations = len(collection.work)
    files = (file for row in read_index(storage) for file in (row, *(row[extra] for extra in EXTRAS if extra in row)))
    seconds = report.seconds.get("collect", 0.0)
    rows = [("generations", f"{generations}", f"{made} of them now"), ("tokens", f"{generations * each}", "")]
    rows += [("bytes", in_units(sum(file["bytes"] for file in files)), "without the index and the embedded prompts")]
    rows += [(name, f"{value:.2f} s", "") for name, value in report.seconds.items()]
    if made and seconds:
        rows += [("speed", f"{made * each / seconds:.0f} tokens/s", "")]
    rows += [
        (f"peak memory, {device}", in_units(size), "of the first process") for device, size in peak_memory().items()
    ]
    rows += [("where", "", storage.where)]
    how = {"checksums": "size and checksum", "sizes": "size"}[collection.settings.verify]
    state = "complete" if made else f"complete; every file has its {how}"
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    report.results.print(Text(f"collection {state}", style="bold"))
    for name, amount, note in rows:
        report.results.print(Text(f"{name:<{widths[0]}}  {amount:>{widths[1]}}  {note}".rstrip()))


def tokens_per_generation(recipe: Recipe) -> int:
    """Tokens that are kept of one generation, over all sites and steps."""
    shape = recipe.plan()
    return sum(shape.shape(site)[1] for site in recipe.sites) * len(recipe.steps)
