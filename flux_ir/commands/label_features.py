"""`flux-ir label-features`: which words lift each feature, and a description that was judged on other images."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import DeviceOptions, FolderOptions

if TYPE_CHECKING:
    from flux_ir.features.folder import FeatureFolder

WORDS, LABELS = "words", "labels"
SHOWN = 16


@dataclass(frozen=True, kw_only=True)
class LabelFeaturesOptions(FolderOptions, DeviceOptions):
    """Find the words of the prompts that lift each feature, and describe it in a few of them.

    A description is made from half of the prompts and judged on the others, against images on which the feature is
    silent although they look alike; what is no better than chance there is no label. No language model is asked. Writes
    words.json and labels.json.
    """

    min_count: int = option(5, help="prompts that a word must be in to count", group=WORDS)
    fdr: float = option(
        0.05,
        help="share of the listed words, and of the labels, that may be chance",
        group=WORDS,
        maximum=1.0,
    )
    tokenizer: Path | None = option(
        None,
        help="the folder of the T5 tokenizer, which names the tokens that features of text fire on",
        group=WORDS,
        default_text="the model's own, if it is on this machine",
    )
    min_score: float = option(
        0.7,
        help="balanced accuracy that a label needs on images it was not made from",
        group=LABELS,
        minimum=0.5,
        maximum=1.0,
    )
    concepts: Path | None = option(
        None,
        help='more to describe features by: a JSON file {"concept": [ids of the generations that have it]}',
        group=LABELS,
    )
    clip: str | None = option(
        None,
        help="let this CLIP look at the pictures: a folder as transformers saves it, or a repository of the hub",
        group=LABELS,
    )
    vocabulary: Path | None = option(
        None,
        help="what CLIP looks for besides the prompts' most frequent phrases: a file of texts, one a line",
        group=LABELS,
    )
    seed: int = option(0, help="of the draws of images", group=LABELS)


def run(options: LabelFeaturesOptions) -> None:
    """Label as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.label_features import label_features
    from flux_ir.commands.report import Report, peak_memory
    from flux_ir.features.labels import LABELS_FILE
    from flux_ir.features.words import WORDS_FILE

    with Report() as report:
        folder = label_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for line in summary(folder):
        report.results.print(line, markup=False)
    written = {"words": folder.path / WORDS_FILE, "labels": folder.path / LABELS_FILE}
    report.table("labelled", written, peak_memory())


def summary(folder: "FeatureFolder") -> list[str]:
    """How many features have words and labels, and the best labels of each stream."""
    from flux_ir.commands.report import aligned
    from flux_ir.features.labels import read_labels
    from flux_ir.features.words import read_words

    lines = []
    for stream in folder.streams:
        words, labels = read_words(folder, stream) or [], read_labels(folder, stream) or {}
        lines.append(
            f"{stream}: words of the prompts lift {sum(map(bool, words))} of {folder.settings.d_sae} features, and "
            f"{len(labels)} have a label"
        )
        best = sorted(labels.values(), key=lambda row: (-row["score"], row["feature"]))[:SHOWN]
        rows = [("label", "feature", "score", "95% interval", "strong", "look-alikes")]
        rows += [
            (
                row["text"],
                str(row["feature"]),
                f"{row['score']:.2f}",
                f"{row['low']:.2f} to {row['high']:.2f}",
                "{} of {}".format(*row["strong"]),
                "{} of {}".format(*row["alike"]),
            )
            for row in best
        ]
        lines += aligned(rows) if best else []
    return lines


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(LabelFeaturesOptions, run, argv, prog=prog)
