"""`--plan`: what a capture or a collection would take, in tokens, bytes, memory and time.

Sizes are exact; times come from a short trial of the model itself, on the machine at hand. Nothing stays behind.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from flux_ir.api.capture import CaptureSettings, describe, planned_file, settle
from flux_ir.api.collect import CollectionJob, collection_job
from flux_ir.api.room import Room, check_disk, check_memory, free_memory, room_at, weights_bytes
from flux_ir.collecting.collection import Collection
from flux_ir.collecting.sizes import embeddings_bytes, latents_bytes, shard_sizes, site_sizes
from flux_ir.collecting.storage import LocalStorage
from flux_ir.commands.report import Report, bytes_at
from flux_ir.commands.trials import TRIAL_STEPS, Pace, measure_capture, measure_collection
from flux_ir.distributed import Ranks, joined
from flux_ir.errors import FluxIRError, counted, in_units
from flux_ir.layout import RunFolder
from flux_ir.lens.readout import image_outputs
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.suite import Suite
from flux_ir.models.text.tokenizer import load_tokenizer
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.writer import file_bytes

Rows = list[tuple[str, str, str]]


def plan_capture(settings: CaptureSettings) -> None:
    """Print what the capture would take. Raises FluxIRError if it does not fit."""
    report = Report()
    job = settle(settings)
    metadata = describe(job, RunFolder(Path(settings.output_dir), "0" * 8), "00000000_000000")  # as long as any
    planned = planned_file(job, metadata)
    total, steps = file_bytes(planned), len(job.timesteps) - 1
    _title(
        report,
        f"plan: {job.spec.name}, {job.width} x {job.height} px, {len(planned.kept_steps)} of {steps} steps kept",
    )
    _print(report, _size_rows(planned, 1, total))
    pictures = len(image_outputs(job.sites)) * len(planned.kept_steps) if settings.should_decode_intermediates else 0
    pictures *= 2 if settings.lens == "both" else 1
    room = room_at(str(settings.output_dir))
    _print(report, [("pictures", f"{1 + pictures}", "JPEG: what they take depends on them"), *_room_rows(room)])
    check_disk(total, room, flags="--sites or --steps")
    source = locate_model(
        job.spec, settings.checkpoint, settings.ae_checkpoint, text=job.text is None, announce=report.note
    )
    suite = Suite(job.spec, source, job.placement, job.compute.dtype)
    weights = weights_bytes(suite)
    check_memory(weights, suite.placement)
    report.note(f"a trial of {TRIAL_STEPS} steps")
    with _enough_memory():
        pace = measure_capture(job, planned, suite, room, pictures=pictures)
    _print(report, _pace_rows(pace, "step", steps, sum(weights.values())))


def plan_collection(arguments: Mapping[str, Any]) -> None:
    """Print what the whole collection would take, by the arguments of `api.collect`.

    Raises FluxIRError if it does not fit.
    """
    report = Report()
    with joined() as ranks:
        job = collection_job(**arguments, ranks=ranks, progress=report.watch)
        if ranks.is_first:
            _plan_collection(job, ranks, report)


def _plan_collection(job: CollectionJob, ranks: Ranks, report: Report) -> None:
    settings, suite = job.settings, job.suite
    recipe = settings.recipe
    collection = Collection(LocalStorage(Path()), settings, batch_size=1)  # nothing is written or read there
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
    room = room_at(job.output_dir)
    there = 0 if room.folder is None else bytes_at(Path(job.output_dir).expanduser())
    _print(report, [*_room_rows(room), *([("already there", in_units(there), job.output_dir)] if there else [])])
    needed = sizes.shards + sizes.notes + embedded + latents - there
    check_disk(needed, room, flags="--sites, --steps, --tokens_per_image or --store_dtype")
    weights = weights_bytes(suite)
    check_memory(weights, suite.placement, encoders_go_first=True)
    report.note(f"a trial of two rounds of batches, in {job.compute}")
    with _enough_memory():
        pace = measure_collection(settings, suite, job.output_dir, room)
    once = {"text": pace.once["text"] * len(set(settings.prompts))}
    rows = _pace_rows(pace._replace(once=once), "generation", len(work), sum(weights.values()))
    if ranks.world_size > 1:
        rows.append(("processes", f"{ranks.world_size}", "the times above are those of one"))
    _print(report, rows)
    pictures = sum(pace.extras.values()) * len(work)
    check_disk(needed + pictures, room, flags="--sites or --steps, leave out --save_images")


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


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FluxIRError(
            f"it does not fit: the trial ran out of memory: {str(error).splitlines()[0]}",
            hint="try --offload, a smaller --width and --height, or a GPU with more memory",
        ) from error


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


def _room_rows(room: Room) -> Rows:
    if room.free_bytes is None:
        return [("free disk", "unknown", f"of {room.where}")]
    return [("free disk", in_units(room.free_bytes), f"at {room.where}")]


def _pace_rows(pace: Pace, unit: str, units: int, weights: int) -> Rows:
    rows: Rows = [("weights", in_units(weights), "of all parts of the model")]
    for device, peak in pace.memory.items():
        free = free_memory("cpu" if device == "host" else device)
        note = "peak of the trial" + (f"; {in_units(free)} are free now" if free is not None else "")
        rows.append((f"memory, {device}", in_units(peak), note))
    rows += [
        (f"{name} per {unit}", in_units(size), f"{in_units(size * units)} in all") for name, size in pace.extras.items()
    ]
    rows += [(f"time, {name}", _duration(seconds), "once") for name, seconds in pace.once.items()]
    parts = f"compute {pace.compute:.3g} s, copy {pace.copy:.3g} s, disk {pace.disk:.3g} s"
    rows.append((f"time, per {unit}", f"{pace.unit:.3g} s", f"{parts}; they overlap"))
    rows.append(("time, in all", _duration(pace.seconds(units)), f"for {counted(units, unit)}, as the trial went"))
    rows.append(("what limits", pace.limit, ""))
    return rows


def _duration(seconds: float) -> str:
    """Seconds for people: 12.3 s, 4.5 min, 6.7 h, 8.9 days."""
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.3g} s"


def _title(report: Report, text: str) -> None:
    report.results.print(Text(text, style="bold"))


def _print(report: Report, rows: Rows) -> None:
    for name, amount, note in rows:
        report.results.print(Text(f"{name:<24}  {amount:>18}  {note}".rstrip()))
