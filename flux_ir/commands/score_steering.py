"""`flux-ir score-steering`: how often an edit changes one known thing of a scene, and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from flux_ir.commands.cli.option import REQUIRED, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import KNOWN, MACHINE, MEASURED, ActivationsOptions, DeviceOptions, TokensOptions

SEARCHED = "what is searched"


@dataclass(frozen=True, kw_only=True)
class ScoreSteeringOptions(ActivationsOptions, DeviceOptions, TokensOptions):
    """Score how often an edit of features puts a known thing into a scene of flux-tiny and leaves all else as it was.

    For each concept one direction, one strength and one rule for the region are found on scenes of one part of the
    captions, and counted on fresh ones: a feature, a set of them, a swap, and beside these, under the same search, mean
    differences, neurons, random directions; last, the edited caption itself. Writes steering_scores.json, a table and
    a grid per kind; a run that was stopped goes on.
    """

    sae: tuple[Path, ...] = option(
        REQUIRED,
        help="the folder of an autoencoder of image tokens, text tokens or a layer of T5; several are tried together",
        group=MEASURED,
    )

    kinds: tuple[Literal["colour", "background", "shape", "place"], ...] = option(
        ("colour", "background", "shape", "place"),
        help="recolour an object, change the background, reshape an object, move the only one",
        group=KNOWN,
    )
    concepts: tuple[str, ...] | None = option(
        None, help="some of their concepts, such as red,white", group=KNOWN, default_text="all"
    )
    tasks: int = option(200, help="fresh scenes to count each row on", group=KNOWN)
    small_tasks: int = option(40, help="of them, for doses, windows and other concepts' features", group=KNOWN)

    search_tasks: int = option(24, help="scenes to search on", group=SEARCHED)
    candidates: int = option(12, help="features, and neurons, of each concept", group=SEARCHED)
    strength: tuple[float, ...] = option(
        (1.0, 2.0, 4.0), help="in the feature's own maxima, or in lengths of the mean difference", group=SEARCHED
    )
    controls: int = option(20, help="random directions of each concept", group=SEARCHED)
    seed: int = option(0, help="of the scenes", group=SEARCHED)

    name: str | None = option(
        None, help="the name of the folder of scores", group=MACHINE, default_text="the autoencoder's"
    )
    output_dir: Path = option(Path("steering_scores"), help="where the folders of scores are", group=MACHINE)


def run(options: ScoreSteeringOptions) -> None:
    """Score as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.score_steering import RESULT, TABLE, score_steering
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        scored = score_steering(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for table in tables(scored.result):
        for line in aligned(table):
            report.results.print(line, markup=False)
        report.results.print()
    written = {"numbers": scored.folder / RESULT, "table": scored.folder / TABLE}
    report.table("scored", written | {kind: scored.folder / f"{kind}.png" for kind in options.kinds}, peak_memory())


def tables(result: Mapping[str, Any]) -> Iterator[list[tuple[str, ...]]]:
    """For each kind the share of scenes in which only what was asked for changed; in brackets, in which it changed."""
    from flux_ir.api.score_steering import ROW_TITLES

    for kind, concepts in result["kinds"].items():
        table = [(f"{kind}: only it changed (changed at all)", *ROW_TITLES.values())]
        for concept, rows in concepts.items():
            table.append((concept, *(f"{rows[row]['joint']:.2f} ({rows[row]['changed']:.2f})" for row in ROW_TITLES)))
        yield table


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ScoreSteeringOptions, run, argv, prog=prog)
