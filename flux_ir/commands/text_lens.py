"""`flux-ir text-lens`: what is drawn from an earlier layer of the text encoders, or from some tokens alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    COMPARED,
    KNOWN,
    LARGEST_SEED,
    MACHINE,
    PICTURE,
    BatchOptions,
    ModelOptions,
    NameOptions,
    PictureOptions,
    PromptOptions,
)

if TYPE_CHECKING:
    from flux_ir.studies.text_lens import AspectScore

TOLD = "what the transformer is told"


@dataclass(frozen=True, kw_only=True)
class TextLensOptions(PromptOptions, PictureOptions, ModelOptions, BatchOptions, NameOptions):
    """Draw a prompt from earlier layers of the text encoders, each read through the norm behind the last one.

    Or from the words, the end mark or the padding alone, from single words, or with words of another prompt. Gives a
    contact sheet of layers and seeds; on captions of flux-tiny's world also what of the scene is right. Stopped at any
    moment, the same command goes on.
    """

    prompts: Path | None = option(
        None, help="several prompts: a .txt, .jsonl or .csv file", group=PICTURE, default_text="--prompt alone"
    )
    layers: tuple[str, ...] | None = option(
        None, help="t5.embeddings, t5.12, clip.7 and so on, as shell patterns", group=TOLD, default_text="all of T5"
    )
    tokens: tuple[Literal["all", "words", "end", "padding"], ...] = option(
        ("all",), help="which tokens of T5 come from the prompt; several are drawn one after the other", group=TOLD
    )
    words: tuple[str, ...] | None = option(
        None,
        help="in their place words or phrases, each drawn by itself: red,red circle,red+square",
        group=TOLD,
        default_text="--tokens says it",
    )
    rest: Literal["empty", "zeros", "removed", "last", "other"] = option(
        "empty",
        help="where all other tokens come from: empty or other prompt, zeros, nowhere, or the prompt's last layer",
        group=TOLD,
    )
    other_prompt: str | None = option(
        None, help="another prompt that something comes from", group=TOLD, free_text=True, default_text="none"
    )
    swap: tuple[str, ...] | None = option(
        None,
        help="words that are told as words of the other prompt: red=blue,circle=square",
        group=TOLD,
        default_text="none",
    )
    pooled: Literal["prompt", "empty", "zeros", "other"] = option(
        "prompt", help="where CLIP's vector comes from", group=TOLD
    )
    judge: bool = option(
        False,
        help="say what is right: every prompt is a caption of flux-tiny's world (a CPU then batches, too)",
        group=KNOWN,
    )
    seed: int = option(0, help="seed of the first noise", group=COMPARED, maximum=LARGEST_SEED)
    seeds: int = option(4, help="noises, side by side", group=COMPARED)
    output_dir: Path = option(Path("text_lens"), help="where the folders are", group=MACHINE)


def run(options: TextLensOptions) -> None:
    """Draw as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.api.text_lens import TextLensSettings, run_text_lens
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        done = run_text_lens(TextLensSettings(**options.given(TextLensSettings)), report.watch)
    for line in aligned(table_of(done.scores)) if done.scores else ():
        report.results.print(line, markup=False)
    written = {"sheet": done.sheets[0], "numbers": done.numbers}
    if len(done.sheets) > 1:
        written = {"sheets": done.folder, "numbers": done.numbers}
    if done.table is not None and done.chart is not None:
        written |= {"table": done.table, "chart": done.chart}
    report.table(f"{len(done.rows)} readings drawn", written, peak_memory())


def table_of(scores: "Sequence[AspectScore]") -> list[tuple[str, ...]]:
    """A line for each selection and layer: how often each aspect is right, in brackets how often by chance."""
    aspects = list(dict.fromkeys(one.aspect for one in scores))
    cells = {
        (one.tokens, one.layer, one.aspect): f"{one.right:.2f}" + ("" if one.chance is None else f" ({one.chance:.2f})")
        for one in scores
    }
    lines = dict.fromkeys((one.tokens, one.layer) for one in scores)
    return [
        ("right in the picture (by chance)", *aspects),
        *((f"{tokens}, {layer}", *(cells.get((tokens, layer, a), "") for a in aspects)) for tokens, layer in lines),
    ]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(TextLensOptions, run, argv, prog=prog)
