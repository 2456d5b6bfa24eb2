"""`flux-ir study STUDY.toml`: from prompts to what the features mean, by one small file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_ir.commands.cli.option import REQUIRED, Options, option
from flux_ir.commands.cli.parse import launch


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Run a whole study: collect activations, train autoencoders, measure them, say what their features mean.

    The file, TOML, has a table for each stage that is to run: [prompts], [collect], [train], [evaluate], and so on. A
    table holds the arguments of the stage's verb; what it leaves out has the verb's default. Two are in recipes/runs.

    Results are in folders named by what they depend on. A stage whose result for these settings is there is skipped,
    and one that was stopped goes on. study.toml in the study's folder has every setting that was used.
    """

    study: Path = option(REQUIRED, help="the study's file", positional=True)
    from_: str | None = option(None, help="the first stage to look at", default_text="the first of the file")
    only: tuple[str, ...] | None = option(None, help="the stages to look at", default_text="all of the file")
    output_dir: Path = option(Path("studies"), help="where studies' folders are")


def run(options: StudyOptions) -> None:
    """Run it, and say where everything is. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.study import run_study
    from flux_ir.commands.report import Report

    with Report() as report:
        studied = run_study(
            options.study,
            from_=options.from_,
            only=options.only,
            output_dir=options.output_dir,
            progress=report.watch,
        )
    rows = [
        (
            one.stage,
            "there already" if one.seconds is None else f"{one.seconds:.1f} s",
            ", ".join(map(str, one.folders)),
        )
        for one in studied.stages
    ]
    report.rows("study", [*rows, ("settings", "", str(studied.folder / "study.toml"))])


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(StudyOptions, run, argv, prog=prog)
