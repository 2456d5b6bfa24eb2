"""`flux-ir compare-quantized`: what quantising does to each block, and to a picture."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    MACHINE,
    PICTURE,
    CheckpointOptions,
    ComputeOptions,
    LoRAOptions,
    OffloadOptions,
    PictureOptions,
    PromptOptions,
)
from flux_ir.errors import in_units

if TYPE_CHECKING:
    from flux_ir.api.compare_quantized import QuantizedComparison


@dataclass(frozen=True, kw_only=True)
class CompareQuantizedOptions(
    PictureOptions, PromptOptions, ComputeOptions, OffloadOptions, CheckpointOptions, LoRAOptions
):
    """Say how much a model changes when its blocks are quantised, on the picture of one prompt and seed.

    A table in depth order: the relative error of each block's weights, of its output given the exact block's input, and
    of its output in the quantised run; then the PSNR of the picture. Writes comparison.json and both pictures side by
    side.
    """

    quantize: Literal["nf4", "int8", "fp8"] = option("nf4", help="how the blocks are quantised", group=MACHINE)
    seed: int = option(0, help="seed of the noise that both runs begin with", group=PICTURE)
    output_dir: Path = option(Path("quantized"), help="where the folder MODEL-METHOD is written", group=MACHINE)


def run(options: CompareQuantizedOptions) -> None:
    """Compare. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.compare_quantized import compare_quantized
    from flux_ir.commands.report import Report

    with Report() as report:
        found = compare_quantized(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for line in summary(found):
        report.results.print(line, markup=False)


def summary(found: "QuantizedComparison") -> list[str]:
    """What is printed: a row for each block, then what became of the whole."""
    from flux_ir.commands.report import aligned

    rows = [("block", "weights", "output", "output in the run")]
    rows += [(row.block, f"{row.weights:.3%}", f"{row.output:.3%}", f"{row.output_in_run:.3%}") for row in found.blocks]
    likeness = "equal" if found.picture_psnr_db is None else f"PSNR {found.picture_psnr_db:.1f} dB"
    return [
        f"relative errors of {found.model} in {found.quantize}, blocks in depth order",
        *aligned(rows),
        f"finished latent {found.latent_error:.3%}, picture {likeness}",
        f"transformer {in_units(found.bytes_exact)}, quantised {in_units(found.bytes_quantized)}",
        f"numbers   {found.numbers}",
        f"pictures  {found.pictures}",
    ]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(CompareQuantizedOptions, run, argv, prog=prog)
