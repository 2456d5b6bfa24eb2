"""A batch of generations: what is recorded of it, how large it is, and a network for each thread that computes one.

Next: `collector`, which keeps what is recorded; `live`, which hands it on.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import isfinite
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.shards import SHARD_IMAGES
from flux_ir.collecting.embeddings import EmbeddedPrompt
from flux_ir.collecting.prompts import WorkItem
from flux_ir.collecting.recipe import Recipe, recorded_bytes
from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.sharded import ShardedFlux
from flux_ir.models.split import SplitFlux
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.recorder import MemorySink, Recorder, StepContext, until_recorded
from flux_ir.sampling.denoise import StateNotFiniteError
from flux_ir.sampling.generate import noise_for, prepare, sample
from flux_ir.sampling.pictures import EncodedPictures
from flux_ir.shapes import PackedLatent
from flux_ir.sites import Site
from flux_ir.threads import in_order

CPU_BATCH = 8
"""On a CPU: with flux-tiny 1.8 times the speed of single generations, and no slower than 16 (which take twice the
memory). With wider networks it makes less of a difference."""
MOST_BYTES = 2**30
"""The size of the recordings that a batch may hold in memory until they are written."""


# ---- What is recorded of a batch


class RecordedGeneration(NamedTuple):
    """One generation of a batch, on the CPU."""

    item: WorkItem
    used_txt: int
    values: Mapping[tuple[int | None, Site], Tensor]
    """[1, tokens, d] per step and site, as the network made them; layers of text encoders have the step None."""
    contexts: Mapping[int, StepContext]
    latent: PackedLatent | None
    """The latent of the finished picture; None where the steps did not run to the end."""


class RecordedBatch(NamedTuple):
    """What was recorded of a batch, on the CPU: the first axis of every tensor counts the items."""

    items: Sequence[WorkItem]
    used_txt: Sequence[int]
    values: Mapping[tuple[int | None, Site], Tensor]
    contexts: Mapping[int, StepContext]
    latent: PackedLatent | None

    def generations(self) -> list[RecordedGeneration]:
        """The same, one generation after the other: views, not copies."""
        return [self._generation(number) for number in range(len(self.items))]

    def _generation(self, i: int) -> RecordedGeneration:
        return RecordedGeneration(
            self.items[i],
            self.used_txt[i],
            {of: value[i : i + 1] for of, value in self.values.items()},
            {step: at._replace(img=at.img[i : i + 1], y=at.y[i : i + 1]) for step, at in self.contexts.items()},
            None if self.latent is None else self.latent[i : i + 1],
        )


NO_PICTURES = EncodedPictures()


@torch.no_grad()
def record_batch(
    model: Transformer,
    recipe: Recipe,
    items: Sequence[WorkItem],
    embedded: Sequence[EmbeddedPrompt],
    pictures: EncodedPictures = NO_PICTURES,
) -> RecordedBatch:
    """Sample a batch of generations as far as the recipe needs, and bring what it records to the CPU.

    `pictures` are those that the recipe is given, encoded.

    Raises FluxIRError for a state of the sampler that is not finite, naming step, block and prompt.
    """
    device = model.img_in.weight.device
    noise = noise_for([item.seed for item in items], recipe.height, recipe.width, device, recipe.network_dtype)
    text = TextEmbedding(*(torch.cat(parts) for parts in zip(*(one.text for one in embedded), strict=True)))
    if recipe.edits is not None:
        text = text._replace(y=recipe.edits.edit_pooled(text.y))
    inputs = pictures.put_into(prepare(noise, text, recipe.height, recipe.width))
    first = recipe.first_step
    sink, latent = MemorySink(), None
    edited = nullcontext() if recipe.edits is None else recipe.edits.during(model)
    try:
        early = not recipe.to_the_end
        with edited, Recorder(model, recipe.sites, sink, steps=recipe.steps, first_step=first, stop_early=early):
            for step in until_recorded(sample(model, inputs, recipe.timesteps, recipe.guidance, first_step=first)):
                latent = step.after
    except StateNotFiniteError as error:
        item = items[error.row]
        whose = f"first for {item.prompt[:40]!r} with the seed {item.seed}"
        raise FluxIRError(f"{error.message}, {whose}", hint=error.hint) from error
    on_host: dict[tuple[int | None, Site], Tensor] = {of: _to_host(value) for of, value in sink.values.items()}
    for site in recipe.text_sites:
        on_host[None, site] = torch.cat([one.layers[site] for one in embedded])
    contexts = {step: at._replace(img=_to_host(at.img), y=_to_host(at.y)) for step, at in sink.contexts.items()}
    finished = _to_host(latent) if recipe.to_the_end and latent is not None else None
    _wait_for({value.device for value in sink.values.values()} | {device})
    return RecordedBatch(items, [one.used_txt for one in embedded], on_host, contexts, finished)


def check_finite(recipe: Recipe, recorded: RecordedBatch) -> None:
    """Raises FluxIRError that names the first step and site whose values hold NaN or infinity."""
    tensors = {str(site): recorded.values[None, site] for site in recipe.text_sites}
    for step in recipe.steps:
        tensors[f"at step {step}, the state before it"] = recorded.contexts[step].img
        tensors |= {f"at step {step}, {site}": recorded.values[step, site] for site in recipe.sites}
    for name, value in tensors.items():
        # A finite sum has only finite terms, and is one pass over memory. Finite terms may overflow in it: then each is
        # looked at.
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


def _wait_for(devices: Iterable[torch.device]) -> None:
    """Returns once the copies to pinned memory, which were only begun, have come from these devices.

    It waits for what was queued until now, and not for the batches of other threads that come behind it.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    arrived = [torch.cuda.Event() for _ in gpus]  # type: ignore[no-untyped-call]
    for event, device in zip(arrived, gpus, strict=True):
        event.record(torch.cuda.current_stream(device))
    for event in arrived:
        event.synchronize()


# ---- How many generations go through the network together


def batches_of(items: Sequence[WorkItem], batch_size: int) -> list[Sequence[WorkItem]]:
    """A shard's generations in batches of at most so many, as even as can be: 9 in batches of 8 are 5 and 4.

    Not 8 and 1: at 512 px a shard of FLUX has 9 generations, and each shard would end with a batch of one.
    """
    count = -(-len(items) // batch_size)
    size = -(-len(items) // max(count, 1))
    return [items[first : first + size] for first in range(0, len(items), size)] if items else []


def cpu_batch(recipe: Recipe) -> int:
    """The batch size on a CPU."""
    return min(CPU_BATCH, _most_in_memory(recipe))


def gpu_batch(model: Transformer, recipe: Recipe, pictures: EncodedPictures = NO_PICTURES) -> int:
    """The largest power of two that fits on the model's GPUs, found by trying with as many as will be under way."""
    count = batches_under_way(model)
    networks = replicas(model, count)

    def attempt(_: int, batch: int) -> None:
        with borrowed(networks) as network:
            _try(network, recipe, batch, pictures)

    def attempt_all(batch: int) -> None:
        for _ in in_order(partial(attempt, batch=batch), range(count), count, torch_threads=1):
            pass

    return largest_that_fits(attempt_all, _most_in_memory(recipe))


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


def _most_in_memory(recipe: Recipe) -> int:
    """The generations whose recordings are `MOST_BYTES` or less; at least one."""
    return max(1, MOST_BYTES // recorded_bytes(recipe))


def run_along(model: Transformer, recipe: Recipe, pictures: EncodedPictures = NO_PICTURES) -> None:
    """Calls the blocks that a batch calls, in its order, for ranks that have one; of a single picture, unedited."""
    _try(model, replace(recipe, edits=None), 1, pictures)


def _try(model: Transformer, recipe: Recipe, batch: int, pictures: EncodedPictures) -> None:
    """Records a batch of this size from texts of zeros, and keeps nothing."""
    flux = recipe.spec.flux
    txt, y = torch.zeros(1, recipe.spec.text_tokens, flux.context_in_dim), torch.zeros(1, flux.vec_in_dim)
    layers = {site: torch.zeros(1, *recipe.spec.text_shape(site)) for site in recipe.text_sites}
    text = EmbeddedPrompt(TextEmbedding(txt, y), 0, layers)
    items = [WorkItem("", "", number, number) for number in range(batch)]
    record_batch(model, recipe, items, [text] * batch, pictures)


# ---- A network for each thread that works beside others


def batches_under_way(network: Transformer) -> int:
    """How many batches are computed at once: one per thread of a CPU, one on a GPU, and as many as there are devices
    where blocks are split over several: of a batch only one device has work at a time. Of a network that is sharded
    over ranks one: all of them call its blocks in the same order.
    """
    if isinstance(network, ShardedFlux):
        return 1
    if isinstance(network, SplitFlux):
        return len(network.runs)
    return torch.get_num_threads() if network.img_in.weight.device.type == "cpu" else 1


def replicas(network: Transformer, count: int) -> "SimpleQueue[Transformer]":
    """The network once per thread: all share its weights, and each has modules of its own to hook.

    Hooks belong to modules: two threads that record at one module would record each other's batches. A network whose
    weights are streamed is there once: threads wait for it, and while one computes the next weights are read.
    """
    networks: SimpleQueue[Transformer] = SimpleQueue()
    networks.put(network)
    if isinstance(network, StreamedFlux):
        return networks
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    for _ in range(count - 1):
        networks.put(copy.deepcopy(network, dict(shared)))
    return networks


@contextmanager
def borrowed(networks: "SimpleQueue[Transformer]") -> Iterator[Transformer]:
    """One of the replicas, for as long as the `with` lasts."""
    network = networks.get()
    try:
        yield network
    finally:
        networks.put(network)
