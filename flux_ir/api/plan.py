"""What a run would take on a machine, for every way of keeping the weights: memory, disk, seconds, and the best way.

Arithmetic alone (`models.footprint`, `models.pace`): no weight is read, nothing is fetched or written. Only the CPU's
own rates are measured, in a fraction of a second.
"""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.model_settings import PictureSettings, SettledPicture
from flux_ir.api.models import read_prompt_embeds
from flux_ir.errors import FluxIRError, in_units
from flux_ir.models.compute_dtype import DtypeWord, choose_dtype
from flux_ir.models.footprint import LARGEST_USUAL_TOKENS, Footprint, Work, autoencoder_bytes, footprint
from flux_ir.models.memory import (
    elements,
    free_memory,
    resident_blocks,
    waits_in_memory,
    weights_budget,
)
from flux_ir.models.pace import GPUS, Limiter, Pace, Rates, WeightsFrom, cpu_rates, gpu_rates, step_pace, usual_gpu
from flux_ir.models.placement import Placement
from flux_ir.models.placement import plan as place
from flux_ir.models.quantisation import Method, codes_bytes
from flux_ir.models.suite import TOKEN_PX
from flux_ir.recording.plan import CapturePlan, capture_bytes
from flux_ir.recording.writer import QUEUE_BYTES
from flux_ir.sampling.generate import check_steps, threads_per_picture
from flux_ir.sites import SiteNames, block_outputs, sites_among

GB = 10**9
QUANTISED: tuple[Method, ...] = ("nf4", "int8")
"""The ways to quantise that are compared; fp8 takes what int8 takes."""


class PlannedMachine(NamedTuple):
    """A machine, as far as it is asked about."""

    name: str
    gpus: int
    vram_bytes: int | None
    """What each GPU may be filled with; None: there is none."""
    memory_bytes: int | None
    """What the process may take of host memory; None: it is not known."""
    dtype: torch.dtype
    rates: Rates


class PlannedSetting(NamedTuple):
    """One way of keeping the weights on one machine, and what a capture takes with it."""

    name: str
    device_bytes: int
    """Peak memory of the GPU that takes most; 0 without a GPU."""
    host_bytes: int
    """Peak memory of the process on the host."""
    seconds_per_step: float
    limiter: Limiter
    """What these seconds hang on."""
    misfit: str
    """Why it does not fit; empty: it does."""
    best: bool
    """Whether it is the fastest that fits and is exact, or that fits; of equally fast ones the first."""
    exact: bool
    """Whether it gives the bits of the resident model; quantised blocks do not."""
    command: str
    """What is typed for it."""

    @property
    def fits(self) -> bool:
        """Whether host and devices have room for it."""
        return not self.misfit


class MachinePlan(NamedTuple):
    """What a capture takes on one machine, setting by setting."""

    model: str
    machine: PlannedMachine
    picture: SettledPicture
    capture_bytes: int
    """Of the capture file, on the disk."""
    settings: list[PlannedSetting]

    @property
    def best(self) -> PlannedSetting | None:
        """The fastest that fits; None: nothing does."""
        return next((setting for setting in self.settings if setting.best), None)


class Preset(NamedTuple):
    """A usual machine."""

    gpus: int
    vram_gb: int
    memory_gb: int


PRESETS = (
    *(Preset(1, vram, memory) for vram, memory in ((8, 32), (12, 32), (16, 32), (24, 64), (48, 128), (80, 256))),
    Preset(2, 24, 128),
    Preset(8, 80, 1024),
    *(Preset(0, 0, memory) for memory in (8, 16, 32)),
)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PictureSettings):
    """What a plan is asked for; see `plan`."""

    prompt_embeds: str | Path | None = None
    sites: SiteNames | None = None
    steps: Iterable[int] | None = None
    gpus: int | None = None
    gpu: str | None = None
    presets: bool = False


def plan(
    model: str = "flux-schnell",
    *,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    prompt_embeds: str | Path | None = None,
    sites: SiteNames | None = None,
    steps: Iterable[int] | None = None,
    dtype: DtypeWord = "auto",
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    presets: bool = False,
) -> list[MachinePlan]:
    """What `capture` with these arguments would take, for every setting of --offload and --multi_gpu.

    One plan for this machine; or for one with `gpus` GPUs of `vram_gb` GB each, of the kind `gpu`, and `memory_gb` GB
    of host memory, each of which is this machine's where it is None; or, with `presets`, one for each of `PRESETS`. The
    seconds leave out text, decoding and loading. A reference picture is not counted.

    Raises FluxIRError for what does not go together, and for what `capture` would refuse.
    """
    settings = PlanSettings(
        model=model,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        prompt_embeds=prompt_embeds,
        sites=sites,
        steps=steps,
        dtype=dtype,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        gpus=gpus,
        gpu=gpu,
        presets=presets,
    )
    check_words(PlanSettings, settings.model_choices())
    check_least(vars(settings), gpus=0, vram_gb=0.1, memory_gb=0.1)
    machines = list(_preset_machines(settings)) if presets else [_machine(settings)]
    return [_plan_of(settings, machine) for machine in machines]


def _preset_machines(settings: PlanSettings) -> Iterator[PlannedMachine]:
    given = [name for name in ("vram_gb", "memory_gb", "gpus", "gpu") if getattr(settings, name) is not None]
    if given:
        raise FluxIRError(f"--presets are machines of their own: got --{given[0]} as well", hint="leave one out")
    for gpus, vram, memory in PRESETS:
        yield _machine(replace(settings, gpus=gpus, vram_gb=vram or None, memory_gb=memory))


def _machine(settings: PlanSettings) -> PlannedMachine:
    here = torch.cuda.device_count()
    asked = settings.vram_gb is not None or settings.gpu is not None
    gpus = settings.gpus if settings.gpus is not None else max(1, here) if asked else here
    memory = free_memory("cpu") if settings.memory_gb is None else int(settings.memory_gb * GB)
    memory_told = "unknown host memory" if memory is None else f"{in_units(memory)} host memory"
    if gpus == 0:
        if asked:
            raise FluxIRError(
                "--vram_gb and --gpu are of a GPU: got --gpus 0 as well", hint="leave them out, or pass --gpus 1"
            )
        dtype = choose_dtype(settings.dtype, ["cpu"]).dtype
        rates = cpu_rates(settings.spec.flux.hidden_size, _tokens(settings), dtype)
        return PlannedMachine(f"no GPU, {memory_told}", 0, None, memory, dtype, rates)
    own = gpus <= here and settings.gpu is None
    if own:
        kind = torch.cuda.get_device_name(0)
    elif settings.gpu is None and settings.vram_gb is None:
        raise FluxIRError(
            f"--gpus must be at most {here}, what this machine has, unless others are described: got {gpus}",
            hint="say which ones with --vram_gb or --gpu",
        )
    else:
        kind = settings.gpu or usual_gpu(settings.vram_gb or 0)
    # The kinds in the table all have bfloat16; a GPU of this machine is asked.
    dtype = choose_dtype(settings.dtype, ["cuda:0"]).dtype if own else torch.bfloat16
    if not own and settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    if own and not any(known.lower() in kind.lower() for known in GPUS):
        kind = usual_gpu(torch.cuda.get_device_properties(0).total_memory / GB)
    rates = gpu_rates(kind, dtype)
    if settings.vram_gb is not None:
        vram = int(settings.vram_gb * GB)
    else:
        vram = (
            int(free_memory("cuda:0") or 0)
            if own
            else next(gpu.vram_gb * GB for name, gpu in GPUS.items() if name.lower() in kind.lower())
        )
    name = f"{gpus} x {in_units(vram)} ({kind}), {memory_told}"
    return PlannedMachine(name, gpus, vram, memory, dtype, rates)


def _tokens(settings: PlanSettings) -> int:
    return settings.spec.text_tokens + settings.settle_picture().grid.tokens


def _plan_of(settings: PlanSettings, machine: PlannedMachine) -> MachinePlan:
    spec, picture = settings.spec, settings.settle_picture()
    embeds = settings.prompt_embeds
    txt_tokens = spec.text_tokens if embeds is None else read_prompt_embeds(embeds, spec).text.txt.shape[1]
    chosen = sites_among(settings.sites, spec.sites) if settings.sites is not None else None
    sites = block_outputs(spec.flux.depth, spec.flux.depth_single_blocks) if chosen is None else chosen
    file = CapturePlan(
        flux=spec.flux,
        sites=[site for site in sites if not site.per_prompt],
        timesteps=picture.timesteps,
        txt_tokens=txt_tokens,
        img_tokens=picture.grid.tokens,
        guidance=picture.guidance,
        metadata={},
        steps=check_steps(settings.steps, picture.num_steps),
        dtype=machine.dtype,
        text_sites={site: spec.text_shape(site) for site in sites if site.per_prompt},
    )
    size = capture_bytes(file)
    pixels = picture.grid.tokens * TOKEN_PX**2
    threads = torch.get_num_threads()
    work = Work(
        pixels=pixels,
        tokens=txt_tokens + picture.grid.tokens,
        encodes=embeds is None,
        waiting_bytes=min(QUEUE_BYTES, size),
        decoded_together=1 if machine.gpus else threads // threads_per_picture(pixels, threads),
    )
    planned = [_setting(settings, machine, work, txt_tokens, way) for way in _ways(settings, machine)]
    # Quantised blocks give other numbers: they are the best only where nothing else fits.
    fitting = [setting for setting in planned if setting.fits and setting.exact]
    fitting = fitting or [setting for setting in planned if setting.fits]
    best = min(fitting, key=lambda setting: round(setting.seconds_per_step, 6), default=None)
    marked = [setting._replace(best=setting is best) for setting in planned]
    return MachinePlan(spec.name, machine, picture, size, marked)


class _Way(NamedTuple):
    """A placement, and the blocks that stay where others are streamed, or how all are quantised."""

    name: str
    placement: Placement
    resident: list[int]
    flags: str
    quantize: Method | None = None


def _ways(settings: PlanSettings, machine: PlannedMachine) -> Iterator[_Way]:
    """The settings to compare, the simplest first."""
    flux, dtype = settings.spec.flux, machine.dtype
    vram = "" if settings.presets or settings.vram_gb is None else f" --vram_gb {settings.vram_gb:g}"
    yield _Way("resident", place(machine.gpus), [], "")
    if machine.gpus > 1:
        yield _Way("parts over GPUs", place(machine.gpus, multi_gpu=True), [], " --multi_gpu True")
    if machine.gpus:
        yield _Way("offload parts", place(machine.gpus, offload="parts"), [], " --offload parts")
    streamed = replace(
        place(machine.gpus, offload="blocks"), vram_bytes=machine.vram_bytes, memory_bytes=machine.memory_bytes
    )
    depth = len(elements(flux).blocks)
    beside = autoencoder_bytes(settings.spec, LARGEST_USUAL_TOKENS * TOKEN_PX**2, dtype)
    free = 0
    if machine.vram_bytes is not None or machine.memory_bytes is not None:
        free = weights_budget(flux, streamed, dtype, tokens=LARGEST_USUAL_TOKENS, beside=beside)
    stay = resident_blocks(flux, dtype, free)
    if not machine.gpus or not stay:
        yield _Way(f"offload blocks, 0 of {depth} stay", streamed, [], f" --offload blocks{vram}")
    if stay:
        memory = "" if machine.gpus or machine.memory_bytes is None else f" --memory_gb {machine.memory_bytes / GB:.4g}"
        name = f"offload blocks, {len(stay)} of {depth} stay"
        yield _Way(name, streamed, stay, f" --offload blocks{vram}{memory}")
    for method in QUANTISED:
        yield _Way(method, place(machine.gpus), [], f" --quantize {method}", method)
        if machine.gpus:
            flags = f" --quantize {method} --offload blocks{vram}"
            yield _Way(f"{method}, offload blocks", streamed, [], flags, method)


def _setting(settings: PlanSettings, machine: PlannedMachine, work: Work, txt_tokens: int, way: _Way) -> PlannedSetting:
    spec, dtype = settings.spec, machine.dtype
    in_memory, streamed = False, 0
    weights_from: WeightsFrom = "device"
    counts = elements(spec.flux)
    codes = 0 if way.quantize is None else codes_bytes(spec.flux, way.quantize)
    if way.quantize is not None:
        if way.placement.offload == "blocks":
            streamed, weights_from = codes, "host"
    elif way.placement.offload == "blocks":
        in_memory = waits_in_memory(spec.flux, way.placement, dtype, len(way.resident))
        own = [all_ - mods for all_, mods in zip(counts.blocks, counts.modulations, strict=True)]
        streamed = (sum(own) - sum(own[number] for number in way.resident)) * dtype.itemsize
        weights_from = "host" if in_memory else "disk"
    takes = footprint(
        spec, way.placement, dtype, work, resident=way.resident, waits_in_memory=in_memory, quantize=way.quantize
    )
    if weights_from == "disk" and not machine.gpus and machine.memory_bytes is not None:
        # What is left of memory is the page cache: a file that fits into it is read from the drive once.
        cached = machine.memory_bytes - takes.host >= counts.total * torch.bfloat16.itemsize
        weights_from = "host" if cached else "disk"
    pace: Pace = step_pace(
        spec.flux,
        machine.rates,
        dtype,
        txt_tokens=txt_tokens,
        img_tokens=work.tokens - txt_tokens,
        streamed=streamed,
        weights_from=weights_from,
        on_cpu=not machine.gpus,
        codes=codes,
    )
    return PlannedSetting(
        way.name,
        takes.fullest,
        takes.host,
        pace.seconds,
        pace.limiter,
        _misfit(takes, machine),
        best=False,
        exact=way.quantize is None,
        command=_command(settings, way.flags),
    )


def _misfit(takes: Footprint, machine: PlannedMachine) -> str:
    reasons = []
    if machine.vram_bytes is not None and takes.fullest > machine.vram_bytes:
        reasons.append(f"{in_units(takes.fullest)} on a GPU of {in_units(machine.vram_bytes)}")
    if machine.memory_bytes is not None and takes.host > machine.memory_bytes:
        reasons.append(f"{in_units(takes.host)} of host memory, where {in_units(machine.memory_bytes)} are")
    return " and ".join(reasons)


def _command(settings: PlanSettings, flags: str) -> str:
    """What is typed to capture with a setting."""
    words = ["flux-ir", "capture", "--model", settings.spec.name]
    for name in ("width", "height", "num_steps", "guidance", "prompt_embeds"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name}", str(value)]
    for name in ("sites", "steps"):
        if (several := getattr(settings, name)) is not None:
            listed = [several] if isinstance(several, str) else several
            words += [f"--{name}", ",".join(map(str, listed))]
    if settings.dtype != "auto":
        words += ["--dtype", settings.dtype]
    return shlex.join(words) + flags
