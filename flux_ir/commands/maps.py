"""`flux-ir maps`: where the image looks at each word of the prompt, and where each word looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    KEEP,
    MACHINE,
    PICTURE,
    ModelOptions,
    OnePictureOptions,
    PromptOptions,
    StepOptions,
)


@dataclass(frozen=True, kw_only=True)
class MapsOptions(PromptOptions, OnePictureOptions, StepOptions, ModelOptions):
    """Sample one picture with exact attention maps of the prompt's words in every block at every step.

    Maps go to one file per step, their means to a contact sheet. The picture has the bits it has without maps.
    """

    words: tuple[str, ...] | None = option(
        None,
        help="words or phrases of the prompt; of one that comes again red#1, red#2 are its places",
        group=KEEP,
        default_text="every word",
    )
    patches: tuple[int, ...] = option(
        (), help="image tokens, row by row from 0, whose own attention is mapped", group=KEEP, default_text="none"
    )
    blocks: tuple[str, ...] | None = option(
        None, help="which blocks, as shell patterns such as double.* or single.3", group=KEEP, default_text="all"
    )
    heads: bool = option(False, help="keep every head's maps apart in the files", group=KEEP)
    concepts: tuple[str, ...] | None = option(
        None,
        help="any words, in the prompt or not: where in the picture each is, of these (ConceptAttention)",
        group=KEEP,
        default_text="none",
    )
    concept_blocks: tuple[int, ...] | None = option(
        None, help="the double blocks whose concept maps are averaged", group=KEEP, default_text="the last fifth"
    )
    image: Path | None = option(
        None,
        help="a real picture to look at instead of one that is sampled: encoded, with the noise of each of --steps",
        group=PICTURE,
        default_text="one is sampled",
    )
    output_dir: Path = option(Path("maps"), help="where the folders of maps are", group=MACHINE)


def run(options: MapsOptions) -> None:
    """Map as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.api.maps import MapSettings, run_maps
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        done = run_maps(MapSettings(**options.given(MapSettings)), report.watch)
    report.results.print("the image's attention, mean over blocks and steps:")
    for line in aligned([(group, f"{share:.1%}") for group, share in done.mass["all"].items()]):
        report.results.print(f"  {line}", markup=False)
    written = {
        "page": done.page,
        "picture": done.picture,
        "contact sheet": done.sheet,
        "numbers": done.numbers,
        "maps": done.folder,
    }
    if done.concept_sheet is not None:
        written |= {"concepts": done.concept_sheet}
    report.table(f"maps of {', '.join(done.words)}", written, peak_memory())


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(MapsOptions, run, argv, prog=prog)
