"""How large a collection will be, to the byte, before anything is computed."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch

from flux_ir.activations.shards import site_key
from flux_ir.collecting.collection import Collection
from flux_ir.collecting.collector import latent_content
from flux_ir.collecting.embeddings import EmbeddedPrompt, embedding_content
from flux_ir.collecting.prompts import WorkList
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.shard_notes import FileFacts, ShardNotes, notes_content
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.sites import Site


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
    """Bytes of a collection's shards, exactly, and of what stands beside them (pictures left out)."""

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
    empty = {site_key(site, step): SiteStatistics(plan.shape(site)[-1]) for step, site in recipe.places}
    statistics = len(notes_content(ShardNotes(FileFacts(0, ""), [], {}, empty)))
    shards = notes = 0
    for number in range(collection.shards):
        shard = collection.shard(number)
        used = [used_txt(item.prompt) for item in shard.items]
        shards += shard.layout(recipe, used).nbytes
        notes += statistics + len(str(used)) + 64
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
