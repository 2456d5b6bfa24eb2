"""`flux-ir score-concepts`: what features know, where the answer is known, beside what else could be read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import MACHINE, MEASURED, AutoencoderOptions, LabelsOptions

if TYPE_CHECKING:
    from flux_ir.api.score_concepts import ScoredConcepts

COMPARED = "what is compared"


@dataclass(frozen=True, kw_only=True)
class ScoreConceptsOptions(AutoencoderOptions, LabelsOptions):
    """Score how well single features tell concepts that are known: colours, shapes, sizes, places of flux-tiny's world.

    For each concept the best feature is picked on one collection and reported on another, which share no prompt: AUROC,
    and recall at 95 % precision. Beside it stand probes on few features and on everything, neurons, PCA, random
    directions, an untrained autoencoder, and the same pick under permuted labels. Labels are found on the generated
    pictures, or come from a file. Writes concepts.json and a picture per step; a run that was stopped goes on.
    """

    report: Path = option(
        REQUIRED, help="the collection to report on; --captures is the one to pick with", group=MEASURED
    )

    rows: (
        tuple[
            Literal[
                "sae",
                "k_sparse_1",
                "k_sparse_2",
                "k_sparse_5",
                "untrained",
                "neurons",
                "pca",
                "random",
                "mean_difference",
                "input_axes",
                "input_probe",
                "probe",
                "shuffled",
                "null",
            ],
            ...,
        ]
        | None
    ) = option(None, help="what to compare", group=COMPARED, default_text="all there is")
    null: int = option(200, help="draws of permuted labels, each with a pick of its own", group=COMPARED)
    run_model: bool = option(False, help="run the model for the neurons, where they were not collected", group=COMPARED)

    output_dir: Path = option(Path("concepts"), help="where the folders of concepts are", group=MACHINE)


def run(options: ScoreConceptsOptions) -> None:
    """Score as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.score_concepts import score_concepts
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        scored = score_concepts(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for table in tables(scored):
        for line in aligned(table):
            report.results.print(line, markup=False)
        report.results.print()
    written = {"numbers": scored.folder / "concepts.json"}
    written |= {f"picture, step {step}": scored.folder / f"concepts_step_{step}.png" for step in scored.result["steps"]}
    report.table("scored", written, peak_memory())


def tables(scored: "ScoredConcepts") -> list[list[tuple[str, ...]]]:
    """How many positives there are of every concept, then for each step the mean AUROC and recall of every kind.

    A reader's recall is at 95 % precision, beside its AUROC. Last, what the best of fewer features is expected to come
    to: of as many as other readers have to pick from.
    """
    from flux_ir.api.score_concepts import LEVEL_WORDS, NEGATIVES_WORDS, mean_rows
    from flux_ir.studies.concepts import ROW_TITLES

    found = [counts_table(scored.result["questions"])]
    for step, rows in scored.result["steps"].items():
        means = mean_rows(rows)
        fewer = sorted({count for one in means for count in one.of_fewer})
        columns = [(row, what) for row in rows for what in ("auroc", "recall") if (row, what) != ("null", "recall")]
        titles = ["recall" if what == "recall" else ROW_TITLES[row] for row, what in columns]
        titles += [f"best of {count}" for count in fewer]
        table = [(f"step {step}, mean AUROC, recall at 95 % precision", "concepts", *titles)]
        sizes = [str(rows[row]["candidates"] or "") if what == "auroc" else "" for row, what in columns]
        table.append(("candidates, each with both signs", "", *sizes, *map(str, fewer)))
        for one in means:
            name = f"{one.kind}, {LEVEL_WORDS[one.level]}, {NEGATIVES_WORDS[one.negatives]}"
            means_of = {"auroc": one.aurocs, "recall": one.recalls}
            cells = [f"{means_of[what][row]:.3f}" if row in means_of[what] else "" for row, what in columns]
            cells += [f"{one.of_fewer[count]:.3f}" if count in one.of_fewer else "" for count in fewer]
            table.append((name, str(one.concepts), *cells))
        found.append(table)
    return found


def counts_table(questions: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Positives to pick with and to report on, and those to report on by the shape they are of.

    Where a concept is not asked about, the negatives are named against which positives or negatives are too few.
    """
    from flux_ir.api.score_concepts import LEVEL_WORDS

    shapes = list(next((one["by_shape"] for one in questions if one["by_shape"]), {}))
    table = [("positives", "pick", "report", "hard", *(f"of a {shape}" for shape in shapes))]
    for one in questions:
        if one["negatives"] == "hard":
            continue
        same = [other for other in questions if _key(other) == _key(one)]
        hard = next((other for other in same if other["negatives"] == "hard"), None)
        by_shape = [str(one["by_shape"][shape]) if one["by_shape"] else "" for shape in shapes]
        name = f"{one['kind']} {one['concept']}, {LEVEL_WORDS[one['level']]}"
        against = " and ".join(other["negatives"] for other in same if not other["asked"])
        few = f" (too few against {against})" if against else ""
        counts = [str(one[side]["positives"]) for side in ("pick", "report")]
        table.append((name + few, *counts, "" if hard is None else str(hard["report"]["positives"]), *by_shape))
    return table


def _key(question: Mapping[str, Any]) -> tuple[str, str, str]:
    return question["kind"], question["concept"], question["level"]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ScoreConceptsOptions, run, argv, prog=prog)
