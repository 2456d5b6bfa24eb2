"""How generations are sampled and recorded, a batch at a time: for a collection's shards, or to be trained on at once.

Next: `collection`, the folder of shards, and `collector`, which fills it; `live`, which hands batches on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.shards import POSITIONS_KEY, ShardTensor, scale_key, site_key, state_key
from flux_ir.collecting.embeddings import EmbeddedPrompt
from flux_ir.collecting.prompts import WorkItem
from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import ModelSpec
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.recorder import MemorySink, Recorder, StepContext, until_recorded
from flux_ir.sampling.denoise import StateNotFiniteError
from flux_ir.sampling.generate import noise_for, prepare, sample
from flux_ir.sampling.latents import image_ids
from flux_ir.sampling.schedule import get_schedule
from flux_ir.shapes import PackedLatent
from flux_ir.sites import Site


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
    """Whether all steps run, for the sake of the picture. If not, the forward of the last recorded step ends behind its
    deepest site."""

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
        return get_schedule(self.num_steps, self.img_tokens, shift=self.spec.shifts_schedule)

    def plan(self, item: WorkItem | None = None) -> CapturePlan:
        """What is kept of one generation, and in which shapes; without an item, of one of the same shapes."""
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
        )

    @property
    def places(self) -> list[tuple[int | None, Site]]:
        """Everything that is kept of a generation: layers of text encoders, which have no step, then step by step."""
        return [(None, site) for site in self.text_sites] + [(step, site) for step in self.steps for site in self.sites]

    def positions(self, item: WorkItem) -> list[int] | None:
        """The image tokens that are kept of this generation, in order: drawn with a seed that is its id."""
        if self.tokens_per_image is None:
            return None
        generator = torch.Generator().manual_seed(int(item.id or "0", 16))
        return torch.randperm(self.img_tokens, generator=generator)[: self.tokens_per_image].sort().values.tolist()

    def tensors(self, images: int) -> dict[str, ShardTensor]:
        """The tensors of a shard of so many generations, those of larger elements first: every one begins aligned."""
        plan = self.plan()
        tensors: dict[str, ShardTensor] = {}
        for step, site in self.places:
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


def batches_of(items: Sequence[WorkItem], batch_size: int) -> list[Sequence[WorkItem]]:
    """A shard's generations in batches of at most so many, as even as can be: 9 in batches of 8 are 5 and 4."""
    count = -(-len(items) // batch_size)
    size = -(-len(items) // max(count, 1))
    return [items[first : first + size] for first in range(0, len(items), size)] if items else []


class RecordedGeneration(NamedTuple):
    """One generation of a batch, on the CPU."""

    item: WorkItem
    used_txt: int
    values: Mapping[tuple[int | None, Site], Tensor]
    """[1, tokens, d] per step and site, as the network made them; layers of text encoders have the step None."""
    contexts: Mapping[int, StepContext]
    latent: PackedLatent | None
    """The finished picture's; None where the steps did not run to the end."""


class RecordedBatch(NamedTuple):
    """What a batch of generations put out, on the CPU: the first axis of every tensor counts the items."""

    items: Sequence[WorkItem]
    used_txt: Sequence[int]
    values: Mapping[tuple[int | None, Site], Tensor]
    contexts: Mapping[int, StepContext]
    latent: PackedLatent | None

    def generations(self) -> list[RecordedGeneration]:
        """One by one: views, not copies."""
        return [self._generation(number) for number in range(len(self.items))]

    def _generation(self, i: int) -> RecordedGeneration:
        return RecordedGeneration(
            self.items[i],
            self.used_txt[i],
            {of: value[i : i + 1] for of, value in self.values.items()},
            {step: StepContext(img[i : i + 1], y[i : i + 1], txt) for step, (img, y, txt) in self.contexts.items()},
            None if self.latent is None else self.latent[i : i + 1],
        )


@torch.no_grad()
def record_batch(
    model: Flux, recipe: Recipe, items: Sequence[WorkItem], embedded: Sequence[EmbeddedPrompt]
) -> RecordedBatch:
    """Sample a batch of generations as far as the recipe needs, and bring what it records to the CPU.

    Raises FluxIRError for a state of the sampler that is not finite, naming step, block and prompt.
    """
    device = model.img_in.weight.device
    noise = noise_for([item.seed for item in items], recipe.height, recipe.width, device, recipe.network_dtype)
    text = TextEmbedding(*(torch.cat(parts) for parts in zip(*(one.text for one in embedded), strict=True)))
    inputs = prepare(noise, text, recipe.height, recipe.width)
    sink, latent = MemorySink(), None
    try:
        with Recorder(model, recipe.sites, sink, steps=recipe.steps, stop_early=not recipe.to_the_end):
            for step in until_recorded(sample(model, inputs, recipe.timesteps, recipe.guidance)):
                latent = step.after
    except StateNotFiniteError as error:
        item = items[error.row]
        whose = f"first for {item.prompt[:40]!r} with the seed {item.seed}"
        raise FluxIRError(f"{error.message}, {whose}", hint=error.hint) from error
    on_host: dict[tuple[int | None, Site], Tensor] = {of: _to_host(value) for of, value in sink.values.items()}
    for site in recipe.text_sites:
        on_host[None, site] = torch.cat([one.layers[site] for one in embedded])
    contexts = {step: StepContext(_to_host(img), _to_host(y), txt) for step, (img, y, txt) in sink.contexts.items()}
    finished = _to_host(latent) if recipe.to_the_end and latent is not None else None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return RecordedBatch(items, [one.used_txt for one in embedded], on_host, contexts, finished)


def check_finite(recipe: Recipe, recorded: RecordedBatch) -> None:
    """Raises FluxIRError that names the first step and site whose values hold NaN or infinity."""
    tensors = {str(site): recorded.values[None, site] for site in recipe.text_sites}
    for step in recipe.steps:
        tensors[f"at step {step}, the state before it"] = recorded.contexts[step].img
        tensors |= {f"at step {step}, {site}": recorded.values[step, site] for site in recipe.sites}
    for name, value in tensors.items():
        # The sum is finite where all values are, but for sums beyond float32: only then is each looked at.
        if isfinite(value.sum(dtype=torch.float32).item()) or bool(value.isfinite().all()):
            continue
        item = next(item for item, own in zip(recorded.items, value, strict=True) if not own.isfinite().all())
        raise FluxIRError(
            f"values that are kept must be finite: {name} holds NaN or infinity, "
            f"first for {item.prompt[:40]!r} with the seed {item.seed}",
            hint="look for weights that are not finite, or compute in float32: --dtype float32",
        )


def _to_host(value: Tensor) -> Tensor:
    """The value on the CPU; from a GPU on its way there, into memory that it can be copied to at full speed."""
    if value.device.type != "cuda":
        return value
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned.copy_(value, non_blocking=True)


def recorded_bytes(recipe: Recipe) -> int:
    """Bytes that one generation takes in memory until it is written."""
    plan = recipe.plan()
    values = sum(prod(plan.full_shape(site)) for site in plan.sites) * len(plan.kept_steps)
    values += sum(prod(plan.shape(site)) for site in plan.text_sites)
    return values * recipe.network_dtype.itemsize
