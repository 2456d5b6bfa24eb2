"""`flux-ir demonstrate`: which features do something, each turned down and up beside a random direction."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, BatchOptions, CheckpointOptions, ComputeOptions, FolderOptions

if TYPE_CHECKING:
    from flux_ir.steering.demonstrations import Demonstration

WHICH, ON_WHAT, COMPARED = "which features", "on what, and how far", "what it is compared with"


@dataclass(frozen=True, kw_only=True)
class DemonstrateOptions(FolderOptions, CheckpointOptions, ComputeOptions, BatchOptions):
    """Turn features down and up, and say which of them do more than a random direction that moves tokens as far.

    The score of a feature is how far its pictures are from the unsteered ones, by LPIPS where it is installed (pip
    install lpips) and else by the finished latent; what changes to one side alone counts half. Features are ranked by
    score minus that of the random direction, and the failures are shown too. Writes steering/ into the folder of
    features, where flux-ir explore-features finds it. Stopped at any moment, the same command goes on.
    """

    feature: tuple[int, ...] = option((), help="these, by number", group=WHICH, minimum=0, default_text="--window")
    by: Literal["frequency", "share", "images", "mean_active", "max_active"] = option(
        "frequency", help="the number of the table that the window is of", group=WHICH
    )
    window: tuple[float, ...] = option(
        (70.0, 95.0), help="percentiles of it, over the features that are not dead", group=WHICH
    )
    number: int = option(20, help="features, evenly spaced through the window", group=WHICH, minimum=1)

    prompt: str | None = option(
        None,
        help="what to draw",
        group=ON_WHAT,
        free_text=True,
        default_text="the prompts of the feature's strongest images",
    )
    examples: int = option(2, help="of these images, with their own noise", group=ON_WHAT)
    strength: tuple[float, ...] = option(
        (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
        help="how far, in the feature's own maxima: as far down as up",
        group=ON_WHAT,
    )
    seed: int | None = option(
        None, help="of the noise", group=ON_WHAT, default_text="that of the image; with --prompt 0", minimum=0
    )

    controls: int = option(
        1, help="random directions for each feature: it is to be above all of them", group=COMPARED, minimum=1
    )

    model: str | None = option(
        None, help="the model to turn them in", group=MACHINE, default_text="the one that was captured"
    )


def run(options: DemonstrateOptions) -> None:
    """Demonstrate as the options say. Raises FluxIRError for what a user can mend, before anything heavy."""
    from flux_ir.api.demonstrate import demonstrate
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        done = demonstrate(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for line in table_of(done.features):
        report.results.print(line, markup=False)
    report.results.print(done.summary.sentence(), markup=False)
    written = {f"sheet {number}": path for number, path in enumerate(done.sheets, start=1)}
    written |= {"a strip of each": done.folder, "numbers": done.numbers, "as a table": done.table}
    report.table(f"{len(done.features)} demonstrated", written, peak_memory())


def table_of(features: "Sequence[Demonstration]") -> list[str]:
    """A line per feature, under headings."""
    from flux_ir.commands.report import aligned

    head = ("feature", "score", "random", "difference", "prompts", "", "above at")
    rows = [
        (
            str(one.feature),
            f"{one.score:.3f}",
            f"{one.control:.3f}",
            f"{one.score - one.control:+.3f}",
            str(len(one.scenes)),
            "above" if one.above else "not above",
            ",".join(f"{strength:g}" for strength in one.above_at) or "none",
        )
        for one in features
    ]
    return aligned([head, *rows])


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(DemonstrateOptions, run, argv, prog=prog)
