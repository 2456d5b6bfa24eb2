"""The folder of a comparison of two models: a file for each generation, comparison.json and the heat maps.

A generation's file is named by a digest of all it depends on, so the same comparison goes on where it stopped. Next:
`compare_models`, which measures what is written here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.errors import FluxIRError, counted
from flux_ir.features.contents import digest_of
from flux_ir.files import read_json, write_json
from flux_ir.lens.measures import json_number
from flux_ir.models.architecture import TransformerParams
from flux_ir.plots.figure import STREAM_NAMES
from flux_ir.plots.grids import HeatPanel, heat_panels
from flux_ir.studies.likeness import Measure, Table, summary

FORMAT = 1
RESULT, GENERATIONS, RUNS = "comparison.json", "generations", "runs"
SEED, ITSELF = "seed", "itself"
"""The controls: the first model from other noise, and once more from its own states."""
STATE, VELOCITY = "state", "velocity"
"""The rows before the first block and behind the last: what a step began with, and what was predicted."""
RUN_TITLES = {
    "free": "free-running",
    "forced": "forced",
    "block": "block alone",
    SEED: "other seed",
    ITSELF: "itself",
}
DRAWN: tuple[tuple[Measure, str], ...] = (("distance", "relative distance"), ("cka", "1 - CKA"))
LEAST_DRAWN = 1e-4
"""What lies below is as white as this, but for an exact 0, which says so."""


@dataclass(frozen=True)
class ComparedModels:
    """What `compare_models` found, and where it lies."""

    folder: Path
    numbers: Path
    """comparison.json: all that follows, with how it was measured."""
    maps: Mapping[str, Path]
    """The heat maps, blocks by steps, by measure and stream: `distance_img`, `cka_txt`."""
    runs: Path | None
    """The folder of both models' runs of the first generation, for flux-ir explore; None: nothing was decoded."""
    result: Mapping[str, Any]

    def mean(self, run: str, measure: Measure = "distance", stream: str = "img") -> dict[str, list[float | None]]:
        """Means over generations by row, a list over steps. `run` is free, forced, block or seed."""
        return {
            row: [one["mean"] for one in steps] for row, steps in self.result["likeness"][run][stream][measure].items()
        }


def check_blocks(first: str, a: TransformerParams, other: str, b: TransformerParams) -> None:
    """Raises FluxIRError for two models whose blocks do not match."""

    def shape(params: TransformerParams) -> str:
        blocks = f"{params.depth} double and {params.depth_single_blocks} single blocks"
        return f"{blocks} of width {params.hidden_size}, for {params.in_channels} channels"

    if shape(a) != shape(b) or (a.context_in_dim, a.vec_in_dim) != (b.context_in_dim, b.vec_in_dim):
        raise FluxIRError(
            f"models are compared block by block: {first} has {shape(a)}, and {other} {shape(b)}",
            hint="compare models of one family, such as flux-schnell and flux-dev",
        )


class Generated(NamedTuple):
    """One prompt and noise that both models are shown."""

    prompt: str
    seed: int
    other_seed: int | None
    """The noise of the yardstick; None: there is none."""


class ComparisonFolder:
    """Where a comparison is kept. `identity` is all that its numbers depend on, but prompts and noise."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, {"format": FORMAT, **identity}
        self.digest = digest_of([self.identity])

    def check(self) -> None:
        """Raises FluxIRError where the folder holds another comparison."""
        result = self.path / RESULT
        if result.is_file() and read_json(result).get("digest") != self.digest:
            raise FluxIRError(
                f"{self.path} holds a comparison of other models or with other settings",
                hint="give this one a --name of its own, or delete that folder",
            )

    def file(self, one: Generated) -> Path:
        """The numbers of one generation."""
        return self.path / GENERATIONS / f"{digest_of([self.digest, list(one)])}.json"

    def missing(self, generations: Sequence[Generated]) -> list[Generated]:
        """Those that are still to be measured."""
        return [one for one in generations if not self.file(one).is_file()]

    def keep(self, one: Generated, table: Table, pictures: Mapping[str, Any]) -> None:
        """The numbers of one generation, complete or not at all."""
        content = {**one._asdict(), "likeness": table.to_json(), "pictures": dict(pictures)}
        write_json(self.file(one), content)

    def finish(self, generations: Sequence[Generated], steps: Sequence[int]) -> ComparedModels:
        """Sums up all generations, which must have been kept, and writes comparison.json last."""
        kept = [read_json(self.file(one)) for one in generations]
        tables = [Table.from_json(one["likeness"]) for one in kept]
        likeness = summary(tables, [one.prompt for one in generations])
        itself = likeness.pop(ITSELF, None)
        likeness = {run: in_depth_order(likeness[run]) for run in RUN_TITLES if run in likeness}
        result = {
            "digest": self.digest,
            **self.identity,
            "steps": list(steps),
            "generations": [{name: one[name] for name in (*Generated._fields, "pictures")} for one in kept],
            "likeness": likeness,
            "control": None if itself is None else control(itself),
            "pictures": pictures_of(kept),
        }
        known = self.path / RESULT
        is_new = not known.is_file() or read_json(known) != result
        maps = {}
        for measure, title in DRAWN:
            for stream in ("img", "txt"):
                path = self.path / f"{measure}_{stream}.png"
                if (path.is_file() and not is_new) or draw(path, result, measure, title, stream):
                    maps[f"{measure}_{stream}"] = path
        write_json(known, result)  # last: where it is, the pictures are
        runs = self.path / RUNS
        return ComparedModels(self.path, self.path / RESULT, maps, runs if runs.is_dir() else None, result)


def in_depth_order(streams: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The same with rows from the state before the first block to the velocity behind the last."""

    def place(row: str) -> tuple[int, ...]:
        if row in (STATE, VELOCITY):
            return (-1 if row == STATE else 2,)
        kind, number = row.split(".")
        return (kind == "single", int(number))

    return {
        stream: {name: {row: rows[row] for row in sorted(rows, key=place)} for name, rows in measures.items()}
        for stream, measures in streams.items()
    }


def control(itself: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the first model, run once more from its own states, gave every bit again."""
    cells = [
        (stream[measure][row], measure)
        for stream in itself.values()
        for measure in ("distance", "cka")
        for row in stream[measure]
    ]
    distances = [one["mean"] for steps, measure in cells if measure == "distance" for one in steps]
    ckas = [one["mean"] for steps, measure in cells if measure == "cka" for one in steps if one["mean"] is not None]
    return {"equal_bits": max(distances) == 0, "distance": max(distances), "least_cka": min(ckas, default=None)}


def pictures_of(kept: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the finished pictures, by run: latent distance, PSNR of those that differ, and how many are equal."""
    found: dict[str, dict[str, Any]] = {}
    for run in dict.fromkeys(run for one in kept for run in one["pictures"]):
        pictures = [one["pictures"][run] for one in kept if run in one["pictures"]]
        distances = [one["latent_distance"] for one in pictures if one["latent_distance"] is not None]
        psnrs = [one["psnr_db"] for one in pictures if one["psnr_db"] is not None]
        found[run] = {
            "pictures": len(pictures),
            "equal": sum(one["equal"] for one in pictures),
            "psnr_db": json_number(sum(psnrs) / len(psnrs)) if psnrs else None,
            "latent_distance": json_number(sum(distances) / len(distances)) if distances else None,
        }
    return found


# ---- What is shown


def side(described: Mapping[str, Any]) -> str:
    """One model in a few words."""
    facts = [str(described["model"] or "a model that is not known")]
    facts += [f"{Path(lora['path']).name} at {lora['strength']:g}" for lora in described.get("loras") or ()]
    if described.get("quantize"):
        facts.append(described["quantize"])
    if described.get("checkpoint"):
        facts.append(Path(described["checkpoint"]).name)
    if described.get("guidance") is not None:
        facts.append(f"guidance {described['guidance']:g}")
    return ", ".join(facts)


def draw(path: Path, result: Mapping[str, Any], measure: Measure, title: str, stream: str) -> bool:
    """One measure of one stream: a grid of rows by steps for each run. False: there is nothing to draw."""
    of_stream = {run: streams[stream][measure] for run, streams in result["likeness"].items() if stream in streams}
    rows = list(dict.fromkeys(row for rows in of_stream.values() for row in rows))
    panels = [
        HeatPanel(RUN_TITLES[run], [list(_drawn(cells, row, measure, len(result["steps"]))) for row in rows])
        for run, cells in of_stream.items()
    ]
    values = [value for panel in panels for row in panel.values for value in row if value]
    if not values:
        return False
    heat_panels(
        path,
        rows,
        [str(step) for step in result["steps"]],
        panels,
        f"{title}, {STREAM_NAMES[stream]}",
        subtitle=f"{side(result['first'])} and {side(result['other'])}; "
        f"{counted(len(result['generations']), 'generation')}, steps across",
        low=max(LEAST_DRAWN, min(values)),
        high=max(2 * LEAST_DRAWN, *values),
    )
    return True


def _drawn(cells: Mapping[str, Any], row: str, measure: Measure, steps: int) -> Iterator[float | None]:
    for one in cells.get(row, [{"mean": None}] * steps):
        value = one["mean"]
        if not isinstance(value, int | float):
            yield None
        else:
            yield max(0.0, 1 - value) if measure == "cka" else value
