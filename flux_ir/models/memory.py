"""Bytes that a model takes, by arithmetic alone: of its weights, of its slots when they are streamed, of its tokens.

What `--memory_gb` and `--vram_gb` leave for blocks that stay is reckoned with these numbers, and so is `flux-ir plan`.
Only `weights_budget` asks a GPU what is free.
"""

from functools import cache
from typing import NamedTuple

import torch

from flux_ir.models.flux1.blocks import Modulation
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.placement import Placement
from flux_ir.models.streaming import SLOTS, block_names, unit_of

HOST_BASE_BYTES = 480_000_000
"""A process that has imported torch and the package, before it has any weight."""
DEVICE_BASE_BYTES = 600_000_000
"""A CUDA context and the libraries' workspaces. Not measured here: nvidia-smi shows about this much."""
LIVE_TOKENS = {"double": 15, "single": 17}
"""Values per token and channel that are alive at once at a block's largest moment, with a feed-forward of ratio 4."""


class Elements(NamedTuple):
    """Numbers in the weights of one transformer."""

    outside: int
    """Of the layers before and after the blocks."""
    blocks: tuple[int, ...]
    """Of each block, in depth order, its modulations included."""
    modulations: tuple[int, ...]
    """Of these, the modulations."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.outside + sum(self.blocks)

    @property
    def slot(self) -> int:
        """Of the largest unit that is streamed."""
        return max(all_ - mods for all_, mods in zip(self.blocks, self.modulations, strict=True))


@cache
def elements(params: FluxParams) -> Elements:
    """The numbers in each part of a transformer."""
    with torch.device("meta"):
        network = Flux(params)
    blocks, modulations = [], []
    for name in block_names(params):
        own = sum(weight.blank.numel() for weight in unit_of(network, name).weights)
        rest = sum(weight.blank.numel() for weight in unit_of(network, name, without=Modulation).weights)
        blocks.append(own)
        modulations.append(own - rest)
    total = sum(parameter.numel() for parameter in network.parameters())
    return Elements(total - sum(blocks), tuple(blocks), tuple(modulations))


def activation_bytes(params: FluxParams, tokens: int, dtype: torch.dtype, *, batch: int = 1) -> int:
    """Bytes of one forward pass over so many tokens, text and image together, at its largest moment."""
    largest = max(LIVE_TOKENS.values())
    return batch * tokens * params.hidden_size * largest * dtype.itemsize


def streamed_bytes(params: FluxParams, dtype: torch.dtype, *, slots: int = SLOTS) -> int:
    """Bytes of a streamed transformer's weights on its device, with no block that stays."""
    counts = elements(params)
    return (counts.outside + slots * counts.slot) * dtype.itemsize


def weights_budget(params: FluxParams, placement: Placement, dtype: torch.dtype, *, tokens: int) -> int:
    """Bytes that the transformer's weights may take on its device, beside a forward pass over so many tokens.

    On a CPU without a limit that is nothing: the file's pages are in memory anyway as long as there is room for them.
    """
    device = placement.transformer
    if device == "cpu":
        if placement.memory_bytes is None:
            return 0
        free = placement.memory_bytes - HOST_BASE_BYTES
    elif placement.vram_bytes is not None:
        free = placement.vram_bytes - DEVICE_BASE_BYTES
    else:
        free = torch.cuda.mem_get_info(device)[0]
    return free - activation_bytes(params, tokens, dtype)


def resident_blocks(params: FluxParams, dtype: torch.dtype, free_bytes: int, *, slots: int = SLOTS) -> list[int]:
    """The blocks that may stay on a device with so many bytes for weights, spread evenly over the depth.

    Spread, so that between any two of them others are on their way.
    """
    counts = elements(params)
    left = free_bytes - streamed_bytes(params, dtype, slots=slots)
    depth = len(counts.blocks)
    for count in range(depth - 1, 0, -1):
        chosen = [(2 * number + 1) * depth // (2 * count) for number in range(count)]
        if sum(counts.blocks[number] for number in chosen) * dtype.itemsize <= left:
            return chosen
    return []
