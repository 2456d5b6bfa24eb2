"""`flux-ir capture` (and `capture_sample.py`): sample a picture, record every block, show what each would draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    KEEP,
    PICTURE,
    READ,
    EditOptions,
    ModelOptions,
    OnePictureOptions,
    PlanOptions,
    PromptOptions,
    ReadingOptions,
    RunsOptions,
    StepOptions,
)
from flux_ir.commands.lens import lens_files


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(
    PromptOptions,
    OnePictureOptions,
    StepOptions,
    ReadingOptions,
    ModelOptions,
    EditOptions,
    RunsOptions,
    PlanOptions,
):
    """Sample one picture, record what every block puts out at every step, and decode each block as if it were the last.

    Everything goes into a folder of its own below --output_dir, named by the generation id printed at the start.
    """

    prompt_embeds: Path | None = option(
        None,
        help="the prompt's embeddings in its place: a .safetensors with prompt_embeds (T5) and pooled_prompt_embeds "
        "(CLIP); no text encoder is loaded",
        group=PICTURE,
        default_text="the prompt is encoded",
    )
    add_sampling_metadata: bool = option(True, help="write the prompt into the picture's EXIF data", group=PICTURE)

    sites: tuple[str, ...] | None = option(
        None,
        help="which sites to record, as shell patterns such as double.*.img, single.3? or t5.*",
        group=KEEP,
        default_text="every block's output",
    )

    should_decode_intermediates: bool = option(True, help="decode what each block would have drawn", group=READ)


def run(options: CaptureOptions) -> None:
    """Capture as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.api.capture import CaptureSettings, run_capture
    from flux_ir.commands.report import Report, peak_memory

    # A setting has the name of its flag; `plan` is a flag alone.
    settings = CaptureSettings(**options.given(CaptureSettings))
    if options.plan:
        from flux_ir.commands.planning import plan_capture

        plan_capture(settings, options)
        return
    with Report() as report:
        done = run_capture(settings, report.watch)
    written = {"picture": done.picture, "capture": done.capture, "metadata": done.metadata}
    if done.lens is not None:
        written |= lens_files(done.lens)
    report.table(f"generation {done.generation_id}", written, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The script `capture_sample.py`: returns the exit code."""
    return launch(CaptureOptions, run, argv, prog=prog)
