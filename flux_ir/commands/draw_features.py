"""`flux-ir draw-features`: contact sheets of features, their neighbours, and what each draws by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, CheckpointOptions, ComputeOptions, FolderOptions

WHICH, MAPS, DRAWS = "which features", "pictures with maps", "what they draw"


@dataclass(frozen=True, kw_only=True)
class DrawFeaturesOptions(FolderOptions, CheckpointOptions, ComputeOptions):
    """Draw features: their strongest pictures with maps over them, and what each draws when nothing else is there.

    Writes sheets/, draws/ and decoder.safetensors (the nearest features of each by direction and by activity) into the
    folder. Maps come from what was scored, so no picture is sampled again.
    """

    numbers: tuple[int, ...] | None = option(
        None, help="the features, by number", group=WHICH, minimum=0, default_text="those of --by"
    )
    by: str | None = option(
        None,
        help="a list of select-features, such as coherent, or share, frequency, images or max_active",
        group=WHICH,
        default_text="distinct where there is such a list, else share",
    )
    top: int = option(24, help="how many of the list", group=WHICH)

    examples: int = option(8, help="pictures of each", group=MAPS)
    cell_px: int = option(128, help="longer side of a picture on the sheet", unit="px", group=MAPS)
    percentile: float = option(
        100.0,
        help="of a feature's values above 0: what gets the strongest colour in all its pictures",
        group=MAPS,
        minimum=0.0,
        maximum=100.0,
        default_text="the largest",
    )
    opacity: float = option(0.8, help="of the strongest colour", group=MAPS, minimum=0.0, maximum=1.0)
    smooth: bool = option(False, help="maps go smoothly from token to token, and not in blocks", group=MAPS)
    plain: bool = option(False, help="each picture also without its map", group=MAPS)
    overlays: bool = option(False, help="each picture with its map also as a file, in overlays/", group=MAPS)

    draws: bool = option(True, help="run the model for what each feature draws", group=DRAWS)
    strength: float = option(1.0, help="of the icon, in units of k times the feature's mean activation", group=DRAWS)
    batch_size: int = option(8, help="features that go through the model together", group=DRAWS)
    seed: int = option(0, help="of the noise that all icons begin with", group=DRAWS)
    model: str | None = option(
        None, help="the model that draws", group=MACHINE, default_text="the one that was captured"
    )


def run(options: DrawFeaturesOptions) -> None:
    """Draw as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.draw_features import DECODER, DRAWS, OVERLAYS, draw_features
    from flux_ir.commands.report import Report, peak_memory

    with Report() as report:
        drawn = draw_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    written = {f"sheet {number}": path for number, path in enumerate(drawn.sheets, start=1)}
    if drawn.draws:
        written["what they draw"] = options.features / DRAWS
    if drawn.overlays:
        written["overlays"] = options.features / OVERLAYS
    report.table(f"{len(drawn.features)} drawn", written | {"neighbours": options.features / DECODER}, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(DrawFeaturesOptions, run, argv, prog=prog)
