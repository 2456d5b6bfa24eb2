"""How many generations go through the network together."""

from collections.abc import Callable

import torch

from flux_ir.activations.shards import SHARD_IMAGES
from flux_ir.collecting.embeddings import EmbeddedPrompt
from flux_ir.collecting.prompts import WorkItem
from flux_ir.collecting.recipe import Recipe, record_batch, recorded_bytes
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.text import TextEmbedding

CPU_BATCH = 8
"""On a CPU: with flux-tiny 1.8 times the speed of single generations, and no slower than 16 (which take twice the
memory). With wider networks it makes less of a difference."""
MOST_BYTES = 2**30
"""The size of the recordings that a batch may hold in memory until they are written."""


def cpu_batch(recipe: Recipe) -> int:
    """The batch size on a CPU."""
    return min(CPU_BATCH, _held(recipe))


def gpu_batch(model: Flux, recipe: Recipe) -> int:
    """The largest power of two that fits on the model's GPU, found by trying."""
    return largest_that_fits(lambda batch: _try(model, recipe, batch), _held(recipe))


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """The largest power of two up to `most` with which `attempt` does not run out of memory; at least 1."""
    size = 1 << (min(most, SHARD_IMAGES).bit_length() - 1)
    while size > 1:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return size
        torch.cuda.empty_cache()
    return 1


def _held(recipe: Recipe) -> int:
    return max(1, MOST_BYTES // recorded_bytes(recipe))


def _try(model: Flux, recipe: Recipe, batch: int) -> None:
    flux = recipe.spec.flux
    txt, y = torch.zeros(1, recipe.spec.text_tokens, flux.context_in_dim), torch.zeros(1, flux.vec_in_dim)
    layers = {site: torch.zeros(1, *recipe.spec.text_shape(site)) for site in recipe.text_sites}
    text = EmbeddedPrompt(TextEmbedding(txt, y), 0, layers)
    record_batch(model, recipe, [WorkItem("", "", number, number) for number in range(batch)], [text] * batch)
