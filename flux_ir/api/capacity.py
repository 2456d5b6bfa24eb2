"""Whether it fits: the disk and the memory that are free, what work takes, and the checks.

`estimate` is the one source of what is said of memory and time before anything is loaded: `plan` asks it about every
way of keeping the weights, `capture --plan` and `collect --plan` about the one that is settled.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.collecting.batches import cpu_batch
from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.recipe import recorded_bytes
from flux_ir.errors import FluxIRError, in_units
from flux_ir.lens.decode import WRITER_THREADS
from flux_ir.models.footprint import Footprint, Work, autoencoder_bytes, footprint
from flux_ir.models.memory import (
    elements,
    free_memory,
    resident_blocks,
    resident_memory,
    waits_in_memory,
    weights_budget,
)
from flux_ir.models.pace import Pace, Rates, WeightsFrom, cpu_rates, gpu_rates, known_gpu, step_pace
from flux_ir.models.placement import Placement
from flux_ir.models.quantisation import Method, codes_bytes
from flux_ir.models.registry import ModelSpec
from flux_ir.models.suite import TOKEN_PX
from flux_ir.recording.writer import QUEUE_BYTES
from flux_ir.sampling.generate import threads_per_picture


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


# ---- What work takes


def capture_work(pixels: int, tokens: int, *, on_gpu: bool, encodes: bool, capture_bytes: int, lens: bool) -> Work:
    """What a capture computes; `lens`: what blocks would have drawn is decoded as well."""
    threads = torch.get_num_threads()
    return Work(
        pixels=pixels,
        tokens=tokens,
        encodes=encodes,
        waiting_bytes=min(QUEUE_BYTES, capture_bytes),
        decoded_together=1 if on_gpu else threads // threads_per_picture(pixels, threads),
        written_together=WRITER_THREADS if lens else 0,
    )


class Way(NamedTuple):
    """How weights are kept: a placement, and the blocks that stay where others are streamed, or how all are codes."""

    placement: Placement
    resident: Sequence[int] = ()
    quantize: Method | None = None
    processes: int = 1
    """Processes of a job, each with a GPU and pictures of its own."""
    sharded_over: int = 1
    """Processes that share the weights of the blocks as well (FSDP2)."""


class Estimate(NamedTuple):
    """Peak memory and seconds of one way."""

    takes: Footprint
    pace: Pace


def estimate(
    spec: ModelSpec,
    way: Way,
    dtype: torch.dtype,
    rates: Rates,
    work: Work,
    *,
    txt_tokens: int,
    memory_bytes: int | None,
    base_bytes: int,
) -> Estimate:
    """What `work` takes. `memory_bytes` of the host decide where blocks wait; see `PlannedMachine`."""
    placement, counts, on_cpu = way.placement, elements(spec.flux), way.placement.transformer == "cpu"
    in_memory, streamed = False, 0
    weights_from: WeightsFrom = "device"
    codes = 0 if way.quantize is None else codes_bytes(spec.flux, way.quantize)
    if way.quantize is not None:
        if placement.offload == "blocks":
            streamed, weights_from = codes, "host"
    elif placement.offload == "blocks":
        in_memory = waits_in_memory(spec.flux, placement, dtype, len(way.resident))
        own = [all_ - mods for all_, mods in zip(counts.blocks, counts.modulations, strict=True)]
        streamed = (sum(own) - sum(own[number] for number in way.resident)) * dtype.itemsize
        weights_from = "host" if in_memory else "disk"
    takes = footprint(
        spec,
        placement,
        dtype,
        work,
        resident=way.resident,
        waits_in_memory=in_memory,
        quantize=way.quantize,
        processes=way.processes,
        sharded_over=way.sharded_over,
        base_bytes=base_bytes,
    )
    if weights_from == "disk" and on_cpu and memory_bytes is not None:
        # What is left of memory is the page cache: a file that fits into it is read from the drive once.
        cached = memory_bytes - takes.host >= counts.total * torch.bfloat16.itemsize
        weights_from = "host" if cached else "disk"
    pace = step_pace(
        spec.flux,
        rates,
        dtype,
        txt_tokens=txt_tokens,
        img_tokens=work.tokens - txt_tokens,
        streamed=streamed,
        weights_from=weights_from,
        on_cpu=on_cpu,
        codes=codes,
        split_over=len(placement.blocks) or 1,
        processes=way.processes,
        sharded_over=way.sharded_over,
    )
    return Estimate(takes, pace)


def blocks_that_stay(spec: ModelSpec, placement: Placement, dtype: torch.dtype, *, tokens: int) -> list[int]:
    """The blocks that stay on the device of a streamed transformer, as `models.suite` settles it."""
    beside = autoencoder_bytes(spec, tokens * TOKEN_PX**2, dtype)
    free = weights_budget(spec.flux, placement, dtype, tokens=tokens, beside=beside)
    return resident_blocks(spec.flux, dtype, free)


def collection_work(settings: CollectSettings, *, on_gpu: bool) -> Work:
    """What a process that collects computes at once. A GPU is counted with one picture, unless a batch size is set."""
    recipe, threads = settings.recipe, torch.get_num_threads()
    # A CPU's threads have a batch each.
    batch = (settings.batch_size or (1 if on_gpu else cpu_batch(recipe))) * (1 if on_gpu else threads)
    return Work(
        pixels=recipe.width * recipe.height,
        tokens=recipe.spec.text_tokens + recipe.img_tokens + recipe.given.cond_tokens,
        waiting_bytes=batch * recorded_bytes(recipe),
        decoded_together=0 if not settings.save_images else 1 if on_gpu else threads,
        batch=batch,
        encoders_go=True,
    )


def rates_here(spec: ModelSpec, device: str, dtype: torch.dtype, *, tokens: int) -> Rates:
    """The rates of a device of this machine: a CPU's are measured now, a GPU's are those of its kind."""
    if device == "cpu":
        return cpu_rates(spec.flux.hidden_size, tokens, dtype)
    return gpu_rates(known_gpu(device), dtype)


def check_fits(takes: Footprint, what: str) -> None:
    """Raises FluxIRError if this machine has not room for it: less host memory, or less on one of its devices.

    What this process has taken already is part of it.
    """
    free = free_memory("cpu")
    here = None if free is None else free + (resident_memory() or 0)
    for device, needed, room in [
        ("the host", takes.host, here),
        *((device, needed, free_memory(device)) for device, needed in takes.devices.items()),
    ]:
        if room is not None and needed > room:
            raise FluxIRError(
                f"it does not fit: the {what} takes about {in_units(needed)} on {device}, where {in_units(room)} are",
                hint="flux-ir plan compares settings; try --offload, another --device, or a machine with more memory",
            )
