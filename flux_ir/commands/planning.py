"""`--plan`: what a capture or a collection would take, as far as arithmetic goes.

Tokens and bytes follow from the settings and the prompts, to the byte; peak memory and seconds per step from the
arithmetic of `flux-ir plan`, about. What only a run can tell - all of the time, the size of JPEGs - is said to be
unknown, with the command of a small run whose report tells it, and memory exactly. No weight is read and nothing is
written; of a CPU the speed is measured, in a fraction of a second.
"""

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from rich.text import Text

from flux_ir.activations.shards import site_key
from flux_ir.api.capacity import (
    DiskSpace,
    Way,
    blocks_that_stay,
    capture_work,
    check_disk,
    check_fits,
    collection_work,
    disk_space_at,
    estimate,
    rates_here,
)
from flux_ir.api.capture import CaptureSettings, describe, planned_file, settle
from flux_ir.api.collect import CollectArguments, CollectionJob, settle_collection
from flux_ir.collecting.collection import Collection
from flux_ir.collecting.collector import latent_content
from flux_ir.collecting.embeddings import EmbeddedPrompt, embedding_content
from flux_ir.collecting.prompts import WorkList
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.shard_notes import FileFacts, ShardNotes, notes_content
from flux_ir.collecting.storage import LocalStorage
from flux_ir.commands.cli.option import Options, command_line
from flux_ir.commands.report import Report, bytes_at
from flux_ir.distributed import Ranks, joined
from flux_ir.errors import counted, in_units
from flux_ir.layout import RunFolder
from flux_ir.lens.readout import image_outputs
from flux_ir.models.footprint import Work, base_here
from flux_ir.models.memory import free_memory
from flux_ir.models.suite import TOKEN_PX, Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.models.text.tokenizer import load_tokenizer
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.recording.writer import file_bytes
from flux_ir.sites import Site

PACE_PROMPTS = 32
"""Prompts of the small run that measures a collection's pace: one batch for each of four threads of a CPU."""
PACE_STEPS = 4
"""Steps of the small run that measures a capture's."""

Rows = list[tuple[str, str, str]]


def plan_capture(settings: CaptureSettings, options: Options) -> None:
    """Print what the capture would take; `settings` are what these options of the command say.

    Raises FluxIRError if it does not fit.
    """
    report = Report()
    job = settle(settings)
    # The id and the time of a run are as long as these, and so is what the file says of them.
    metadata = describe(job, RunFolder(Path(settings.output_dir), "0" * 8), "00000000_000000")
    planned = planned_file(job, metadata)
    (width, height), steps = job.picture.grid, job.picture.num_steps
    total = file_bytes(planned)
    _title(
        report,
        f"plan: {job.spec.name}, {width} x {height} px, {len(planned.kept_steps)} of {steps} steps kept",
    )
    _print(report, _size_rows(planned, 1, total))
    pictures = len(image_outputs(job.sites)) * len(planned.kept_steps) if settings.should_decode_intermediates else 0
    pictures *= 2 if settings.lens == "both" else 1
    disk = disk_space_at(str(settings.output_dir))
    _print(report, [("pictures", f"{1 + pictures}", "JPEG: what they take depends on them"), *_disk_rows(disk)])
    check_disk(total, disk, flags="--sites or --steps")
    suite = settings.suite(job.machine, report.watch, text=job.text is None)
    work = capture_work(
        job.picture.grid.tokens * TOKEN_PX**2,
        job.txt_tokens + job.picture.grid.tokens + job.picture.given.cond_tokens,
        on_gpu=suite.placement.transformer != "cpu",
        encodes=job.text is None,
        capture_bytes=total,
        lens=settings.should_decode_intermediates,
    )
    _estimate(suite, work, report, txt_tokens=job.txt_tokens, what="capture")
    few = min(PACE_STEPS, steps)
    small = command_line(options, plan=False, num_steps=few, steps=None, should_decode_intermediates=False)
    _unknown(
        report,
        {
            "time": f"the seconds of load and text, and {steps}/{few} of those of sample; pictures come on top",
        },
        f"flux-ir capture {small}",
    )


def plan_collection(arguments: CollectArguments, options: Options) -> None:
    """Print what the whole collection would take; `arguments` are what these options of the command say.

    Raises FluxIRError if it does not fit.
    """
    report = Report()
    with joined() as ranks:
        job = settle_collection(arguments, ranks, report.watch)
        if ranks.is_first:
            _plan_collection(job, ranks, report, options)


def _plan_collection(job: CollectionJob, ranks: Ranks, report: Report, options: Options) -> None:
    settings, suite = job.settings, job.suite
    recipe = settings.recipe
    # Nothing is read or written in its storage, and no size depends on the batches.
    collection = Collection(LocalStorage(Path()), settings, batch_size=1)
    work = collection.work
    sizes, embedded = shard_sizes(collection, text_counter(suite)), embeddings_bytes(recipe, work)
    latents = latents_bytes(recipe, work) if settings.save_latents else 0
    generations = counted(len(work), "generation")
    _title(report, f"plan: {generations} of {recipe.spec.name}, {recipe.width} x {recipe.height} px")
    shards = f"of up to {collection.shard_images} generations"
    beside = [
        ("shards", f"{collection.shards}", shards),
        ("beside them", in_units(sizes.notes), "about: checksums and statistics of every shard"),
    ]
    beside += [("embedded prompts", f"{embedded} B", f"{len(set(settings.prompts))} different ones")]
    beside += [("latents", f"{latents} B", f"of {generations}")] if latents else []
    _print(report, [*_size_rows(recipe.plan(), len(work), sizes.shards, what="shards"), *beside])
    disk = disk_space_at(job.output_dir)
    there = 0 if disk.folder is None else bytes_at(Path(job.output_dir).expanduser())
    _print(report, [*_disk_rows(disk), *([("already there", in_units(there), job.output_dir)] if there else [])])
    needed = sizes.shards + sizes.notes + embedded + latents - there
    check_disk(needed, disk, flags="--sites, --steps, --tokens_per_image or --store_dtype")
    at_once = collection_work(settings, on_gpu=suite.placement.transformer != "cpu")
    _estimate(suite, at_once, report, txt_tokens=recipe.spec.text_tokens, what="collection", ranks=ranks)
    few = min(PACE_PROMPTS, len(settings.prompts))
    small = command_line(
        options, plan=False, max_prompts=few, repeats=1, output_dir=f"{job.output_dir.rstrip('/')}_pace"
    )
    processes = f" and by the {ranks.world_size} processes" if ranks.world_size > 1 else ""
    unknown = {
        "time": f"divide the tokens by the small run's tokens/s{processes}; encoding the prompts comes on top",
    }
    if settings.save_images:
        unknown["pictures"] = f"{len(work)} JPEGs: their bytes count among those of the small run"
    _unknown(report, unknown, f"flux-ir collect {small}")


def _estimate(
    suite: Suite, work: Work, report: Report, *, txt_tokens: int, what: str, ranks: Ranks | None = None
) -> None:
    """Print what it takes by the arithmetic of `flux-ir plan`. Raises FluxIRError where there is not so much."""
    spec, placement, dtype = suite.spec, suite.placement, suite.dtype
    resident = []
    if placement.offload == "blocks" and suite.source.quantize is None:
        resident = blocks_that_stay(spec, placement, dtype, tokens=suite.tokens)
    processes = 1 if ranks is None else ranks.world_size
    takes, pace = estimate(
        spec,
        Way(placement, resident, suite.source.quantize, processes, suite.sharded_over),
        dtype,
        rates_here(spec, placement.transformer, dtype, tokens=work.tokens),
        work,
        txt_tokens=txt_tokens,
        memory_bytes=placement.memory_bytes or free_memory("cpu"),
        base_bytes=base_here(),
    )
    rows = [("peak memory, host", in_units(takes.host), "about" if processes == 1 else "about, of all processes")]
    rows += [(f"peak memory, {device}", in_units(size), "about") for device, size in takes.devices.items()]
    rows += [("s/step", f"{pace.seconds:.3g}", f"about, of one picture; limited by {pace.limiter}")]
    _print(report, rows)
    check_fits(takes, what)


def _unknown(report: Report, rows: Mapping[str, str], command: str) -> None:
    """What is not known, how it follows from a small run's report, and the command of that run."""
    _print(report, [(name, "unknown", how) for name, how in rows.items()])
    report.results.print(Text("the small run, whose report tells what is unknown here:"))
    report.results.print(Text(f"  {command}"))


def text_counter(suite: Suite) -> Callable[[str], int]:
    """Counts the text tokens of a prompt that are not padding, as they will be recorded with it."""
    if suite.source.text is None:
        raise ValueError("prompts are counted by the text encoders, which were not located")
    source, most = suite.source.text.t5, suite.spec.text_tokens
    tokenizer = load_tokenizer(source.tokenizer_dir, what="the text encoder")

    @cache
    def count(prompt: str) -> int:
        return tokenizer.used(prompt, most)

    return count


# ---- Bytes


class SiteSize(NamedTuple):
    """What one site takes of one generation."""

    site: Site
    tokens: int
    """Per step; of a layer of a text encoder, per prompt."""
    d: int
    steps: int
    """How often these are kept: 1 for a layer of a text encoder."""
    bytes: int
    """What all of them take, with the scales of float8."""


class ShardSizes(NamedTuple):
    """Bytes of a collection's shards, exactly, and about those of their notes (where no pictures are kept)."""

    shards: int
    notes: int


def site_sizes(plan: CapturePlan) -> list[SiteSize]:
    """Every site of one generation, by depth."""
    sizes = []
    for site in (*plan.text_sites, *plan.sites):
        shape, steps = plan.shape(site), 1 if site.per_prompt else len(plan.kept_steps)
        per_step = prod(shape) * plan.dtype.itemsize
        if plan.scales:
            per_step += prod(shape[:2]) * torch.float32.itemsize
        sizes.append(SiteSize(site, shape[1], shape[2], steps, per_step * steps))
    return sizes


def shard_sizes(collection: Collection, used_txt: Callable[[str], int]) -> ShardSizes:
    """Bytes of all shards; `used_txt` counts the text tokens of a prompt, which stand in a shard's header."""
    recipe = collection.settings.recipe
    plan = recipe.plan()
    empty = {site_key(site, step): SiteStatistics(plan.shape(site)[-1]) for step, site in recipe.steps_and_sites}
    statistics = len(notes_content(ShardNotes(FileFacts(0, ""), [], {}, empty)))
    shards = notes = 0
    for number in range(collection.shards):
        shard = collection.shard(number)
        used = [used_txt(item.prompt) for item in shard.items]
        shards += shard.layout(recipe, used).nbytes
        notes += statistics + len(str(used)) + 64  # the checksum of the shard, 64 hex digits
    return ShardSizes(shards, notes)


def embeddings_bytes(recipe: Recipe, work: WorkList) -> int:
    """Bytes of the embedded prompts, kept once for each different prompt."""
    flux, dtype = recipe.spec.flux, recipe.network_dtype
    txt = torch.zeros(1, recipe.spec.text_tokens, flux.context_in_dim, dtype=dtype)
    text = TextEmbedding(txt, torch.zeros(1, flux.vec_in_dim, dtype=dtype))
    layers = {site: torch.zeros(1, *recipe.spec.text_shape(site), dtype=dtype) for site in recipe.text_sites}
    return len(embedding_content(EmbeddedPrompt(text, 0, layers))) * len(set(work.prompts))


def latents_bytes(recipe: Recipe, work: WorkList) -> int:
    """Bytes of the finished latents of a whole collection."""
    latent = torch.zeros(1, recipe.img_tokens, recipe.spec.flux.in_channels, dtype=recipe.network_dtype)
    return len(latent_content(recipe, latent)) * len(work)


# ---- Rows


def _size_rows(plan: CapturePlan, captures: int, total: int, *, what: str = "captures") -> Rows:
    """Tokens and bytes of every site, and of everything: `total` is exact."""
    steps, sizes = len(plan.kept_steps), site_sizes(plan)
    tokens = sum(size.tokens * size.steps for size in sizes) * captures
    factors = (counted(len(sizes), "site"), counted(steps, "step"), counted(captures, "generation"))
    rows: Rows = [("tokens", f"{tokens}", " x ".join(factors))]
    for size in sizes:
        per = "prompt" if size.site.per_prompt else "step"
        note = f"{size.tokens} tokens x {size.d} per {per}, {in_units(size.bytes * captures)}"
        rows.append((str(size.site), f"{size.bytes * captures} B", note))
    rest = total - sum(size.bytes for size in sizes) * captures
    rows.append(("state and layout", f"{rest} B", "what each step began with, and the files' own structure"))
    rows.append(("in all", f"{total} B", f"{in_units(total)}, exactly what the {what} will take"))
    return rows


def _disk_rows(disk: DiskSpace) -> Rows:
    if disk.free_bytes is None:
        return [("free disk", "unknown", f"of {disk.where}")]
    return [("free disk", in_units(disk.free_bytes), f"at {disk.where}")]


def _title(report: Report, text: str) -> None:
    report.results.print(Text(text, style="bold"))


def _print(report: Report, rows: Rows) -> None:
    for name, amount, note in rows:
        report.results.print(Text(f"{name:<24}  {amount:>18}  {note}".rstrip()))
