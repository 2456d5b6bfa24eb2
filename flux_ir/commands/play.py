"""`flux-ir play`: a local page with one model: pictures, the features of a patch, and sliders that turn them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    MACHINE,
    READ,
    ModelOptions,
    PictureOptions,
)


@dataclass(frozen=True, kw_only=True)
class PlayOptions(PictureOptions, ModelOptions):
    """Serve a local page: type a prompt, click a patch for its features, turn them, and compare before with after.

    The page is on 127.0.0.1 alone, and no request leaves the machine. It needs gradio: pip install "flux-ir[play]".
    Ctrl-C ends it.
    """

    sae: tuple[Path, ...] | None = option(
        None,
        help="folders of autoencoders of image tokens, whose features can be turned",
        group=READ,
        default_text="none: pictures and blocks alone",
    )
    features: tuple[Path, ...] | None = option(
        None,
        help="folders that flux-ir features made of them: labels and examples",
        group=READ,
        default_text="none: features have numbers alone",
    )
    port: int = option(7860, help="the port of 127.0.0.1; 0: any that is free", group=MACHINE)
    output_dir: Path = option(Path("play"), help="where regions and edits are saved", group=MACHINE)


def run(options: PlayOptions) -> None:
    """Serve until Ctrl-C. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.commands.report import Report
    from flux_ir.playing.server import run_play
    from flux_ir.playing.studio import PlaySettings

    settings = PlaySettings(**options.given(PlaySettings))
    with Report() as report:
        page = run_play(settings, report.watch)
    report.results.print(page.address)
    report.note("open it in a browser; Ctrl-C ends it")
    try:
        page.wait()
    except KeyboardInterrupt:
        report.note("closing; the edits it saved stay")
        page.close()


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(PlayOptions, run, argv, prog=prog)
