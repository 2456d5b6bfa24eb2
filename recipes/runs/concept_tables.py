"""Tables for a report, in Markdown, of what score-concepts found: `python concept_tables.py FOLDER [FOLDER ...]`.

First one line for each folder and step: the lowest and the mean AUROC of the best features over each kind of concept.
Then, of the first folder, every row for those kinds, and every concept with its interval and the null beside it.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {
    "colour, interior": ("colour", "interior", "all"),
    "colour, any": ("colour", "any", "all"),
    "background, any": ("background", "any", "all"),
    "shape, hard patches": ("shape", "any", "hard"),
    "shape, image": ("shape", "image", "all"),
    "size, image": ("size", "image", "all"),
    "place, image": ("place", "image", "all"),
    "relation, image": ("relation", "image", "all"),
}
Answers = Mapping[tuple[str, ...], Mapping[str, Any]]


def main() -> None:
    """Print the three tables."""
    folders = [Path(name) for name in sys.argv[1:]] or sys.exit(__doc__ or "")
    found = {folder.name: json.loads((folder / "concepts.json").read_text(encoding="utf-8")) for folder in folders}
    rows = [
        [name, step, *(spread(answers_of(of_step["sae"]), kind) for kind in KINDS.values())]
        for name, report in found.items()
        for step, of_step in report["steps"].items()
    ]
    table(["autoencoder", "step", *KINDS], rows)
    of_step = next(iter(found[folders[0].name]["steps"].values()))
    table(
        ["row", *KINDS],
        [[row, *(spread(answers_of(of_step[row]), kind) for kind in KINDS.values())] for row in of_step],
    )
    table(["concept", "level", "against", "positives", "best feature", "95 % interval", "recall at .95", "5 features",
           "full probe", "null, 95th percentile"], concepts(found[folders[0].name], of_step))  # fmt: skip


def concepts(report: Mapping[str, Any], of_step: Mapping[str, Any]) -> Iterable[list[str]]:
    """A line for each concept of the kinds above."""
    sae, others = answers_of(of_step["sae"]), [answers_of(of_step[row]) for row in ("k_sparse_5", "probe", "null")]
    for question in report["questions"]:
        key = tuple(question[word] for word in ("kind", "concept", "level", "negatives"))
        if (key[0], *key[2:]) not in KINDS.values() or key not in sae:
            continue
        one = sae[key]
        low, high = one["interval"] or (float("nan"),) * 2
        yield [
            " ".join(key[:2]),
            key[2],
            key[3],
            f"{question['report']['positives']:,}",
            number(one["auroc"]),
            f"{number(low)} to {number(high)}",
            number(one["recall"]),
            *(number(answers[key]["auroc"]) for answers in others),
        ]


def answers_of(row: Mapping[str, Any]) -> Answers:
    """By kind, concept, level and negatives."""
    return {tuple(one[word] for word in ("kind", "concept", "level", "negatives")): one for one in row["answers"]}


def spread(answers: Answers, kind: tuple[str, str, str]) -> str:
    """The lowest and the mean over concepts of a kind."""
    numbers = [one["auroc"] for key, one in answers.items() if (key[0], *key[2:]) == kind]
    return f"{number(min(numbers))} / {number(sum(numbers) / len(numbers))}" if numbers else "-"


def number(value: float) -> str:
    """Three digits, no number rounded up to a goal."""
    return f"{int(value * 1000) / 1000:.3f}".removeprefix("0")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One table."""
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows), end="\n\n")


if __name__ == "__main__":
    main()
