"""How large captures will be, to the byte, before anything is computed."""

import pickle
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch

from flux_ir.collecting.batches import Recipe
from flux_ir.collecting.embeddings import EmbeddedPrompt, embedding_content
from flux_ir.collecting.prompts import WorkItem, WorkList
from flux_ir.collecting.writing import latent_content
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.store import file_bytes
from flux_ir.sites import Site

_AT_ONCE = 1024  # generations of a work list that are looked at together


class SiteSize(NamedTuple):
    """What one site takes in one capture."""

    site: Site
    tokens: int
    """Per step."""
    d: int
    bytes: int
    """Of all kept steps, with the scales of float8."""


def site_sizes(plan: CapturePlan) -> list[SiteSize]:
    """Every site of a capture, by depth."""
    sizes = []
    for site in plan.sites:
        shape = plan.shape(site)
        per_step = prod(shape) * plan.dtype.itemsize
        if plan.scales:
            per_step += prod(shape[:2]) * torch.float32.itemsize
        sizes.append(SiteSize(site, shape[1], shape[2], per_step * len(plan.kept_steps)))
    return sizes


def captures_bytes(recipe: Recipe, work: WorkList, used_txt: Callable[[str], int]) -> int:
    """Bytes of the capture files of a whole collection; `used_txt` counts the text tokens of a prompt.

    Sizes differ by what the metadata say, prompts above all, and by nothing else: each length is laid out once.
    """
    known: dict[int, int] = {}
    total = 0
    for start in range(0, len(work), _AT_ONCE):
        for item in work.items(start, start + _AT_ONCE):
            used = used_txt(item.prompt)
            length = _varying_length(item, used)
            if length not in known:
                known[length] = file_bytes(recipe.plan(item, used_txt=used))
            total += known[length]
    return total


def embeddings_bytes(recipe: Recipe, work: WorkList) -> int:
    """Bytes of the embedded prompts, kept once for each different prompt."""
    flux, dtype = recipe.spec.flux, recipe.network_dtype
    txt = torch.zeros(1, recipe.spec.text_tokens, flux.context_in_dim, dtype=dtype)
    text = TextEmbedding(txt, torch.zeros(1, flux.vec_in_dim, dtype=dtype))
    return len(embedding_content(EmbeddedPrompt(text, 0))) * len(set(work.prompts))


def latents_bytes(recipe: Recipe, work: WorkList) -> int:
    """Bytes of the finished latents of a whole collection."""
    latent = torch.zeros(1, recipe.img_tokens, recipe.spec.flux.in_channels, dtype=recipe.network_dtype)
    return len(latent_content(recipe, latent)) * len(work)


def _varying_length(item: WorkItem, used_txt: int) -> int:
    """The length, in the capture's own spelling, of everything in its metadata that differs between generations."""
    return len(pickle.dumps((item.prompt, item.seed, item.repeat, used_txt), protocol=2))
