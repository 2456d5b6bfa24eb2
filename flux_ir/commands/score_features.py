"""`flux-ir score-features`: what every feature of an autoencoder does on every token, image, step and place."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import ScoringOptions

if TYPE_CHECKING:
    from flux_ir.features.folder import FeatureFolder


@dataclass(frozen=True, kw_only=True)
class ScoreFeaturesOptions(ScoringOptions):
    """Score every feature of an autoencoder on stored activations: images, token maps, and a table of numbers.

    The first stage of what features mean; the others read the folder it leaves. Stopped at any moment, the same command
    goes on and ends with the same bytes. torchrun's processes share the work.
    """


def run(options: ScoreFeaturesOptions) -> None:
    """Score as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.score_features import score_features
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        folder = score_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    if os.environ.get("RANK", "0") != "0":
        return  # one process speaks for all
    for line in summary(folder):
        report.results.print(line, markup=False)
    report.table("scored", {"table": folder.path / "table.safetensors", "folder": folder.path}, peak_memory())


def summary(folder: "FeatureFolder") -> list[str]:
    """Lines per stream: how many features there are of each density, and what the autoencoder leaves unexplained.

    That is told of the whole autoencoder, and of each step where there are several.
    """
    lines = []
    for stream, counts in folder.described["counts"].items():
        fvu = folder.fvu["per_stream"][stream]
        said = ", ".join(
            f"{counts[name]} {name.replace('_', ' ')}" for name in ("dead", "rare", "common", "very_common")
        )
        left = "" if fvu is None else f"; FVU {100 * fvu:.2f}%"
        lines.append(f"{stream}: {folder.settings.d_sae} features on {counts['tokens']} tokens: {said}{left}")
        of_steps = {step: folder.fvu["per_step_and_stream"][f"{step}.{stream}"] for step in folder.steps}
        if len(of_steps) > 1:
            each = ", ".join(f"{step}: {'-' if fvu is None else f'{100 * fvu:.2f}%'}" for step, fvu in of_steps.items())
            lines.append(f"{stream}: FVU by step: {each}")
    return lines


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ScoreFeaturesOptions, run, argv, prog=prog)
