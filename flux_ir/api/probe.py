"""Which site and step know what: a linear probe for every label at every site and step, on prompts not fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flux_ir.activations.blocks import TokenSource
from flux_ir.activations.source import open_source
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.known_labels import JUDGED, MAX_TOKENS, kept_result, labels_of
from flux_ir.api.progress import Watch, follow, unwatched
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import versions, write_json
from flux_ir.plots.grids import number_grid
from flux_ir.sae.data.filters import choose_sites
from flux_ir.sites import Site, SiteNames, site_names
from flux_ir.studies.concepts import LEAST_POSITIVES, answers_as_json, askable
from flux_ir.studies.label_files import LabelFile, read_label_file
from flux_ir.studies.labelled_tokens import LabelledTokens
from flux_ir.studies.labels import Labels, Level, check_sources_apart
from flux_ir.studies.rows import Bench, Space, number_probes, probes

RESULT = "probes.json"
_FORMAT = 1  # of the kept results: one that is computed in another way has another


@dataclass(frozen=True)
class Probed:
    """The result of all probes."""

    folder: Path
    result: dict[str, Any]
    """The content of probes.json."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What every probe depends on, besides the activations and their labels. Raises FluxIRError for wrong numbers."""

    levels: tuple[Level, ...]
    held_out: float
    least_positives: int
    bootstrap: int
    max_tokens: int

    def __post_init__(self) -> None:
        check_words(ProbeSettings, {"levels": self.levels})
        check_least(vars(self))
        if not 0 < self.held_out < 1:
            raise FluxIRError(
                f"--held_out must be between 0 and 1: got {self.held_out}", hint="pass 0.3 for three tenths"
            )


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
    settings = ProbeSettings(
        levels=(levels,) if isinstance(levels, str) else tuple(levels),
        held_out=held_out,
        least_positives=least_positives,
        bootstrap=bootstrap,
        max_tokens=max_tokens,
    )
    file = None if labels is None else read_label_file(Path(labels))
    data = _read_data(captures, report, sites, steps, file, Path(output_dir) / JUDGED, settings, progress)
    described = _described(settings, data, file)
    found: dict[str, dict[str, Any]] = {}
    sites_and_steps = [(site, step) for site in data.sites for step in data.steps]
    for site, step in follow(progress, "probe", sites_and_steps, total=len(sites_and_steps)):
        fit_on = LabelledTokens(data.sources[0], data.labels[0], site, step)
        judge_on = LabelledTokens(data.sources[1], data.labels[1], site, step)
        found.setdefault(str(site), {})[str(step)] = _probed(fit_on, judge_on, settings, described, Path(output_dir))
    _check_some(found, least_positives)
    folder = Path(output_dir) / (Path(str(captures)).resolve().name if name is None else name)
    result = {"settings": described, "sets": _sizes(data.labels), "sites": found, "versions": versions("torch")}
    write_json(folder / RESULT, result)
    draw(folder / "probes.png", result)
    return Probed(folder, result)


# ---- The data


class _Data(NamedTuple):
    """The two sets, first the one probes are fitted on and then the one they are judged on; their sites and steps."""

    sources: tuple[TokenSource, TokenSource]
    labels: tuple[Labels, Labels]
    has_report: bool
    """Whether the second is a collection of its own; else it is the held-out prompts of the first."""
    sites: Sequence[Site | None]
    steps: Sequence[int]


def _read_data(
    captures: str | Path,
    report: str | Path | None,
    sites: SiteNames | None,
    steps: Sequence[int] | None,
    file: LabelFile | None,
    judged_folder: Path,
    settings: ProbeSettings,
    progress: Watch,
) -> _Data:
    source = open_source(captures)
    other = source if report is None else open_source(report)
    if report is not None:
        check_sources_apart((str(captures), source), (str(report), other))
    chosen = choose_sites(source, ["*"] if sites is None else list(site_names(sites)))
    at_steps = _steps(source, other, steps)
    max_tokens = settings.max_tokens
    labels = labels_of(source, "pick", file, judged_folder, max_tokens, chosen[0], progress)
    if report is None:
        both = _halves(labels, settings.held_out)
    else:
        both = labels, labels_of(other, "report", file, judged_folder, max_tokens, chosen[0], progress)
    return _Data((source, other), both, report is not None, chosen, at_steps)


def _steps(source: TokenSource, other: TokenSource, steps: Sequence[int] | None) -> list[int]:
    both = sorted(set(source.steps) & set(other.steps))
    if steps is None:
        return both
    if absent := sorted(set(steps) - set(both)):
        raise FluxIRError(
            f"the steps to probe must have been collected: got {absent[0]}",
            hint=f"there are {', '.join(map(str, both))}",
        )
    return sorted(set(steps))


def _halves(labels: Labels, held_out: float) -> tuple[Labels, Labels]:
    """The labels to fit on and those to judge on: whole prompts, drawn at random, always with the same seed."""
    groups = labels.groups
    count = int(groups.max()) + 1
    if count < 2:
        raise FluxIRError("probes are judged on prompts they were not fitted on: got one prompt", hint="give --report")
    order = np.random.default_rng(0).permutation(count)
    is_held_out = np.isin(groups, order[: min(count - 1, max(1, round(held_out * count)))])
    return labels.chosen(~is_held_out), labels.chosen(is_held_out)


# ---- One site and step


def _probed(
    fit_on: LabelledTokens,
    judge_on: LabelledTokens,
    settings: ProbeSettings,
    described: dict[str, Any],
    output_dir: Path,
) -> dict[str, Any]:
    """The probes of all labels at one site and step, from the file of an earlier run if there is one."""
    key = described | {"site": str(fit_on.site), "step": fit_on.step}
    if any(tokens.used is not None for tokens in (fit_on, judge_on)):
        key["padding"] = "left out"  # results of earlier versions, which read it, have keys without this word

    def fit() -> dict[str, Any]:
        asked = [
            task
            for task in askable(fit_on, judge_on, settings.least_positives)
            if task.negatives == "all" and task.question.level in settings.levels
        ]
        bench, space = (
            Bench(fit_on, judge_on, asked, settings.bootstrap),
            Space(fit_on.values(), judge_on.values()),
        )
        answers = answers_as_json(probes(bench, space))
        numbers = number_probes(bench, space, settings.least_positives)
        rounded = [{**one._asdict(), "r_squared": round(one.r_squared, 5)} for one in numbers]
        return {"answers": answers, "numbers": rounded}

    return kept_result(output_dir, f"probe_step_{fit_on.step}", key, fit)


# ---- The report


def _described(settings: ProbeSettings, data: _Data, file: LabelFile | None) -> dict[str, Any]:
    """The settings as probes.json has them: all that a result depends on besides its site and step."""
    return {
        "format": _FORMAT,
        "sets": [source.identity for source in data.sources],
        "labels": "judged" if file is None else file.digest,
        "levels": list(settings.levels),
        "held_out": None if data.has_report else settings.held_out,
        "least_positives": settings.least_positives,
        "bootstrap": settings.bootstrap,
        "max_tokens": settings.max_tokens,
    }


def _check_some(found: dict[str, dict[str, Any]], least_positives: int) -> None:
    """Raises FluxIRError if no label could be probed anywhere."""
    if not any(result["answers"] or result["numbers"] for of_steps in found.values() for result in of_steps.values()):
        raise FluxIRError(
            f"no label has {counted(least_positives, 'positive')} to judge on and half as many to fit on",
            hint="label more pictures, or lower --least_positives",
        )


def _sizes(labels: tuple[Labels, Labels]) -> dict[str, dict[str, int]]:
    return {
        name: {"pictures": len(one.images), "prompts": len(set(one.prompts))}
        for name, one in zip(("pick", "report"), labels, strict=True)
    }


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
