"""`flux-ir plan`: what a capture would take on this machine, on another one, or on usual ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import KEEP, MACHINE, PICTURE, PictureOptions, StepOptions

if TYPE_CHECKING:
    from flux_ir.api.plan import MachinePlan

_THIS = "this machine's, as far as it is free"


@dataclass(frozen=True, kw_only=True)
class PlanningOptions(PictureOptions, StepOptions):
    """Say what a capture takes with each way of keeping the weights: memory, disk, seconds a step, and which fits best.

    It is arithmetic: no weight is read and nothing is downloaded. Of this machine the CPU's speed is measured, in less
    than a second; the speed of GPUs is their published peak times an efficiency.
    """

    prompt_embeds: Path | None = option(
        None,
        help="embeddings that are captured with in place of a prompt: no text encoder is counted",
        group=PICTURE,
        default_text="the prompt is encoded",
    )
    sites: tuple[str, ...] | None = option(
        None, help="which sites would be recorded, as shell patterns", group=KEEP, default_text="every block's output"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", help="what the model would compute in; auto: bfloat16 where the device has it", group=MACHINE
    )
    vram_gb: float | None = option(
        None, help="memory of each GPU", unit="GB", minimum=0.1, group=MACHINE, default_text=_THIS
    )
    memory_gb: float | None = option(
        None, help="host memory for the process", unit="GB", minimum=0.1, group=MACHINE, default_text=_THIS
    )
    gpus: int | None = option(None, help="number of GPUs", minimum=0, group=MACHINE, default_text="this machine's")
    gpu: str | None = option(
        None,
        help="kind of GPU, such as RTX 4090",
        group=MACHINE,
        default_text="this machine's, or a usual one with so much memory",
    )
    presets: bool = option(False, help="answer for usual machines, from no GPU to eight", group=MACHINE)


def run(options: PlanningOptions) -> None:
    """Print the plan. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.plan import PlanSettings, plan

    plans = plan(**options.given(PlanSettings))
    print_plans(plans, presets=options.presets)


def print_plans(plans: "Sequence[MachinePlan]", *, presets: bool) -> None:
    """The table of one machine, or one row for the best setting of each."""
    from flux_ir.errors import in_units

    first = plans[0]
    (width, height), steps = first.picture.grid, first.picture.num_steps
    dtypes = " or ".join(dict.fromkeys(str(one.machine.dtype).removeprefix("torch.") for one in plans))
    print(
        f"{first.model}, {width} x {height} px, {steps} steps, {dtypes}; capture file {in_units(first.capture_bytes)}"
    )
    if presets:
        _print_presets(plans)
    else:
        _print_settings(first)
    for source in dict.fromkeys(one.machine.rates.source for one in plans):
        print(f"rates: {source}")


def _print_settings(plan: "MachinePlan") -> None:
    from flux_ir.commands.report import aligned
    from flux_ir.errors import in_units

    print(f"machine: {plan.machine.name}")
    rows: list[tuple[str, ...]] = [("setting", "GPU", "host", "s/step", "of many", "limited by", "fits")]
    for one in plan.settings:
        fits = "best" if one.best else "yes" if one.fits else "no"
        gpu = in_units(one.device_bytes) if plan.machine.gpus else "-"
        seconds = f"{one.seconds_per_step:.3g}", f"{one.seconds_of_many:.3g}"
        rows.append((one.name, gpu, in_units(one.host_bytes), *seconds, one.limiter, fits))
    if plan.machine.gpus < 2:  # one device makes many pictures as fast as one
        rows = [row[:4] + row[5:] for row in rows]
    print(*aligned(rows), sep="\n")
    if plan.machine.gpus > 1:
        print("of many: s/step and picture, where there are pictures enough for every GPU that is used")
    for one in plan.settings:
        if one.misfit:
            print(f"{one.name} does not fit: {one.misfit}")
    if plan.best is None:
        print("nothing fits: try --prompt_embeds (no text encoder), a smaller picture, or more memory")
    else:
        print(f"to type:\n  {plan.best.command}")


def _print_presets(plans: "Sequence[MachinePlan]") -> None:
    from flux_ir.commands.report import aligned
    from flux_ir.errors import in_units

    rows: list[tuple[str, ...]] = [("machine", "best setting", "GPU", "host", "s/step", "of many", "limited by")]
    for plan in plans:
        best = plan.best
        if best is None:
            rows.append((plan.machine.name, "nothing fits", *["-"] * 5))
            continue
        gpu = in_units(best.device_bytes) if plan.machine.gpus else "-"
        seconds = f"{best.seconds_per_step:.3g}", f"{best.seconds_of_many:.3g}"
        rows.append((plan.machine.name, best.name, gpu, in_units(best.host_bytes), *seconds, best.limiter))
    print(*aligned(rows), sep="\n")
    print("of many: s/step and picture, where there are pictures enough for every GPU that is used")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(PlanningOptions, run, argv, prog=prog)
