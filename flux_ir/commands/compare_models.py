"""`flux-ir compare-models`: how far apart two models are in every block, at every step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    COMPARED,
    LARGEST_SEED,
    MACHINE,
    MEASURED,
    PICTURE,
    CheckpointOptions,
    ComputeOptions,
    LoRAOptions,
    OffloadOptions,
    PictureOptions,
    PromptOptions,
    QuantizeOptions,
)

if TYPE_CHECKING:
    from flux_ir.api.model_comparison import ComparedModels

_AS_FIRST = "as for the first model"


@dataclass(frozen=True, kw_only=True)
class CompareModelsOptions(
    PictureOptions, PromptOptions, ComputeOptions, OffloadOptions, CheckpointOptions, LoRAOptions, QuantizeOptions
):
    """Say how far apart two models are in every block at every step, on the same prompts and noise.

    Two checkpoints, a LoRA and its base, two states of a training, quantised and not, two guidance strengths: --other_*
    say in what the second differs. Differences accumulate, so it is fed in three ways: free, each model follows its own
    trajectory; forced, the second is evaluated at the first one's states; block, each of its blocks is given what the
    first one's was given. Beside them stands the first model from other noise. Or two --captures are compared.

    The same command goes on where it stopped. flux-ir explore --output_dir FOLDER/runs shows both models' lens pictures
    side by side.
    """

    prompts: Path | None = option(
        None, help="a file of prompts, as for flux-ir collect", group=PICTURE, default_text="--prompt alone"
    )
    max_prompts: int | None = option(
        None, help="take only the first so many prompts", group=PICTURE, default_text="all of them"
    )
    repeats: int = option(1, help="noises that each prompt is drawn from", group=PICTURE)
    seed: int = option(0, help="seed of the first noise; the next ones follow", group=PICTURE, maximum=LARGEST_SEED)
    other_model: str | None = option(None, help="the second model", group=COMPARED, default_text="the first one")
    other_checkpoint: Path | None = option(
        None, help="the second transformer's weights", group=COMPARED, default_text=_AS_FIRST
    )
    other_lora: tuple[Path, ...] | None = option(
        None, help="LoRAs to merge into the second transformer", group=COMPARED, default_text=_AS_FIRST
    )
    other_lora_strength: tuple[float, ...] | None = option(
        None, help="how strongly, likewise", group=COMPARED, default_text=_AS_FIRST
    )
    other_quantize: Literal["nf4", "int8", "fp8"] | None = option(
        None, help="how the second one's blocks are quantised", group=COMPARED, default_text=_AS_FIRST
    )
    other_guidance: float | None = option(
        None, help="guidance strength that the second is told", group=COMPARED, default_text=_AS_FIRST
    )
    captures: Path | None = option(
        None,
        help="what was recorded of the first model, in place of running it: a run, a folder of runs, or a collection",
        group=COMPARED,
        default_text="models are run",
    )
    other_captures: Path | None = option(
        None, help="what was recorded of the second, likewise", group=COMPARED, default_text="models are run"
    )
    modes: tuple[Literal["free", "forced", "block"], ...] = option(
        ("free", "forced", "block"), help="how the second model is fed", group=MEASURED
    )
    cka_tokens: int = option(1024, help="tokens of each picture that CKA is measured on; 0: none", group=MEASURED)
    lens_pictures: bool = option(
        True, help="decode what each block of both would have drawn, for the first generation", group=MEASURED
    )
    name: str | None = option(
        None, help="the comparison's folder below --output_dir", group=MACHINE, default_text="follows from the settings"
    )
    output_dir: Path = option(Path("model_comparisons"), help="where the folders of comparisons are", group=MACHINE)


def run(options: CompareModelsOptions) -> None:
    """Compare. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.compare_models import compare_models
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        found = compare_models(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for line in summary(found):
        report.results.print(line, markup=False)
    report.results.print()
    written = {"numbers": found.numbers, **{f"map, {name}": path for name, path in found.maps.items()}}
    if found.runs is not None:
        written["runs to explore"] = found.runs
    report.table("compared models", written, peak_memory())


def summary(found: "ComparedModels") -> list[str]:
    """What is printed: image tokens of each block, means over steps, then the pictures and the control."""
    from flux_ir.api.model_comparison import RUN_TITLES, side
    from flux_ir.commands.report import aligned
    from flux_ir.errors import counted

    result = found.result
    of_run = {run: streams["img"] for run, streams in result["likeness"].items()}
    names = list(dict.fromkeys(row for rows in of_run.values() for row in rows["distance"]))
    titles = [RUN_TITLES[run] for run in of_run]
    table = [("distance, then CKA", *titles, *titles)]
    for name in names:
        numbers = [_number(rows[measure].get(name)) for measure in ("distance", "cka") for rows in of_run.values()]
        table.append((name, *numbers))
    lines = [
        f"first: {side(result['first'])}",
        f"other: {side(result['other'])}",
        f"{counted(len(result['generations']), 'generation')}, image tokens, means over steps "
        f"{', '.join(map(str, result['steps']))}",
        *aligned(table),
    ]
    for run, pictures in result["pictures"].items():
        psnr = "" if pictures["psnr_db"] is None else f", PSNR {pictures['psnr_db']:.1f} dB"
        latent = "" if pictures["latent_distance"] is None else f", latent distance {pictures['latent_distance']:.4g}"
        equal = f"{pictures['equal']} of {counted(pictures['pictures'], 'picture')} equal"
        lines.append(f"finished pictures, {RUN_TITLES[run]}: {equal}{psnr}{latent}")
    if result["control"] is not None:
        same = "every bit is the same" if result["control"]["equal_bits"] else "NOT the same bits on this device"
        lines.append(f"control, the first model beside itself: {same}")
    return lines


def _number(steps: Sequence[Any] | None) -> str:
    """The mean over steps, or nothing."""
    values = [one["mean"] for one in steps or () if isinstance(one["mean"], int | float)]
    return f"{sum(values) / len(values):.4f}" if values else ""


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CompareModelsOptions, run, argv, prog=prog)
