"""Activations that never touch a disk: the blocks that a collection of the same settings would hold, as they are made.

`threads.ahead` runs this ahead of what consumes it.
"""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from torch import Tensor

from flux_ir.activations.blocks import TokenBlock, leading_txt, token_positions
from flux_ir.collecting.batches import (
    RecordedBatch,
    RecordedGeneration,
    batches_of,
    batches_under_way,
    borrowed,
    check_finite,
    cpu_batch,
    gpu_batch,
    record_batch,
    replicas,
)
from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.embeddings import EmbeddedPrompt, embed_prompts
from flux_ir.collecting.prompts import WorkItem, WorkList
from flux_ir.collecting.recipe import Recipe, edited_text
from flux_ir.distributed import Ranks
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import Suite
from flux_ir.recording.plan import ScaleOf, pieces_of_site, positions
from flux_ir.threads import in_order


def live_blocks(
    settings: CollectSettings, suite: Suite, *, start: int = 0, ranks: Ranks | None = None
) -> Iterator[TokenBlock]:
    """Every block of every generation, in the order of the work: of a generation step after step, sites by depth.

    The bits are those of the files that `collector` writes with these settings, dtype and token positions
    included. Pictures are never decoded, and layers of text encoders are not recorded. `start` is the number of the
    first generation to yield, counted over all ranks; shards are dealt to `ranks` as they are when collecting. Many
    `repeats` make a stream as long as training may ever need.

    A shard's prompts are encoded when it is its turn, so both text encoders stay loaded. Raises FluxIRError for values
    that are not finite.
    """
    recipe, ranks = settings.recipe, ranks or Ranks()
    work = WorkList(settings.prompts, repeats=settings.repeats, seed=settings.seed)
    images = settings.shard_images
    every = range(start // images, -(-len(work) // images))
    shards = (shard for shard in every if shard % ranks.world_size == ranks.rank)
    with suite.transformer() as model:
        on_cpu = model.img_in.weight.device.type == "cpu"
        workers = batches_under_way(model)
        size = settings.batch_size or (cpu_batch(recipe) if on_cpu else gpu_batch(model, recipe))
        record = partial(_record, replicas(model, workers), recipe)
        batches = _batches(suite, recipe, work, shards, images, size, start)
        with closing(in_order(record, batches, workers, torch_threads=1)) as recorded:
            for skipped, batch in recorded:
                for generation in batch.generations()[skipped:]:
                    yield from blocks_of(recipe, generation)


def blocks_of(recipe: Recipe, generation: RecordedGeneration) -> Iterator[TokenBlock]:
    """What a shard holds of this generation at the sites of the transformer, as blocks."""
    plan = recipe.plan(generation.item)
    kept = positions(plan)
    for step in plan.kept_steps:
        for site in plan.sites:
            pieces = pieces_of_site(plan, step, site, generation.values[step, site])
            tensors = {piece.of: _own(piece.value[0]) for piece in pieces}
            yield TokenBlock(
                values=tensors[site],
                scale=tensors.get(ScaleOf(site)),
                site=site,
                step=step,
                generation=generation.item.id,
                prompt=generation.item.prompt,
                positions=token_positions(site, plan.txt_tokens, kept, tensors[site].shape[0]),
                txt_tokens=leading_txt(site, plan.txt_tokens),
                used_txt=generation.used_txt,
            )


class _Batch(NamedTuple):
    """Generations to be recorded together. The first `skipped` are not yielded: a smaller batch may give other bits."""

    skipped: int
    items: list[WorkItem]
    embedded: list[EmbeddedPrompt]


def _batches(
    suite: Suite, recipe: Recipe, work: WorkList, shards: Iterator[int], images: int, size: int, start: int
) -> Iterator[_Batch]:
    """The batches of a collection with these settings, but for those that end before the generation `start`."""
    for shard in shards:
        to_record = []
        begin = shard * images
        for batch in batches_of(work.items(begin, begin + images), size):
            if begin + len(batch) > start:
                to_record.append((max(0, start - begin), list(batch)))
            begin += len(batch)
        embedded = _embedded(suite, recipe, [item.prompt for _, batch in to_record for item in batch])
        for skipped, batch in to_record:
            yield _Batch(skipped, batch, [embedded[item.prompt] for item in batch])


def _embedded(suite: Suite, recipe: Recipe, prompts: list[str]) -> dict[str, EmbeddedPrompt]:
    """Every prompt's embedding, each computed once."""
    different = list(dict.fromkeys(prompts))
    with suite.text_encoders() as encoders, edited_text(recipe, encoders):
        return dict(zip(different, embed_prompts(encoders, different), strict=True))


def _record(networks: "SimpleQueue[Transformer]", recipe: Recipe, batch: _Batch) -> tuple[int, RecordedBatch]:
    with borrowed(networks) as network:
        recorded = record_batch(network, recipe, batch.items, batch.embedded)
    check_finite(recipe, recorded)
    return batch.skipped, recorded


def _own(value: Tensor) -> Tensor:
    """The value in memory of its own: a view would keep the whole batch for as long as it waits."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
