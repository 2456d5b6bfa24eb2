"""`flux-ir features`: what the features of an autoencoder mean, all stages into one folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import ScoringOptions
from flux_ir.commands.score_features import summary


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(ScoringOptions):
    """Find out what the features of an autoencoder mean: scores, examples, and what the later stages make of them.

    Every stage is a verb of its own with more flags; here they run in order with their defaults, each unless its result
    is there. Stopped at any moment, the same command goes on.
    """


def run(options: FeaturesOptions) -> None:
    """Run all stages. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.features import analyse_features
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        folder = analyse_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    if os.environ.get("RANK", "0") != "0":
        return  # one process speaks for all
    for line in summary(folder):
        report.results.print(line, markup=False)
    report.table("analysed", {"features": folder.path}, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(FeaturesOptions, run, argv, prog=prog)
