"""What a run would take on a machine, for every way of keeping the weights: memory, disk, seconds, and the best way.

Arithmetic alone (`models.footprint`, `models.pace`): no weight is read, nothing is fetched or written. Only the CPU's
own rates are measured, in a fraction of a second. `capture --plan` and `collect --plan` ask `estimate` as `plan` does,
about the one way that is settled.
"""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.capacity import Way, blocks_that_stay, capture_work, estimate
from flux_ir.api.model_settings import PictureSettings, SettledPicture
from flux_ir.api.models import read_prompt_embeds
from flux_ir.errors import FluxIRError, in_units
from flux_ir.models.compute_dtype import DtypeWord, choose_dtype
from flux_ir.models.footprint import LARGEST_USUAL_TOKENS, Footprint, Work, base_here
from flux_ir.models.memory import HOST_BASE_BYTES, elements, free_memory, resident_memory
from flux_ir.models.pace import GPUS, Limiter, Rates, cpu_rates, gpu_rates, known_gpu, usual_gpu
from flux_ir.models.placement import plan as place
from flux_ir.models.quantisation import Method
from flux_ir.models.split import with_parts_beside
from flux_ir.models.suite import TOKEN_PX
from flux_ir.recording.plan import CapturePlan, capture_bytes
from flux_ir.sampling.generate import check_steps
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
    """What processes may take of host memory; None: it is not known."""
    dtype: torch.dtype
    rates: Rates
    base_bytes: int = HOST_BASE_BYTES
    """What a process takes of host memory without any weight."""


class PlannedSetting(NamedTuple):
    """One way of keeping the weights on one machine, and what a capture takes with it."""

    name: str
    device_bytes: int
    """Peak memory of the GPU that takes most; 0 without a GPU."""
    host_bytes: int
    """Peak memory of the process on the host."""
    seconds_per_step: float
    """Of one picture."""
    seconds_of_many: float
    """Per step and picture, where there are pictures enough for all GPUs that are used to have work."""
    limiter: Limiter
    """What these seconds hang on."""
    misfit: str
    """Why it does not fit; empty: it does."""
    best: bool
    """Whether it makes many pictures fastest of those that fit and are exact, or that fit; of equal ones the first."""
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
    """What `capture` with these arguments would take, for every setting of --offload, --quantize and --multi_gpu.

    With several GPUs also what `collect` would take by a process on each, alone or with the weights sharded (--fsdp).

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
    base = HOST_BASE_BYTES
    if settings.memory_gb is None:
        # What this process has is taken already, and is part of what a capture here takes.
        base, free = base_here(), free_memory("cpu")
        memory = None if free is None else free + (resident_memory() or 0)
    else:
        memory = int(settings.memory_gb * GB)
    memory_told = "unknown host memory" if memory is None else f"{in_units(memory)} host memory"
    if gpus == 0:
        if asked:
            raise FluxIRError(
                "--vram_gb and --gpu are of a GPU: got --gpus 0 as well", hint="leave them out, or pass --gpus 1"
            )
        dtype = choose_dtype(settings.dtype, ["cpu"]).dtype
        rates = cpu_rates(settings.spec.flux.hidden_size, _tokens(settings), dtype)
        return PlannedMachine(f"no GPU, {memory_told}", 0, None, memory, dtype, rates, base)
    own = gpus <= here and settings.gpu is None
    if own:
        kind = known_gpu("cuda:0")
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
    return PlannedMachine(name, gpus, vram, memory, dtype, rates, base)


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
    work = capture_work(
        picture.grid.tokens * TOKEN_PX**2,
        txt_tokens + picture.grid.tokens,
        on_gpu=machine.gpus > 0,
        encodes=embeds is None,
        capture_bytes=size,
        lens=True,
    )
    planned = [_setting(settings, machine, work, txt_tokens, way) for way in _ways(settings, machine)]
    # Quantised blocks give other numbers: they are the best only where nothing else fits.
    fitting = [setting for setting in planned if setting.fits and setting.exact]
    fitting = fitting or [setting for setting in planned if setting.fits]
    best = min(fitting, key=lambda setting: round(setting.seconds_of_many, 6), default=None)
    marked = [setting._replace(best=setting is best) for setting in planned]
    return MachinePlan(spec.name, machine, picture, size, marked)


class _Named(NamedTuple):
    """A way that is compared with others, and the command for it."""

    name: str
    way: Way
    flags: str
    launcher: str = ""
    """What starts the processes of a job; empty: one process captures."""


def _ways(settings: PlanSettings, machine: PlannedMachine) -> Iterator[_Named]:
    """The settings to compare, the simplest first."""
    flux, gpus = settings.spec.flux, machine.gpus
    vram = "" if settings.presets or settings.vram_gb is None else f" --vram_gb {settings.vram_gb:g}"
    yield _Named("resident", Way(place(gpus)), "")
    if gpus > 1:
        yield _Named("parts over GPUs", Way(place(gpus, multi_gpu=True)), " --multi_gpu True")
        split = with_parts_beside(place(gpus, multi_gpu="blocks"), flux)
        yield _Named("blocks over GPUs", Way(split), " --multi_gpu blocks")
    if gpus > 1 and settings.prompt_embeds is None:  # collections encode their prompts
        launcher = f"torchrun --nproc_per_node {gpus} -m"
        yield _Named("a process per GPU", Way(place(gpus), processes=gpus), "", launcher)
        sharded = Way(place(gpus), sharded_over=gpus)
        yield _Named("sharded over processes", sharded, " --fsdp --batch_size 1", launcher)
    if gpus:
        yield _Named("offload parts", Way(place(gpus, offload="parts")), " --offload parts")
    streamed = replace(place(gpus, offload="blocks"), vram_bytes=machine.vram_bytes, memory_bytes=machine.memory_bytes)
    depth = len(elements(flux).blocks)
    stay = []
    if machine.vram_bytes is not None or machine.memory_bytes is not None:
        stay = blocks_that_stay(settings.spec, streamed, machine.dtype, tokens=LARGEST_USUAL_TOKENS)
    if not gpus or not stay:
        yield _Named(f"offload blocks, 0 of {depth} stay", Way(streamed), f" --offload blocks{vram}")
    if stay:
        memory = "" if gpus or machine.memory_bytes is None else f" --memory_gb {machine.memory_bytes / GB:.4g}"
        name = f"offload blocks, {len(stay)} of {depth} stay"
        yield _Named(name, Way(streamed, stay), f" --offload blocks{vram}{memory}")
    for method in QUANTISED:
        yield _Named(method, Way(place(gpus), quantize=method), f" --quantize {method}")
        if gpus:
            flags = f" --quantize {method} --offload blocks{vram}"
            yield _Named(f"{method}, offload blocks", Way(streamed, quantize=method), flags)


def _setting(
    settings: PlanSettings, machine: PlannedMachine, work: Work, txt_tokens: int, named: _Named
) -> PlannedSetting:
    if named.launcher:  # a collection
        work = work._replace(encoders_go=True, written_together=0)
    takes, pace = estimate(
        settings.spec,
        named.way,
        machine.dtype,
        machine.rates,
        work,
        txt_tokens=txt_tokens,
        memory_bytes=machine.memory_bytes,
        base_bytes=machine.base_bytes,
    )
    return PlannedSetting(
        named.name,
        takes.fullest,
        takes.host,
        pace.seconds,
        pace.seconds_of_many,
        pace.limiter,
        _misfit(takes, machine),
        best=False,
        exact=named.way.quantize is None,
        command=_command(settings, named),
    )


def _misfit(takes: Footprint, machine: PlannedMachine) -> str:
    reasons = []
    if machine.vram_bytes is not None and takes.fullest > machine.vram_bytes:
        reasons.append(f"{in_units(takes.fullest)} on a GPU of {in_units(machine.vram_bytes)}")
    if machine.memory_bytes is not None and takes.host > machine.memory_bytes:
        reasons.append(f"{in_units(takes.host)} of host memory, where {in_units(machine.memory_bytes)} are")
    return " and ".join(reasons)


EVERY_BLOCK = "double.*.img,double.*.txt,single.?,single.??"


def _command(settings: PlanSettings, named: _Named) -> str:
    """What is typed to capture with a setting, or to collect where it takes several processes."""
    words = ["flux-ir", "capture"]
    if named.launcher:
        words = [*named.launcher.split(), "flux_ir", "collect"]
    words += ["--model", settings.spec.name]
    for name in ("width", "height", "num_steps", "guidance", "prompt_embeds"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name}", str(value)]
    for name in ("sites", "steps"):
        if (several := getattr(settings, name)) is not None:
            listed = [several] if isinstance(several, str) else several
            words += [f"--{name}", ",".join(map(str, listed))]
        elif named.launcher and name == "sites":
            words += ["--sites", EVERY_BLOCK]
    if settings.dtype != "auto":
        words += ["--dtype", settings.dtype]
    if named.launcher:
        words += ["--prompts", "prompts.txt", "--output_dir", "captures/NAME"]
    return shlex.join(words) + named.flags
