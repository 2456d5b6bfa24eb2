"""Seconds of one Euler step by arithmetic, and what limits them: products, weights on their way, or memory's bandwidth.

Rates of GPUs are published peaks times an efficiency and were not measured here; those of this CPU are measured, in a
fraction of a second, by `cpu_rates`. `streaming` computes while weights arrive, so the slowest of the three counts.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from flux_ir.errors import FluxIRError, nearest
from flux_ir.models.architecture import AnyParams
from flux_ir.models.memory import elements
from flux_ir.models.split import runs_of

EFFICIENCY = 0.4
"""How much of a GPU's published peak a forward pass is taken to reach: 400 TFLOP/s of an H100's 989. An assumption."""
DISK_BYTES = 1.5e9
"""Bytes per second of reading weights from a drive: an assumption. The drive of the full-size measurement gave 1.3."""
PCIE4, PCIE5 = 25e9, 50e9
"""Bytes per second over 16 lanes, of copies from pinned memory."""

WIDENED_PER_SECOND = 0.45e9
"""Weights that one core of a CPU makes of NF4 codes: 37.7 million in 0.084 s, measured on a Xeon with AMX."""
Limiter = Literal["compute", "bus", "disk", "memory copy", "memory bandwidth", "widening codes"]
WeightsFrom = Literal["device", "host", "disk"]


class Rates(NamedTuple):
    """How fast a machine is."""

    flops: float
    """Products and sums per second, together."""
    memory: float
    """Bytes per second that the device reads of its own memory."""
    bus: float
    """Bytes per second that weights come with from host memory."""
    disk: float
    source: str
    """Where these numbers are from."""


class Gpu(NamedTuple):
    """Published figures of one kind of GPU."""

    vram_gb: int
    tflops: float
    """In bfloat16, dense, summed in float32."""
    memory_gb_s: float
    bus: float


GPUS: dict[str, Gpu] = {
    "RTX 4060": Gpu(8, 30.2, 272, PCIE4 / 2),
    "RTX 3060": Gpu(12, 25.5, 360, PCIE4),
    "RTX 4080": Gpu(16, 97.5, 717, PCIE4),
    "RTX 4070 Ti": Gpu(12, 80.2, 504, PCIE4),
    "RTX 4090": Gpu(24, 165, 1008, PCIE4),
    "RTX 3090": Gpu(24, 71, 936, PCIE4),
    "L40S": Gpu(48, 362, 864, PCIE4),
    "A6000": Gpu(48, 155, 768, PCIE4),
    "H100": Gpu(80, 989, 3350, PCIE5),
    "A100": Gpu(80, 312, 2039, PCIE4),
    "H200": Gpu(141, 989, 4800, PCIE5),
}
"""By a part of the name that the driver tells. Of several with the same memory the first stands for them."""


def gpu_rates(name: str, dtype: torch.dtype) -> Rates:
    """What one kind of GPU is taken to reach. float32 has a quarter of the rate.

    Raises FluxIRError for a GPU that is not in the table.
    """
    found = next((known for known in sorted(GPUS, key=len, reverse=True) if known.lower() in name.lower()), None)
    if found is None:
        near = {known.lower(): known for known in GPUS}.get(nearest(name, map(str.lower, GPUS)) or "")
        raise FluxIRError(
            f"--gpu must be one of {', '.join(GPUS)}: got {name!r}",
            hint=f"did you mean {near}?" if near else "name one of about its speed",
        )
    gpu = GPUS[found]
    flops = gpu.tflops * 1e12 * EFFICIENCY / (1 if dtype == torch.bfloat16 else 4)
    told = f"{found}: published peak x {EFFICIENCY}, not measured"
    return Rates(flops, gpu.memory_gb_s * 0.8e9, gpu.bus, DISK_BYTES, told)


def known_gpu(device: str) -> str:
    """The kind of a GPU of this machine; one that is not in the table is taken for a usual one with its memory."""
    kind = torch.cuda.get_device_name(device)
    if any(known.lower() in kind.lower() for known in GPUS):
        return kind
    return usual_gpu(torch.cuda.get_device_properties(device).total_memory / 1e9)


def usual_gpu(vram_gb: float) -> str:
    """The GPU that stands for all with so much memory: the first of those with the nearest size."""
    return min(GPUS, key=lambda name: abs(GPUS[name].vram_gb - vram_gb))


@cache
def cpu_rates(width: int, tokens: int, dtype: torch.dtype) -> Rates:
    """This CPU's rates, measured now with one product of the network's width and one copy."""
    x, weight = torch.ones(min(tokens, 512), width, dtype=dtype), torch.ones(2 * width, width, dtype=dtype)
    seconds = _best_seconds(lambda: F.linear(x, weight))
    bytes_copied = torch.ones(2**25, dtype=torch.uint8)
    target = torch.empty_like(bytes_copied)
    copied = bytes_copied.numel() / _best_seconds(lambda: target.copy_(bytes_copied))
    flops = 2 * x.shape[0] * weight.numel() / seconds
    threads = torch.get_num_threads()
    told = f"this CPU, measured now: {flops / 1e9:.0f} GFLOP/s with {threads} threads"
    return Rates(flops, 2 * copied, copied, DISK_BYTES, told)


def _best_seconds(work: Callable[[], object], *, at_least: int = 3, budget: float = 0.1) -> float:
    """The fewest seconds of several tries: what other programs take is no part of the rate. The first one warms up."""
    begun, seconds = time.perf_counter(), list[float]()
    while len(seconds) <= at_least or (len(seconds) < 200 and time.perf_counter() - begun < budget):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:]), 1e-9)


def step_flops(params: AnyParams, txt_tokens: int, img_tokens: int) -> int:
    """Operations of one forward pass for one picture: two per weight and token, four n^2 d per attention."""
    return sum(block_flops(params, txt_tokens + img_tokens))


def block_flops(params: AnyParams, tokens: int) -> list[int]:
    """The same for each block, in depth order. A double block has weights of its own for each stream.

    What is computed once per step is left out.
    """
    counts = elements(params)
    own = [all_ - mods for all_, mods in zip(counts.blocks, counts.modulations, strict=True)]
    attention = 4 * tokens**2 * params.hidden_size
    met = [weights // 2 if number < params.depth else weights for number, weights in enumerate(own)]
    return [2 * weights * tokens + attention for weights in met]


class Pace(NamedTuple):
    """Seconds of one step, and which rate they hang on."""

    seconds: float
    """Of one picture."""
    limiter: Limiter
    seconds_of_many: float
    """Per step and picture where there are pictures enough for all devices to have work."""


def step_pace(
    params: AnyParams,
    rates: Rates,
    dtype: torch.dtype,
    *,
    txt_tokens: int,
    img_tokens: int,
    streamed: int = 0,
    weights_from: WeightsFrom = "device",
    on_cpu: bool = False,
    codes: int = 0,
    split_over: int = 1,
    processes: int = 1,
    sharded_over: int = 1,
) -> Pace:
    """Seconds of a step in which `streamed` bytes of weights come from somewhere and all are read where they are.

    `codes`: bytes of quantised blocks, which are widened at every step: read, and written in the compute dtype.
    `split_over`: devices that have a run of the blocks each; one works on a picture at a time. `processes`: that work
    side by side, each with a device and pictures of its own; `sharded_over`: that also share the blocks' weights, which
    all gather over the bus at every step.
    """
    counts, tokens = elements(params), txt_tokens + img_tokens
    weights = (sum(counts.blocks) - sum(counts.modulations)) * dtype.itemsize
    seconds: dict[Limiter, float] = {
        "compute": step_flops(params, txt_tokens, img_tokens) / rates.flops,
        "memory bandwidth": weights / rates.memory,
    }
    if codes and on_cpu:
        seconds["widening codes"] = (sum(counts.blocks) - sum(counts.modulations)) / WIDENED_PER_SECOND
    elif codes:
        seconds["memory bandwidth"] += (codes + weights) / rates.memory
    if weights_from == "host":
        seconds["memory copy" if on_cpu else "bus"] = streamed / rates.bus
    elif weights_from == "disk":
        seconds["disk"] = streamed / rates.disk
    if sharded_over > 1:  # what a process lacks of every block
        lacking = sum(counts.blocks) * (sharded_over - 1) // sharded_over
        seconds["bus"] = lacking * dtype.itemsize / rates.bus
    limiter = max(seconds, key=lambda name: seconds[name])
    of_many = seconds[limiter] / max(processes, sharded_over)
    if split_over > 1:  # the run that takes longest is never idle
        flops = block_flops(params, tokens)
        runs = [run.blocks for run in runs_of(params, [str(number) for number in range(split_over)])]
        of_many *= max(sum(flops[number] for number in run) for run in runs) / sum(flops)
    return Pace(seconds[limiter], limiter, of_many)
