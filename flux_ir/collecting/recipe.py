"""The recipe of a collection: how every generation is sampled, and what of it is recorded and kept.

Next: `batches`, which records by it; `collection`, the folder of shards, and `collector`, which fills it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch

from flux_ir.activations.shards import POSITIONS_KEY, ShardTensor, scale_key, site_key, state_key
from flux_ir.collecting.prompts import WorkItem
from flux_ir.models.architecture import Transformer
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.registry import ModelSpec
from flux_ir.models.suite import TextEncoders
from flux_ir.recording.plan import CapturePlan
from flux_ir.sampling.latents import image_ids
from flux_ir.sampling.pictures import RunPictures
from flux_ir.sampling.schedule import schedule_of
from flux_ir.shapes import Pooled
from flux_ir.sites import Site


@runtime_checkable
class RunEdits(Protocol):
    """Edits that every generation is made with; `steering`, which stands above this room, makes them."""

    def during(self, model: Transformer) -> AbstractContextManager[None]:
        """While it lasts, the transformer is edited."""

    def during_text(self, encoders: TextEncoders) -> AbstractContextManager[None]:
        """While it lasts, the text encoders are edited."""

    def edit_pooled(self, y: Pooled) -> Pooled:
        """CLIP's vector after the edits of it."""

    def described(self, *, with_strength: bool) -> list[dict[str, Any]]:
        """The edits by the content of what they name."""


@dataclass(frozen=True)
class Recipe:
    """How every generation of a job is sampled, and what of it is recorded and kept."""

    spec: ModelSpec
    width: int
    height: int
    num_steps: int
    guidance: float
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    stored_dtype: torch.dtype
    """The dtype of the activations in the shard."""
    network_dtype: torch.dtype
    tokens_per_image: int | None = None
    """How many image tokens are kept, at random places; None: all."""
    text_sites: tuple[Site, ...] = ()
    """Layers of the text encoders: recorded when a prompt is encoded, and kept with every generation of it."""
    to_the_end: bool = False
    """Whether all steps run, because the picture or its latent is kept. If not, the forward of the last recorded step
    ends behind its deepest site."""
    edits: RunEdits | None = None
    given: RunPictures = field(default_factory=RunPictures)
    """The pictures that every generation begins with, or refers to."""
    compiled: bool = False
    """Whether the network's blocks are compiled, which gives other bits."""
    attention: AttentionWord = "auto"
    """The kernel that its attention is computed by, likewise."""

    def __post_init__(self) -> None:
        # frozen, so not by plain assignment; sorted, so that a setting has one spelling
        object.__setattr__(self, "sites", tuple(sorted(set(self.sites))))
        object.__setattr__(self, "text_sites", tuple(sorted(set(self.text_sites))))
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))

    @property
    def img_tokens(self) -> int:
        """Image tokens of one picture."""
        return image_ids(1, self.height, self.width).shape[1]

    @property
    def timesteps(self) -> list[float]:
        """The sampler's schedule."""
        return schedule_of(self.spec, self.num_steps, self.img_tokens)

    @property
    def first_step(self) -> int:
        """The first step that is run: not 0 where generations begin with a picture."""
        return self.given.first_step(self.num_steps)

    def plan(self, item: WorkItem | None = None) -> CapturePlan:
        """What is kept of one generation, and in which shapes. None: of any, where only the shapes are asked for."""
        return CapturePlan(
            flux=self.spec.flux,
            sites=self.sites,
            timesteps=self.timesteps,
            txt_tokens=self.spec.text_tokens,
            img_tokens=self.img_tokens,
            guidance=self.guidance,
            metadata={},
            steps=self.steps,
            dtype=self.stored_dtype,
            context_dtype=self.network_dtype,
            img_positions=self.positions(item or WorkItem("", "", 0, 0)),
            rounds=True,
            text_sites={site: self.spec.text_shape(site) for site in self.text_sites},
            cond_tokens=self.given.cond_tokens,
        )

    @property
    def steps_and_sites(self) -> list[tuple[int | None, Site]]:
        """Everything that is kept of a generation: layers of text encoders, which have no step, then step by step."""
        return [(None, site) for site in self.text_sites] + [(step, site) for step in self.steps for site in self.sites]

    def positions(self, item: WorkItem) -> list[int] | None:
        """The image tokens that are kept of this generation, in order: drawn with a seed that is its id."""
        if self.tokens_per_image is None:
            return None
        generator = torch.Generator().manual_seed(int(item.id or "0", 16))
        return torch.randperm(self.img_tokens, generator=generator)[: self.tokens_per_image].sort().values.tolist()

    def tensors(self, images: int) -> dict[str, ShardTensor]:
        """The tensors of a shard of so many generations. Larger elements come first: so each tensor begins aligned."""
        plan = self.plan()
        tensors: dict[str, ShardTensor] = {}
        for step, site in self.steps_and_sites:
            _, tokens, d = plan.shape(site)
            tensors[site_key(site, step)] = ShardTensor(plan.dtype, (images, tokens, d))
            if plan.scales:
                tensors[scale_key(site_key(site, step))] = ShardTensor(torch.float32, (images, tokens))
        for step in plan.kept_steps:
            tensors[state_key(step)] = ShardTensor(plan.of_context, (images, *plan.img_shape[1:]))
        if plan.img_positions is not None:
            tensors[POSITIONS_KEY] = ShardTensor(torch.int32, (images, plan.kept_img_tokens))
        return dict(sorted(tensors.items(), key=lambda named: -named[1].dtype.itemsize))

    @property
    def generation_bytes(self) -> int:
        """What one generation takes in a shard, without its share of the header."""
        return sum(tensor.bytes_per_image for tensor in self.tensors(1).values())


def recorded_bytes(recipe: Recipe) -> int:
    """Bytes that one generation takes in memory until it is written."""
    plan = recipe.plan()
    values = sum(prod(plan.full_shape(site)) for site in plan.sites) * len(plan.kept_steps)
    values += sum(prod(plan.shape(site)) for site in plan.text_sites)
    return values * recipe.network_dtype.itemsize


def edited_text(recipe: Recipe, encoders: TextEncoders) -> AbstractContextManager[None]:
    """While it lasts, prompts are encoded with the recipe's edits."""
    return nullcontext() if recipe.edits is None else recipe.edits.during_text(encoders)
