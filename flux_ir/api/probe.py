"""Which site and step know what: a linear probe for every label at every site and step, on prompts not fitted on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flux_ir.activations.blocks import TokenSource
from flux_ir.activations.source import open_source
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.progress import Watch, follow, unwatched
from flux_ir.api.score_concepts import JUDGED, MAX_TOKENS, PARTS, labels_of
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import read_json, versions, write_json
from flux_ir.sae.data.filters import choose_sites
from flux_ir.sae.evaluation.plots import number_grid
from flux_ir.sites import SiteNames, site_names
from flux_ir.studies.concepts import LEAST_POSITIVES, answers_as_json, askable
from flux_ir.studies.label_files import read_labels
from flux_ir.studies.labels import Labels, Level, check_sources_apart
from flux_ir.studies.part import Part
from flux_ir.studies.rows import Bench, Space, number_probes, probes

RESULT = "probes.json"
_FORMAT = 1


@dataclass(frozen=True)
class Probed:
    """What probes found."""

    folder: Path
    result: dict[str, Any]
    """The content of probes.json."""


def probe(
    captures: str | Path,
    report: str | Path | None = None,
    *,
    sites: SiteNames | None = None,
    steps: Sequence[int] | None = None,
    labels: str | Path | None = None,
    levels: Level | Sequence[Level] = ("any", "image"),
    held_out: float = 0.3,
    least_positives: int = LEAST_POSITIVES,
    bootstrap: int = 200,
    max_tokens: int = MAX_TOKENS,
    name: str | None = None,
    output_dir: str | Path = "probes",
    progress: Watch = unwatched,
) -> Probed:
    """Fit a linear probe for every label at every site and step, and judge it on prompts it was not fitted on.

    Labels are those of flux-tiny's captions as the judge finds them on the generated pictures, or of the file or folder
    `labels`: words and masks are told from the others (AUROC), numbers are predicted (R^2). Probes are fitted on
    `captures` and judged on `report`, or on a share `held_out` of the prompts of `captures` if there is no other
    collection. `levels` are whole pictures ("image") and patches ("interior", "any"). The result is
    `output_dir`/`name`/probes.json, named as the captures by default; what was probed before is not probed again.

    Raises FluxIRError for what a user can mend.
    """
    known = [levels] if isinstance(levels, str) else list(levels)
    check_words(probe, {"levels": known})
    check_least({"least_positives": least_positives, "max_tokens": max_tokens, "bootstrap": bootstrap})
    if not 0 < held_out < 1:
        raise FluxIRError(f"--held_out must be between 0 and 1: got {held_out}", hint="pass 0.3 for three tenths")
    source = open_source(captures)
    other = source if report is None else open_source(report)
    if report is not None:
        check_sources_apart((str(captures), source), (str(report), other))
    chosen = choose_sites(source, ["*"] if sites is None else list(site_names(sites)))
    at_steps = _steps(source, other, steps)
    file = None if labels is None else read_labels(Path(labels))
    judged = Path(output_dir) / JUDGED
    first = labels_of(source, "pick", file, judged, max_tokens, chosen[0], progress)
    if report is None:
        pick, told = _halves(first, held_out)
    else:
        pick, told = first, labels_of(other, "report", file, judged, max_tokens, chosen[0], progress)
    settings = {
        "format": _FORMAT,
        "sets": [source.identity, other.identity],
        "labels": "judged" if file is None else file.digest,
        "levels": known,
        "held_out": None if report is not None else held_out,
        "least_positives": least_positives,
        "bootstrap": bootstrap,
        "max_tokens": max_tokens,
    }
    places = [(site, step) for site in chosen for step in at_steps]
    found: dict[str, dict[str, Any]] = {}
    for site, step in follow(progress, "probe", places, total=len(places)):
        parts = Part(source, pick, site, step), Part(other, told, site, step)
        key = settings | {"site": str(parts[0].site), "step": step}
        if any(part.used is not None for part in parts):
            key["padding"] = "left out"
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(output_dir) / PARTS / f"probe_step_{step}_{digest}.json"
        if path.is_file():
            made = read_json(path, required=("found",))["found"]
        else:
            made = _probed(*parts, known, least_positives, bootstrap)
            write_json(path, {"key": key, "found": made})
        found.setdefault(str(site), {})[str(step)] = made
    if not any(made["answers"] or made["numbers"] for of_steps in found.values() for made in of_steps.values()):
        raise FluxIRError(
            f"no label has {counted(least_positives, 'positive')} to judge on and half as many to fit on",
            hint="label more pictures, or lower --least_positives",
        )
    folder = Path(output_dir) / (Path(str(captures)).resolve().name if name is None else name)
    sizes = {
        side: {"pictures": len(one.images), "prompts": len(set(one.prompts))}
        for side, one in zip(("pick", "report"), (pick, told), strict=True)
    }
    result = {"settings": settings, "sets": sizes, "sites": found, "versions": versions("torch")}
    write_json(folder / RESULT, result)
    draw(folder / "probes.png", result)
    return Probed(folder, result)


def _probed(pick: Part, report: Part, levels: Sequence[str], least_positives: int, bootstrap: int) -> dict[str, Any]:
    asked = [
        one for one in askable(pick, report, least_positives) if one.negatives == "all" and one.question.level in levels
    ]
    bench, space = Bench(pick, report, asked, bootstrap), Space(pick.values(), report.values())
    answers = answers_as_json(probes(bench, space))
    numbers = number_probes(bench, space, least_positives)
    return {"answers": answers, "numbers": [{**one._asdict(), "r_squared": round(one.r_squared, 5)} for one in numbers]}


def _steps(source: TokenSource, other: TokenSource, steps: Sequence[int] | None) -> list[int]:
    there = sorted(set(source.steps) & set(other.steps))
    if steps is None:
        return there
    if absent := sorted(set(steps) - set(there)):
        raise FluxIRError(
            f"the steps to probe must have been collected: got {absent[0]}",
            hint=f"there are {', '.join(map(str, there))}",
        )
    return sorted(set(steps))


def _halves(labels: Labels, held_out: float) -> tuple[Labels, Labels]:
    """What to fit on and what to judge on: whole prompts, drawn by chance."""
    groups = labels.groups
    count = int(groups.max()) + 1
    if count < 2:
        raise FluxIRError("probes are judged on prompts they were not fitted on: got one prompt", hint="give --report")
    order = np.random.default_rng(0).permutation(count)
    told = np.isin(groups, order[: min(count - 1, max(1, round(held_out * count)))])
    return labels.chosen(~told), labels.chosen(told)


def table_of(result: dict[str, Any]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Names of the rows (sites), of the columns (a kind of label at a level and a step), and the mean of each cell."""
    sites = list(result["sites"])
    cells: dict[str, dict[str, list[float]]] = {site: {} for site in sites}
    for site, of_steps in result["sites"].items():
        for step, made in of_steps.items():
            for one in made["answers"]:
                what = {"interior": "inside", "any": "patch", "image": "picture"}[one["level"]]
                cells[site].setdefault(f"{one['kind']}, {what}, step {step}", []).append(one["auroc"])
            for one in made["numbers"]:
                cells[site].setdefault(f"{one['name']} (R^2), step {step}", []).append(one["r_squared"])
    columns = list(dict.fromkeys(column for site in sites for column in cells[site]))
    means = [
        [float(np.mean(cells[site][column])) if column in cells[site] else None for column in columns] for site in sites
    ]
    return sites, columns, means


def draw(path: Path, result: dict[str, Any]) -> None:
    """The table as a picture: sites across, labels and steps down."""
    sites, columns, means = table_of(result)
    turned = [[row[column] for row in means] for column in range(len(columns))]
    number_grid(path, columns, sites, turned, "What a linear probe reads", subtitle="mean AUROC", low=0.5, high=1.0)
