"""`flux-ir select-features`: which features deserve a look, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, CheckpointOptions, DeviceOptions, FolderOptions

if TYPE_CHECKING:
    from flux_ir.features.selection import Ranked

COHERENCE, CONTRAST, EFFECT, LISTS = "coherence and stability", "contrast", "effect on the output", "lists"
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class SelectFeaturesOptions(FolderOptions, CheckpointOptions, DeviceOptions):
    """Rank features: whose images are alike, which are stable, which tell two prompts apart, which move the picture.

    Writes selection.safetensors (a column for each number, NaN where it was not computed) and selection.json (lists).
    Columns that are there for the same settings are kept, whatever else is asked for.
    """

    clip: str | None = option(
        None,
        help="compare images by this CLIP: a folder as transformers saves it, or a repository of the hub",
        group=COHERENCE,
        default_text="the model's own embeddings",
    )
    embeddings: Literal["site", "latents"] = option(
        "site",
        help="which of the model's own: the mean token of the site, or the mean of the picture's latent",
        group=COHERENCE,
    )
    permutations: int = option(
        199,
        help="permutations of the images that p is counted over, here and for a contrast",
        group=COHERENCE,
    )
    other_sae: Path | None = option(
        None,
        help="an autoencoder trained alike with another seed: the best cosine of each feature there",
        group=COHERENCE,
        default_text="no such number",
    )

    contrast: tuple[str, ...] | None = option(
        None,
        help="a word against the rest, two words against each other, or two .txt lists of prompts, line by line",
        group=CONTRAST,
        default_text="none",
    )
    region: tuple[float, ...] | None = option(
        None,
        help="left,top,right,bottom of a part of the picture, in shares of it, against the rest",
        group=CONTRAST,
        default_text="none",
    )

    effect_images: int = option(4, help="generations to measure effects on; 0: none, and no model is run", group=EFFECT)
    model: str | None = option(
        None, help="the model to measure effects in", group=EFFECT, default_text="the one that was captured"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = option("float32", help="what the model computes in", group=EFFECT)

    most: int = option(50, help="features of a list, at most", group=LISTS)
    examples_each: int = option(8, help="examples of each feature in the list of features that share none", group=LISTS)
    significance: float = option(
        0.05, help="largest q (Benjamini-Hochberg) of a feature in a list that was tested", group=LISTS
    )
    seed: int = option(0, help="of the permutations and signs", group=MACHINE)


def run(options: SelectFeaturesOptions) -> None:
    """Select as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.select_features import select_features
    from flux_ir.commands.report import Report, peak_memory
    from flux_ir.features.selection import FILE, LISTS

    with Report() as report:
        lists = select_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for stream, some in lists.items():
        for line in list_lines(stream, some):
            report.results.print(line, markup=False)
    written = {"columns": options.features / FILE, "lists": options.features / LISTS}
    report.table("selected", written, peak_memory())


def list_lines(stream: str, lists: "Sequence[Ranked]") -> list[str]:
    """A line for each list: its name, how many features it has, and the first of them with their values."""
    lines = []
    for one in lists:
        first = ", ".join(f"{feature} ({value:.3g})" for feature, value in zip(one.features, one.values, strict=True))
        some = ", ".join(first.split(", ")[:SHOWN]) or "none"
        tested = " significant" if one.q is not None else ""
        lines.append(f"{stream}, {one.name} ({len(one.features)}{tested}, by {one.column}): {some}")
    return lines


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(SelectFeaturesOptions, run, argv, prog=prog)
