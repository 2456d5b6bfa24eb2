"""Whether it fits: the disk and the memory that are free, the memory that a model's weights take, and both checks."""

import shutil
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.errors import FluxIRError, in_units
from flux_ir.models.checkpoints.inspect import Part, blank_network
from flux_ir.models.checkpoints.locate_text import EncoderSource
from flux_ir.models.memory import elements, free_memory, streamed_bytes
from flux_ir.models.placement import Placement
from flux_ir.models.suite import Suite

# Parts of a text encoder's checkpoint that are never loaded: T5's decoder, CLIP's picture tower.
_LEFT_OUT = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class DiskSpace(NamedTuple):
    """The disk that results go to. `folder` is the nearest one that exists; a URL has neither it nor `free_bytes`."""

    where: str
    folder: Path | None
    free_bytes: int | None


def disk_space_at(where: str) -> DiskSpace:
    """The disk that `--output_dir` lies on."""
    if "://" in where:
        return DiskSpace(where, None, None)
    path = Path(where).expanduser().absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    return DiskSpace(where, folder, shutil.disk_usage(folder).free)


def check_disk(needed_bytes: int, disk: DiskSpace, *, flags: str) -> None:
    """Raises FluxIRError if the disk has less. `flags` are those that make it less."""
    if disk.free_bytes is not None and needed_bytes > disk.free_bytes:
        raise FluxIRError(
            f"it does not fit: {needed_bytes} bytes ({in_units(needed_bytes)}) are needed, and {disk.free_bytes} "
            f"({in_units(disk.free_bytes)}) are free at {disk.where}",
            hint=f"keep less with {flags}, free some space, or use another --output_dir",
        )


def weights_bytes(suite: Suite) -> dict[str, int]:
    """Bytes of memory that the weights of a model take, by the names of the parts in `Placement`.

    Of a transformer that is sharded over ranks that is one rank's part, and the largest block, gathered. The whole
    autoencoder is counted under ae_decoder. Text encoders in a format older than safetensors count as
    nothing, since their sizes stand in no header.
    """
    parts = {"transformer": _elements(suite, "transformer") * suite.dtype.itemsize}
    if suite.placement.offload == "blocks" or suite.source.quantize is not None:
        parts["transformer"] = streamed_bytes(suite.spec.flux, suite.dtype)
    if suite.sharded_over > 1:
        counts = elements(suite.spec.flux)
        own = -(-sum(counts.blocks) // suite.sharded_over)
        parts["transformer"] = (counts.outside + own + max(counts.blocks)) * suite.dtype.itemsize
    if suite.source.text is not None:
        parts["t5"] = _encoder_elements(suite.source.text.t5) * suite.dtype.itemsize
        parts["clip"] = _encoder_elements(suite.source.text.clip) * suite.dtype.itemsize
    if suite.source.autoencoder is not None:
        parts["ae_decoder"] = _elements(suite, "autoencoder") * torch.float32.itemsize
    return parts


def check_memory(parts: dict[str, int], placement: Placement, *, encoders_go_first: bool = False) -> None:
    """Raises FluxIRError if the weights alone are more than a device has. `encoders_go_first`: freed after use."""
    waits = placement.offload != "none"
    for device in dict.fromkeys(["cpu", *placement.devices] if waits else placement.devices):
        on_device = {part: size for part, size in parts.items() if _is_on(part, device, placement)}
        if "transformer" in on_device and placement.blocks:  # the devices' shares differ by less than a block
            on_device["transformer"] //= len(placement.blocks)
        text = on_device.get("t5", 0) + on_device.get("clip", 0)
        needed = sum(on_device.values())
        if placement.offload == "blocks" or (waits and device != "cpu"):  # one part after the other
            needed = max(on_device.values(), default=0)
        elif encoders_go_first:
            needed = max(text, needed - text)
        free = free_memory(device)
        if free is not None and needed > free:
            raise FluxIRError(
                f"it does not fit: the weights take {in_units(needed)} on {device}, and {in_units(free)} are free",
                hint="try --offload, another --device, or a machine with more memory",
            )


def _is_on(part: str, device: str, placement: Placement) -> bool:
    if part == "transformer" and device in placement.blocks:
        return True
    return (placement.offload != "none" and device == "cpu") or getattr(placement, part) == device


def _elements(suite: Suite, part: Part) -> int:
    return sum(parameter.numel() for parameter in blank_network(suite.spec, part).parameters())


def _encoder_elements(source: EncoderSource) -> int:
    return sum(prod(entry.shape) for name, entry in source.entries.items() if not name.startswith(_LEFT_OUT))
