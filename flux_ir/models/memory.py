"""Bytes that a network takes, by arithmetic alone: its weights, its slots when they are streamed, what it works on.

What `--memory_gb` and `--vram_gb` leave for blocks that stay is reckoned with these numbers. Next: `footprint`, which
adds them up for whole runs. Only `weights_budget` and `free_memory` ask a device what is free.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.errors import FluxIRError, in_units
from flux_ir.models.architecture import AnyParams, block_names, transformer_of
from flux_ir.models.autoencoder import AutoEncoderParams
from flux_ir.models.flux1.blocks import Modulation
from flux_ir.models.placement import OffloadWord, Placement
from flux_ir.models.quantisation import Method, Waits, codes_bytes
from flux_ir.models.streaming import SLOTS, unit_of

HOST_BASE_BYTES = 850_000_000
"""A process that has imported torch and the package and run its kernels, without any weight. Measured on Linux with
PyTorch's build for CUDA: 680 MB after the imports, half of it pages of its libraries, and 170 MB of the kernels of
transformer and autoencoder."""
DEVICE_BASE_BYTES = 600_000_000
"""A CUDA context and the libraries' workspaces. Not measured here: nvidia-smi shows about this much."""
LIVE_VALUES = {2: 20, 4: 15}
"""Values per token and channel that are alive at once at a block's largest moment, by the bytes of one: rotated queries
and keys pass through float32. Measured on a CPU, where attention keeps copies of keys and values."""


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
def elements(params: AnyParams) -> Elements:
    """The numbers in each part of a transformer."""
    with torch.device("meta"):
        network = transformer_of(params)
    blocks, modulations = [], []
    for name in block_names(params):
        own = sum(weight.blank.numel() for weight in unit_of(network, name).weights)
        rest = sum(weight.blank.numel() for weight in unit_of(network, name, without=Modulation).weights)
        blocks.append(own)
        modulations.append(own - rest)
    total = sum(parameter.numel() for parameter in network.parameters())
    return Elements(total - sum(blocks), tuple(blocks), tuple(modulations))


def activation_bytes(params: AnyParams, tokens: int, dtype: torch.dtype, *, batch: int = 1) -> int:
    """Bytes of one forward pass over so many tokens, text and image together, at its largest moment."""
    return batch * tokens * params.hidden_size * LIVE_VALUES[dtype.itemsize] * dtype.itemsize


def decode_bytes(params: AutoEncoderParams, pixels: int, dtype: torch.dtype) -> int:
    """Bytes of decoding one picture, at its largest moment: three maps as wide as what enters a level of the decoder.

    These are a residual block's input, its norm, and the activation of that.
    """
    mults = [*params.ch_mult, params.ch_mult[-1]]
    widest = max(params.ch * mults[level + 1] / 4**level for level in range(len(params.ch_mult)))
    return int(3 * widest * pixels * dtype.itemsize)


def encode_bytes(params: AutoEncoderParams, pixels: int) -> int:
    """Bytes of encoding one picture, in float32, at its largest moment.

    Five maps of the first level: input and result of a convolution, both once more in the CPU kernel's own layout, and
    the block's input.
    """
    return 5 * params.ch * params.ch_mult[0] * pixels * torch.float32.itemsize


def streamed_bytes(params: AnyParams, dtype: torch.dtype, *, slots: int = SLOTS) -> int:
    """Bytes of a streamed transformer's weights on its device, with no block that stays."""
    counts = elements(params)
    return (counts.outside + slots * counts.slot) * dtype.itemsize


def quantised_bytes(params: AnyParams, dtype: torch.dtype, method: Method) -> int:
    """Bytes of a quantised transformer with all its codes on its device, what is not quantised, and the slots."""
    return (
        streamed_bytes(params, dtype) + codes_bytes(params, method) + sum(elements(params).modulations) * dtype.itemsize
    )


class Limits(NamedTuple):
    """What may be taken of a GPU's memory and of the host's, in bytes; None: no limit was set."""

    vram_bytes: int | None = None
    memory_bytes: int | None = None


def best_offload(
    placement: Placement,
    params: AnyParams,
    dtype: torch.dtype,
    limits: Limits,
    asked: OffloadWord,
    *,
    quantize: Method | None = None,
) -> Placement:
    """The placement with the offloading that `asked` stands for on this machine, and with the limits.

    True is the fastest that fits: all resident on a CPU, parts in turns on a GPU, else the blocks streamed. Limits
    alone ask for the same. `quantize`: how the blocks are kept, if not in the compute dtype.

    Raises FluxIRError for limits below what a streamed transformer takes, and where blocks are split over GPUs.
    """
    if limits == Limits() and asked is not True:
        return placement
    if placement.blocks:
        raise FluxIRError(
            "--vram_gb and --memory_gb are for a transformer on one device: got --multi_gpu blocks as well",
            hint="leave one of them out",
        )
    device, on_cpu = placement.transformer, placement.transformer == "cpu"
    limit = limits.memory_bytes if on_cpu else limits.vram_bytes
    base = HOST_BASE_BYTES if on_cpu else DEVICE_BASE_BYTES
    free = free_memory(device) if limit is None else limit
    least = base + streamed_bytes(params, dtype)
    if limit is not None and limit < least:
        flag = "--memory_gb" if on_cpu else "--vram_gb"
        raise FluxIRError(
            f"{flag} must be at least {least / 1e9:.1f} for this model in {str(dtype).removeprefix('torch.')}: "
            f"got {limit / 1e9:g}",
            hint="its largest block is on the device twice, one computing and one arriving",
        )
    offload, reason = placement.offload, placement.reason.partition("; --offload")[0]
    if asked is True or asked is False:
        total = (
            elements(params).total * dtype.itemsize if quantize is None else quantised_bytes(params, dtype, quantize)
        )
        whole = base + total
        fits = free is None or whole <= free
        offload = "blocks" if not fits else "none" if on_cpu else "parts"
        reason += {
            "none": "; all of it fits, so nothing is offloaded",
            "parts": "; parts are offloaded",
            "blocks": f"; the transformer does not fit into {in_units(free or 0)}, so its blocks are streamed",
        }[offload]
    return replace(
        placement, offload=offload, reason=reason, vram_bytes=limits.vram_bytes, memory_bytes=limits.memory_bytes
    )


def free_memory(device: str) -> int | None:
    """Bytes that a device has left for this process; None where that is not known."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _number_in("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    limits = [None if available is None else available * 1024]
    # What a container may use at all (cgroup v2; files it has read count as used there), and what `ulimit -v` leaves.
    limits.append(_number_in("/sys/fs/cgroup/memory.max"))
    space = _number_in("/proc/self/limits", r"^Max address space\s+(\d+)")
    taken = _number_in("/proc/self/status", r"^VmSize:\s+(\d+) kB")
    limits.append(None if space is None or taken is None else max(0, space - taken * 1024))
    return min((limit for limit in limits if limit is not None), default=None)


def resident_memory() -> int | None:
    """Bytes of host memory that this process has now, mapped pages of files counted; None where that is not known."""
    kilobytes = _number_in("/proc/self/status", r"^VmRSS:\s+(\d+) kB")
    return None if kilobytes is None else kilobytes * 1024


def _number_in(path: str, pattern: str = r"^(\d+)") -> int | None:
    """The first number that matches in a small file; None if it is not there."""
    try:
        found = re.search(pattern, Path(path).read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def weights_budget(params: AnyParams, placement: Placement, dtype: torch.dtype, *, tokens: int, beside: int = 0) -> int:
    """Bytes that the transformer's weights may take on its device, beside a forward pass over so many tokens.

    `beside`: bytes of what else runs there while they stay, at another time: the autoencoder and what it works on.
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
    return free - max(activation_bytes(params, tokens, dtype), beside)


def waits_in_memory(params: AnyParams, placement: Placement, dtype: torch.dtype, resident: int) -> bool:
    """Whether the blocks that a GPU has no room for wait in host memory: if that has room for them, else in the file.

    For a CPU they always wait in the file: what it reads again is in the page cache while there is room.
    """
    if placement.transformer == "cpu":
        return False
    depth = params.depth + params.depth_single_blocks
    needed = HOST_BASE_BYTES + elements(params).total * dtype.itemsize * (depth - resident) // depth
    free = placement.memory_bytes or free_memory("cpu")
    return free is None or needed <= free


def where_codes_wait(
    params: AnyParams, placement: Placement, dtype: torch.dtype, method: Method, *, tokens: int
) -> Waits:
    """Where the codes of a quantised transformer wait: on its GPU, if nothing is offloaded and there is room; else in
    host memory, if that has room; else in their file. For a CPU always in the file, whose pages are in the page cache.
    """
    if placement.transformer == "cpu":
        return "file"
    needed = quantised_bytes(params, dtype, method)
    if placement.offload == "none" and needed <= weights_budget(params, placement, dtype, tokens=tokens):
        return "device"
    free = placement.memory_bytes or free_memory("cpu")
    return "pinned" if free is None or HOST_BASE_BYTES + needed <= free else "file"


def resident_blocks(params: AnyParams, dtype: torch.dtype, free_bytes: int, *, slots: int = SLOTS) -> list[int]:
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
