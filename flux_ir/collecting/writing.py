"""Recorded generations into the files of a collection, and what their rows and statistics say of them."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import safetensors.torch

from flux_ir.activations.whole import capture_content
from flux_ir.collecting.batches import Recipe, RecordedBatch, RecordedGeneration
from flux_ir.collecting.groups import Group, Row, Statistics
from flux_ir.collecting.prompts import WorkItem
from flux_ir.recording.pieces import ScaleOf, pieces_of_site
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.recording.store import load_capture
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import unpack
from flux_ir.shapes import PackedLatent, Pixels


class DrawnBatch(NamedTuple):
    """A recorded batch, and the pictures of it where they are asked for."""

    recorded: RecordedBatch
    pixels: Pixels | None


class WrittenBatch(NamedTuple):
    """Part of a group that is finished: the rows of its generations, and statistics over them in their order."""

    rows: list[Row]
    statistics: Statistics


def write_batch(group: Group, recipe: Recipe, drawn: DrawnBatch) -> WrittenBatch:
    """Writes every file of a batch, then notes them in the group's journal."""
    statistics: Statistics = {}
    rows = []
    for number, generation in enumerate(drawn.recorded.generations()):
        plan = recipe.plan(generation.item, used_txt=generation.used_txt)
        row = _write_capture(group, plan, generation)
        row |= _write_extras(group, recipe, generation, drawn.pixels, number)
        _count(statistics, plan, generation)
        rows.append(row)
    group.keep(rows)
    return WrittenBatch(rows, statistics)


def read_batch(group: Group, recipe: Recipe, items: list[WorkItem]) -> WrittenBatch:
    """A batch that was written before: its statistics are read from its files, and have the same bits."""
    statistics: Statistics = {}
    for item in items:
        capture = load_capture(group.storage.local(group.rows[item.id]["path"]))
        for step in recipe.steps:
            for site in recipe.sites:
                values, scale = capture.read_stored(site, step)
                sums = statistics.setdefault((site, step), SiteStatistics(values.shape[-1]))
                sums.add(values, scale)
    return WrittenBatch([group.rows[item.id] for item in items], statistics)


def _count(statistics: Statistics, plan: CapturePlan, generation: RecordedGeneration) -> None:
    """Adds what the file holds: the values as they were rounded, at the places that are kept."""
    for (step, site), value in generation.values.items():
        pieces = {piece.of: piece.value for piece in pieces_of_site(plan, step, site, value)}
        sums = statistics.setdefault((site, step), SiteStatistics(value.shape[-1]))
        sums.add(pieces[site], pieces.get(ScaleOf(site)))


def _write_capture(group: Group, plan: CapturePlan, generation: RecordedGeneration) -> Row:
    row = group.kept.row(generation.item, group.folder)
    content = capture_content(plan, generation.values, generation.contexts)
    return row | _published(group, row["path"], content) | {"used_txt": generation.used_txt}


def _write_extras(
    group: Group, recipe: Recipe, generation: RecordedGeneration, pixels: Pixels | None, number: int
) -> Row:
    made: dict[str, bytes] = {}
    if pixels is not None:
        made["image"] = jpeg_bytes(pixels, number, model=recipe.spec.name, prompt=_short(generation.item.prompt))
    if generation.latent is not None:
        made["latent"] = latent_content(recipe, generation.latent)
    names: Mapping[str, str] = group.kept.extras(generation.item, group.folder)
    return {extra: _published(group, name, made[extra]) for extra, name in names.items()}


def latent_content(recipe: Recipe, latent: PackedLatent) -> bytes:
    """The file of a finished latent: it has the same size for every generation."""
    unpacked = unpack(latent, recipe.height, recipe.width)[0]
    return safetensors.torch.save({"latent": unpacked.contiguous()})


def _published(group: Group, name: str, content: bytes | memoryview) -> Row:
    group.storage.publish(content, name)
    return {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _short(prompt: str) -> str | None:
    """The prompt, if a JPEG's EXIF data has room for it. The row has it in any case."""
    return prompt if len(prompt.encode()) <= MOST_EXIF_BYTES else None


MOST_EXIF_BYTES = 60_000  # the data ends at 64 kB
