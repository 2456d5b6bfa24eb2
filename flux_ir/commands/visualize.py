"""`flux-ir visualize` (and `create_visualization.py`): films and sheets of what each block would have drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flux_ir.commands.cli.option import flags, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import RunOptions
from flux_ir.errors import FluxIRError

WHAT, HOW, WHERE = "what is shown", "how it is shown", "where"
MOST_GIF_FPS = 50
MOST_NAMED = 20  # pictures left out are named one by one up to here

_MEANS_NOTHING_FOR = {
    "gif": (),
    "mp4": (),
    "png": ("fps", "font_size", "order"),
    "html": ("fps", "font_size", "order", "lens", "block_type", "max_blocks", "steps", "skip_broken"),
}


@dataclass(frozen=True, kw_only=True)
class VisualizeOptions(RunOptions):
    """Make a film, a contact sheet or a page of what each block would have drawn.

    Works from the pictures that capture_sample.py and flux-ir lens have decoded; the model is not loaded. The result
    goes into the run's folder.
    """

    compare: str | None = option(
        None, help="a second run, shown beside the first", group=WHAT, default_text="one run alone"
    )
    lens: Literal["euler", "x0", "tuned", "jacobian", "jacobian_summed"] = option(
        "euler",
        help="euler: the state the sampler would go to; x0: the clean image it believes in; the others: x0, fitted",
        group=WHAT,
    )
    block_type: Literal["double", "single"] | None = option(
        None, help="only double-stream or only single-stream blocks", group=WHAT, default_text="both"
    )
    max_blocks: int | None = option(
        None,
        help="only the first N blocks of each step in depth order, double before single (of --block_type, if given)",
        group=WHAT,
        minimum=1,
        default_text="all",
    )
    steps: tuple[int, ...] | None = option(
        None, help="which steps, counted from 0", group=WHAT, default_text="every decoded step"
    )
    skip_broken: bool = option(
        False, help="go on without missing or broken pictures, and say at the end which they were", group=WHAT
    )

    output_format: Literal["gif", "mp4", "png", "html"] = option(
        "gif",
        help="gif: loops for ever; mp4: H.264; png: contact sheet, in pages if it is large; html: the explorer",
        group=HOW,
    )
    fps: float = option(
        2.0, help=f"pictures per second, at most {MOST_GIF_FPS} in a GIF", group=HOW, minimum=0.01, maximum=240
    )
    order: Literal["depth", "steps"] = option(
        "depth", help="depth: all blocks of a step, then the next step; steps: one block through all steps", group=HOW
    )
    font_size: int = option(
        24,
        help="size of the caption; it shrinks where the picture is too small",
        unit="px",
        group=HOW,
        minimum=1,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_format == "gif" and self.fps > MOST_GIF_FPS:
            raise FluxIRError(
                f"a GIF shows at most {MOST_GIF_FPS} pictures per second: got --fps {self.fps}",
                hint="viewers slow down faster ones; use --output_format mp4",
            )
        for flag in flags(type(self)):
            if flag.name in _MEANS_NOTHING_FOR[self.output_format] and getattr(self, flag.name) != flag.default:
                raise FluxIRError(
                    f"--{flag.name} means nothing for --output_format {self.output_format}",
                    hint=f"leave --{flag.name} out, or choose another format",
                )


def run(options: VisualizeOptions) -> None:
    """Show what the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.visualize import VisualizationSettings, draw
    from flux_ir.commands.report import Report, host_memory

    settings = VisualizationSettings(**options.given(VisualizationSettings))
    with Report() as report:
        drawn = draw(settings, report.watch)
    for path, reason in list(drawn.left_out.items())[:MOST_NAMED]:
        report.note(f"left out: {path}: {reason}")
    if (more := len(drawn.left_out) - MOST_NAMED) > 0:
        report.note(f"left out: {more} more")
    if drawn.frames:
        width, height = drawn.size_px
        report.results.print(f"{drawn.frames} frames of {width} x {height} px, {drawn.seconds:.2f} s")
    memory = {} if options.output_format == "html" else host_memory()
    report.table(f"generation {drawn.generation_id}", drawn.files, memory)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The script `create_visualization.py`: returns the exit code."""
    return launch(VisualizeOptions, run, argv, prog=prog)
