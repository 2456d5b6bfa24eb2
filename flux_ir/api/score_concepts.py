"""How well single features tell concepts whose presence is known: `concepts.json`, a table and a picture.

Every row of every step is a file of its own, named by a digest of all it depends on, so that a run that was stopped
goes on, and rows that do not depend on the autoencoder are made once for all that read one site.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.blocks import SampledSource, TokenSource
from flux_ir.activations.source import open_source
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.evaluate_sae import load_for
from flux_ir.api.known_labels import JUDGED, MAX_TOKENS, kept_result, labels_of
from flux_ir.api.model_settings import ModelSettings, as_captured
from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.api.score_features import folder_path
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import versions, write_json
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.plots.grids import number_grid
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.held_out import evaluation_data_of, filters_of
from flux_ir.sae.files.formats import weights_file
from flux_ir.sites import Site
from flux_ir.studies.concepts import (
    LEAST_POSITIVES,
    OF_THE_SAE,
    ROW_TITLES,
    ROWS,
    Readers,
    RowName,
    answers_as_json,
    askable,
    null_as_json,
    questions_as_json,
)
from flux_ir.studies.label_files import read_label_file
from flux_ir.studies.labelled_tokens import (
    LabelledTokens,
    has_neurons,
    neurons_site,
    run_neurons,
    stored_neurons,
)
from flux_ir.studies.labels import Labels, Level, Negatives, check_sources_apart
from flux_ir.studies.rows import Bench

RESULT = "concepts.json"
_FORMAT = 1  # of the kept rows: one that is computed in another way has another
NOTES = (
    "a relation implies no place: pictures of two objects are asked about no place",
    "the opposite relation draws the same pictures, so an image token can tell the two only by a trace of the caption",
    "hard negatives: of patches those of other objects (of other backgrounds), of pictures those of two objects",
    "a picture's number is that of its largest token; the probe of a picture reads mean, maximum and minimum",
    "padding of the text is left out of all of these",
    "intervals are draws of prompts, with all their pictures, and the null permutes whole prompts",
)


@dataclass(frozen=True, kw_only=True)
class ScoreConceptsSettings:
    """The arguments of `score_concepts`, which says what they mean."""

    sae: Path
    captures: str | Path
    report: str | Path
    site: str | None = None
    steps: tuple[int, ...] | None = None
    labels: Path | None = None
    rows: tuple[RowName, ...] | None = None
    null: int = 200
    bootstrap: int = 200
    least_positives: int = LEAST_POSITIVES
    max_tokens: int = MAX_TOKENS
    run_model: bool = False
    name: str | None = None
    output_dir: Path = Path("concepts")
    device: str | None = None

    def __post_init__(self) -> None:
        check_words(ScoreConceptsSettings, vars(self))
        check_least(vars(self))


@dataclass(frozen=True)
class ScoredConcepts:
    """The result of one autoencoder."""

    folder: Path
    result: dict[str, Any]
    """The content of concepts.json."""

    def auroc(self, row: RowName, step: int, **words: str) -> list[float]:
        """The AUROC of a row's concepts at a step, of those that have all these `words`: kind, concept, level, ..."""
        answers = self.result["steps"][str(step)][row]["answers"]
        return [one["auroc"] for one in answers if all(one[key] == word for key, word in words.items())]


def score_concepts(
    sae: str | Path,
    captures: str | Path,
    report: str | Path,
    *,
    site: str | Site | None = None,
    steps: Sequence[int] | None = None,
    labels: str | Path | None = None,
    rows: RowName | Sequence[RowName] | None = None,
    null: int = 200,
    bootstrap: int = 200,
    least_positives: int = LEAST_POSITIVES,
    max_tokens: int = MAX_TOKENS,
    run_model: bool = False,
    name: str | None = None,
    output_dir: str | Path = "concepts",
    device: str | None = None,
    progress: Watch = unwatched,
) -> ScoredConcepts:
    """Score how well the best feature of each concept tells it, beside what else could be read in the same way.

    Everything that is picked (feature, sign, threshold, penalty) is picked on `captures` and reported on `report`, two
    collections without a common prompt. The labels are those of flux-tiny's captions, as the judge finds the objects
    on the generated pictures; `labels` are those of any other pictures: a .csv or .jsonl with a row per picture, or a
    folder of masks.

    `rows` are what is compared (None: all), `null` how often the pick is repeated under permuted label maps, and
    `bootstrap` how many draws an interval is made of. Under `least_positives` to report on there is no number. Of
    larger collections whole prompts are drawn until there are `max_tokens` tokens. With `run_model` the neurons are
    computed by the model where they were not collected. The result is `output_dir`/`name`/concepts.json.

    Raises FluxIRError for what a user can mend.
    """
    settings = ScoreConceptsSettings(
        sae=Path(sae),
        captures=captures,
        report=report,
        site=None if site is None else str(site),
        steps=None if steps is None else tuple(steps),
        labels=None if labels is None else Path(labels),
        rows=(rows,) if isinstance(rows, str) else None if rows is None else tuple(rows),
        null=null,
        bootstrap=bootstrap,
        least_positives=least_positives,
        max_tokens=max_tokens,
        run_model=run_model,
        name=name,
        output_dir=Path(output_dir),
        device=device,
    )
    return _ConceptScoring(settings, progress).run()


class _ConceptScoring:
    """One run: the data and their labels, then the rows of every step, then the report."""

    def __init__(self, settings: ScoreConceptsSettings, progress: Watch) -> None:
        self.settings, self.progress = settings, progress
        self.folder = folder_path(settings.sae, settings.name, settings.output_dir)
        self.sources = {"pick": open_source(settings.captures), "report": open_source(settings.report)}
        pick, report = self.sources.values()
        check_sources_apart((str(settings.captures), pick), (str(settings.report), report))
        placement = plan(torch.cuda.device_count(), device=settings.device)
        progress(Note(f"on {placement.transformer} ({placement.reason})"))
        self.placement = placement
        loaded = load_for(settings.sae, self.sources["pick"], settings.site, progress)
        subjects = {name: evaluation_data_of(loaded, source, held_out=0.0) for name, source in self.sources.items()}
        self.site = subjects["pick"].site
        self.steps = self._steps(loaded)
        self.sae = loaded.folded().requires_grad_(False).to(torch.device(placement.transformer))
        self.weights = hashlib.sha256(weights_file(settings.sae).read_bytes()).hexdigest()[:16]
        self.file = None if settings.labels is None else read_label_file(settings.labels)

    def run(self) -> ScoredConcepts:
        """Every row at every step; rows of earlier runs are read from their files."""
        labels = {name: self._labels(name, source) for name, source in self.sources.items()}
        steps, questions = dict[str, Any](), list[dict[str, Any]]()
        for step in self.steps:
            pick, report = (
                LabelledTokens(self.sources[name], labels[name], self.site, step) for name in ("pick", "report")
            )
            asked = askable(pick, report, self.settings.least_positives)
            questions = questions_as_json(
                pick, report, asked
            )  # the same at every step: labels are of pictures, not of steps
            if not asked:
                raise FluxIRError(
                    f"no concept has {counted(self.settings.least_positives, 'positive')} to report on and half as "
                    "many to pick with",
                    hint="collect more pictures, or lower --least_positives",
                )
            steps[str(step)] = self._rows(Bench(pick, report, asked, self.settings.bootstrap))
        result = {
            "format": _FORMAT,
            "sae": {**self.sae.config.to_dict(), "folder": self.settings.sae.resolve().name, "weights": self.weights},
            "site": None if self.site is None else str(self.site),
            "model": self.sources["pick"].model,
            "settings": self._described(),
            "sets": {name: self._set(name, labels[name]) for name in labels},
            "notes": list(NOTES),
            "questions": questions,
            "steps": steps,
            "versions": versions("torch"),
        }
        for at, rows in steps.items():
            if rows:
                draw(self.folder / f"concepts_step_{at}.png", rows, f"{self.folder.name}, {result['site']}, step {at}")
        write_json(self.folder / RESULT, result)  # last: where it is, the pictures are
        return ScoredConcepts(self.folder, result)

    def _steps(self, sae: SparseAutoencoder) -> list[int]:
        """The steps to score at. Raises FluxIRError for one that a collection does not have."""
        if self.settings.steps is None:
            pick, report = (set(filters_of(sae, source).steps_of(source.steps)) for source in self.sources.values())
            return sorted(pick & report)
        for source in self.sources.values():
            if absent := sorted(set(self.settings.steps) - set(source.steps)):
                raise FluxIRError(
                    f"the steps to score at must have been collected: got {absent[0]}",
                    hint=f"{source.generations[0].path} has {', '.join(map(str, source.steps))}",
                )
        return sorted(set(self.settings.steps))

    def _labels(self, name: str, source: TokenSource) -> Labels:
        """The labels of a set, of as many pictures as `max_tokens` allows; labels that are numbers are noted."""
        judged = self.settings.output_dir / JUDGED
        labels = labels_of(source, name, self.file, judged, self.settings.max_tokens, self.site, self.progress)
        if labels.numbers:
            self.progress(Note(f"note: numbers are for flux-ir probe: {', '.join(labels.numbers)} left out"))
        return labels

    def _rows(self, bench: Bench) -> dict[str, Any]:
        """The rows of one step, by name; a note says why others are not there."""
        settings, step = self.settings, bench.pick.step
        readers = Readers(bench, self.sae, self._neurons(bench), settings.null, self._neuron_count(bench))
        found: dict[str, Any] = {}
        names = [row for row in ROWS if settings.rows is None or row in settings.rows]
        missing = {row: why for row, why in readers.available().items() if why is not None and row in names}
        for why in dict.fromkeys(missing.values()):
            rows = [row for row in missing if missing[row] == why]
            self.progress(Note(f"note: without {', '.join(rows)} at step {step}: {why}"))
        for row in names:
            if row not in missing:
                found[row] = self._row(readers, row, step)
        return found

    def _row(self, readers: Readers, row: RowName, step: int) -> dict[str, Any]:
        """One row, from the file of an earlier run if there is one."""

        def read() -> dict[str, Any]:
            stage = f"{row}, step {step}"
            if row == "null":
                drawn = readers.null(lambda draws: follow(self.progress, stage, draws, len(draws)))
                found: dict[str, Any] = {"draws": self.settings.null, "answers": null_as_json(drawn)}
            else:
                total = len(readers.bench.tasks)
                found = {"answers": answers_as_json(follow(self.progress, stage, readers.row(row), total))}
            return {"candidates": readers.candidates(row), **found}

        key = self._key(readers, row, step)
        return kept_result(self.settings.output_dir, f"{row}_step_{step}", key, read)

    def _key(self, readers: Readers, row: RowName, step: int) -> dict[str, Any]:
        """All that a row depends on; the autoencoder is not among it for rows that do not read its features."""
        settings, bench = self.settings, readers.bench
        key: dict[str, Any] = {
            "format": _FORMAT,
            "row": row,
            "sets": [source.identity for source in self.sources.values()],
            "labels": "judged" if self.file is None else self.file.digest,
            "site": str(bench.pick.site),
            "step": step,
            "bootstrap": settings.bootstrap,
            "least_positives": settings.least_positives,
            "max_tokens": settings.max_tokens,
            "device": self.placement.transformer.split(":")[0],
            "asked": len(bench.tasks),
        }
        if any(part.used is not None for part in (bench.pick, bench.report)):
            key["padding"] = "left out"
        if row in OF_THE_SAE:
            key["sae"] = self.weights
        elif row in ("untrained", "random"):
            key["features"] = self.sae.config.d_sae
        if row in ("sae", "untrained"):
            key["fewer"] = list(readers.fewer)
        if row == "untrained":
            key["k"] = readers.k
        if row == "null":
            key["null"] = settings.null
        if row == "neurons":
            key["stored"] = has_neurons(bench.pick) and has_neurons(bench.report)
        return key

    def _neuron_count(self, bench: Bench) -> int | None:
        """How many neurons the row `neurons` picks from; None without this row."""
        source, site = bench.pick.source, neurons_site(bench.pick)
        if has_neurons(bench.pick) and has_neurons(bench.report):
            return source.d(site)
        if not self.settings.run_model or site is None or source.model is None:
            return None
        params = get_spec(source.model).flux
        return int(params.hidden_size * params.mlp_ratio)

    def _neurons(self, bench: Bench) -> Callable[[LabelledTokens], Tensor] | None:
        """A function that gives neurons: as they were collected, or by the model if it may be run; None for neither."""
        if has_neurons(bench.pick) and has_neurons(bench.report):
            return stored_neurons
        if not self.settings.run_model or bench.pick.site is None:
            return None
        source = bench.pick.source
        if source.model is None or not isinstance(source, SampledSource):
            raise FluxIRError(
                "the model is run again for what flux-ir collect made: these captures do not say how they were made",
                hint="leave --run_model out",
            )
        model = as_captured(ModelSettings(model=source.model, device=self.settings.device), source)
        machine = model.settle_machine(recorded=source.sampling(0).dtype)
        suite = model.suite(machine, self.progress, autoencoder=False)
        return lambda part: run_neurons(part, suite)

    def _set(self, name: str, labels: Labels) -> dict[str, Any]:
        source = self.sources[name]
        return {
            "captures": Path(str(self.settings.captures if name == "pick" else self.settings.report)).name,
            "identity": source.identity,
            "generations": len(source.generations),
            "pictures": len(labels.images),
            "prompts": len(set(labels.prompts)),
            "left_out": {reason: count for reason, count in labels.dropped.items() if count},
        }

    def _described(self) -> dict[str, Any]:
        names = ("null", "bootstrap", "least_positives", "max_tokens", "run_model")
        described = {name: getattr(self.settings, name) for name in names}
        return described | {
            "labels": "the judge of flux-tiny's pictures" if self.file is None else self.file.path.name,
            "device": self.placement.transformer.split(":")[0],
        }


class MeanRow(NamedTuple):
    """The mean over the concepts of one kind, at one level and against one kind of negatives."""

    kind: str
    level: Level
    negatives: Negatives
    concepts: int
    aurocs: dict[RowName, float]
    recalls: dict[RowName, float]
    """At 95 % precision where the threshold was picked; the null has none."""
    of_fewer: dict[int, float]
    """The expected AUROC of the best of fewer features, by how many: as many as other readers pick from."""


def mean_rows(rows: Mapping[RowName, Any]) -> list[MeanRow]:
    """The means of a step's rows, for each kind, level and kind of negatives."""
    groups: dict[tuple[Any, Any, Any], dict[Any, list[float]]] = {}
    recalls: dict[tuple[Any, Any, Any], dict[RowName, list[float]]] = {}
    for row, answered in rows.items():
        for one in answered["answers"]:
            words = one["kind"], one["level"], one["negatives"]
            group = groups.setdefault(words, {})
            group.setdefault(row, []).append(one["auroc"])
            if "recall" in one:
                recalls.setdefault(words, {}).setdefault(row, []).append(one["recall"])
            for count, expected in (one.get("chosen", {}).get("expected_of_fewer", {}) if row == "sae" else {}).items():
                group.setdefault(int(count), []).append(expected)
    means_of = list[MeanRow]()
    for words, of_rows in groups.items():
        means = {row: sum(each) / len(each) for row, each in of_rows.items()}
        of_fewer = {count: means.pop(count) for count in list(means) if isinstance(count, int)}
        recall = {row: sum(each) / len(each) for row, each in recalls.get(words, {}).items()}
        means_of.append(MeanRow(*words, max(map(len, of_rows.values())), means, recall, of_fewer))
    return means_of


LEVEL_WORDS: dict[str, str] = {"interior": "inside", "any": "any patch", "image": "picture"}
NEGATIVES_WORDS: dict[str, str] = {"all": "all others", "hard": "hard ones"}


def draw(path: Path, rows: Mapping[RowName, Any], subtitle: str) -> None:
    """The means as a picture: readers across, kinds of concepts down."""
    means = mean_rows(rows)
    names = [f"{one.kind}, {LEVEL_WORDS[one.level]}, {NEGATIVES_WORDS[one.negatives]}" for one in means]
    values = [[one.aurocs.get(row) for row in rows] for one in means]
    titles = [ROW_TITLES[row] for row in rows]
    number_grid(path, names, titles, values, "Mean AUROC over concepts", subtitle=subtitle, low=0.5, high=1.0)
