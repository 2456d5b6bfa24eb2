"""Does an autoencoder steer? Edits of flux-tiny's scenes with a known right answer: `steering_scores.json`.

For every concept a direction, a strength and a rule for the region are found on scenes of one set of captions, and
counted on fresh ones: a feature, a set of features, a mean difference, a neuron, random directions, each under the same
search. Every row is kept in a file of its own, named by a digest of all it depends on: the same call goes on.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.known_labels import JUDGED, MAX_TOKENS, kept_result
from flux_ir.api.model_settings import ModelSettings, as_captured
from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.api.steering_captures import SteeringCaptures
from flux_ir.errors import FluxIRError, nearest
from flux_ir.files import versions, write_json
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import Suite, TextEncoders
from flux_ir.models.text import TextEmbedding
from flux_ir.models.text.encoders import encode
from flux_ir.plots.grids import number_grid
from flux_ir.sae.files.formats import weights_file
from flux_ir.sites import Site
from flux_ir.steering.apply import Steering
from flux_ir.steering.dose import Painter, neuron_outputs, text_neuron_outputs, windows
from flux_ir.steering.regions import Grid
from flux_ir.studies.candidates import Candidates, DirectionRow
from flux_ir.studies.caption_words import CONCEPTS, ConceptKind
from flux_ir.studies.causal import Laboratory, Scenes, Trial, search
from flux_ir.tables import write_rows

SteeringRow = DirectionRow | Literal["ceiling"]
DIRECTION_ROWS: tuple[DirectionRow, ...] = get_args(DirectionRow)
ROWS: tuple[SteeringRow, ...] = (*DIRECTION_ROWS, "ceiling")
ROW_TITLES: dict[SteeringRow, str] = {
    "feature": "1 feature",
    "set": "set of 2 to 5",
    "swap": "swap",
    "mean_difference": "mean diff.",
    "mean_swap": "mean swap",
    "neuron": "neuron",
    "random": "random",
    "ceiling": "edited caption",
}
OF_FEATURES: tuple[DirectionRow, ...] = ("feature", "set", "swap")
RESULT, TABLE = "steering_scores.json", "steering_scores.csv"
DOSES = (0.25, 0.5, 1.0, 2.0)
"""Of the strength that the search found."""
BATCH = 16
"""Pictures made together: their last bits are others than alone, which no count feels."""
_FORMAT = 2  # of the kept rows: one that is computed in another way has another


@dataclass(frozen=True, kw_only=True)
class ScoreSteeringSettings:
    """The arguments of `score_steering`, which says what they mean. Raises FluxIRError for wrong ones."""

    sae: tuple[Path, ...]
    captures: str | Path
    kinds: tuple[ConceptKind, ...] = ("colour", "background", "shape", "place")
    concepts: tuple[str, ...] | None = None
    tasks: int = 200
    search_tasks: int = 24
    small_tasks: int = 40
    candidates: int = 12
    strength: tuple[float, ...] = (1.0, 2.0, 4.0)
    controls: int = 20
    seed: int = 0
    max_tokens: int = MAX_TOKENS
    name: str | None = None
    output_dir: Path = Path("steering_scores")
    device: str | None = None

    def __post_init__(self) -> None:
        check_words(ScoreSteeringSettings, {"kinds": self.kinds})
        check_least(vars(self))
        if not self.sae:
            raise FluxIRError("steering is scored of an autoencoder: got none", hint="--sae FOLDER names it")
        if not self.strength or not all(np.isfinite(self.strength)) or 0 in self.strength:
            raise FluxIRError(
                f"a search tries finite strengths other than 0: got {list(self.strength)}", hint="--strength 1,2,4"
            )
        known = [concept for kind in self.kinds for concept in CONCEPTS[kind]]
        for concept in self.concepts or ():
            if concept not in known:
                near = nearest(concept, known)
                raise FluxIRError(
                    f"the concepts of {', '.join(self.kinds)} are {', '.join(known)}: got {concept!r}",
                    hint=f"did you mean {near}?" if near else "leave --concepts out for all",
                )


@dataclass(frozen=True)
class ScoredSteering:
    """The result of one or several autoencoders of one model."""

    folder: Path
    result: dict[str, Any]
    """The content of steering_scores.json."""

    def joint(self, row: SteeringRow, kind: ConceptKind) -> dict[str, float]:
        """The share of scenes in which a row's edit succeeded, by concept."""
        return {concept: rows[row]["joint"] for concept, rows in self.result["kinds"][kind].items() if row in rows}


def score_steering(
    sae: str | Path | Sequence[str | Path],
    captures: str | Path,
    *,
    kinds: ConceptKind | Sequence[ConceptKind] = ("colour", "background", "shape", "place"),
    concepts: str | Sequence[str] | None = None,
    tasks: int = 200,
    search_tasks: int = 24,
    small_tasks: int = 40,
    candidates: int = 12,
    strength: float | Sequence[float] = (1.0, 2.0, 4.0),
    controls: int = 20,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    name: str | None = None,
    output_dir: str | Path = "steering_scores",
    device: str | None = None,
    progress: Watch = unwatched,
) -> ScoredSteering:
    """Score how often an edit of features puts a known thing into a scene and leaves all else as it was.

    For every concept of `kinds` (or those `concepts` alone) each row searches among its candidates, `strength`s and
    rules for the region on `search_tasks` scenes, and is counted on `tasks` scenes of other captions. `captures`, with
    pictures, is what features and mean differences are picked with: the `candidates` features that tell the concept
    best, sets of them, mean differences per step, as many neurons along these, and `controls` random directions as
    long. Several autoencoders are searched together. Doses, windows of steps and other concepts' features are counted
    on `small_tasks`. The result is `output_dir`/`name`/steering_scores.json.

    Raises FluxIRError for what a user can mend.
    """
    settings = ScoreSteeringSettings(
        sae=(Path(sae),) if isinstance(sae, str | Path) else tuple(map(Path, sae)),
        captures=captures,
        kinds=(kinds,) if isinstance(kinds, str) else tuple(kinds),
        concepts=(concepts,) if isinstance(concepts, str) else None if concepts is None else tuple(concepts),
        tasks=tasks,
        search_tasks=search_tasks,
        small_tasks=small_tasks,
        candidates=candidates,
        strength=(strength,) if isinstance(strength, int | float) else tuple(strength),
        controls=controls,
        seed=seed,
        max_tokens=max_tokens,
        name=name,
        output_dir=Path(output_dir),
        device=device,
    )
    with ExitStack() as stack:
        return _Scoring(settings, progress, stack).run()


class _Scoring:
    """One run: what there is to pick with, then every concept's rows, then the report."""

    def __init__(self, settings: ScoreSteeringSettings, progress: Watch, stack: ExitStack) -> None:
        self.settings, self.progress, self.stack = settings, progress, stack
        self.captures = SteeringCaptures(settings.captures, settings.output_dir / JUDGED, settings.max_tokens, progress)
        self.source, self.sampling = self.captures.source, self.captures.sampling
        self.model = as_captured(ModelSettings(model=self.source.model, device=settings.device), self.source)
        self.machine, self.spec = self.model.settle_machine(recorded=self.sampling.dtype), self.model.spec
        self.placement, self.dtype = self.machine.placement, self.machine.compute.dtype
        progress(Note(f"on {self.placement.transformer} ({self.placement.reason})"))
        device = torch.device(self.placement.transformer)
        self.subjects = [self.captures.subject(folder, device) for folder in settings.sae]
        first = settings.sae[0].resolve().name
        self.folder = settings.output_dir / (
            settings.name or (first if len(settings.sae) == 1 else f"{first}_and_more")
        )

    def run(self) -> ScoredSteering:
        """Every row of every concept; rows of earlier runs are read from their files."""
        settings = self.settings
        found: dict[ConceptKind, dict[str, Any]] = {}
        asked = [
            (kind, concept)
            for kind in settings.kinds
            for concept in CONCEPTS[kind]
            if settings.concepts is None or concept in settings.concepts
        ]
        for kind, concept in follow(self.progress, "concepts", asked, len(asked)):
            found.setdefault(kind, {})[concept] = self._concept(kind, concept)
        for kind, concept in follow(self.progress, "other concepts", asked, len(asked)):
            others = {other: rows for other, rows in found[kind].items() if other != concept}
            found[kind][concept]["others"] = self._others(kind, concept, others)
        result = {
            "format": _FORMAT,
            "model": self.spec.name,
            "autoencoders": [
                {"folder": one.folder.resolve().name, "site": str(one.site), "weights": weights}
                for one, weights in zip(self.subjects, self._weights, strict=True)
            ],
            "settings": self._described(),
            "kinds": found,
            "versions": versions("torch"),
        }
        for of, concepts in found.items():
            draw(self.folder, of, concepts)
        write_table(self.folder / TABLE, found)
        write_json(self.folder / RESULT, result)  # last: where it is, the pictures are
        return ScoredSteering(self.folder, result)

    # ---- One concept

    def _concept(self, kind: ConceptKind, concept: str) -> dict[str, Any]:
        """The rows of a concept, and the doses and windows of the better of its features and sets."""
        scenes = self._scenes(kind, concept)
        rows: dict[str, Any] = {}
        for row in DIRECTION_ROWS:
            rows[row] = self._kept(kind, concept, row, {}, partial(self._row, row, scenes))
        rows["ceiling"] = self._kept(kind, concept, "ceiling", {}, lambda: self._ceiling(scenes))
        best = max(OF_FEATURES, key=lambda row: rows[row]["found"])
        chosen = {"chosen": {name: rows[best][name] for name in ("candidate", "strength", "rule")}}
        rows["doses"] = self._kept(kind, concept, "doses", chosen, lambda: self._doses(scenes, rows[best]))
        rows["windows"] = self._kept(kind, concept, "windows", chosen, lambda: self._windows(scenes, rows[best]))
        looked = self._kept(kind, concept, "scenes", {}, lambda: scenes.looked)
        rows["scenes"] = {"used": self.settings.tasks, "looked_at": looked}
        return rows

    def _scenes(self, kind: ConceptKind, concept: str) -> Scenes:
        settings = self.settings
        return Scenes(
            lambda: self.laboratory,
            kind,
            concept,
            seed=settings.seed,
            to_search=settings.search_tasks,
            to_count=settings.tasks,
            few=settings.small_tasks,
        )

    def _ceiling(self, scenes: Scenes) -> dict[str, Any]:
        return {"found": None, "candidates": 0, **self.laboratory.ceiling(scenes.fresh).counted()}

    def _row(self, row: DirectionRow, scenes: Scenes) -> dict[str, Any]:
        candidates = self.candidates.of(row, scenes.kind, scenes.concept)
        trial, found = search(self.laboratory.outcomes, candidates, self.settings.strength, scenes.known)
        outcome = self.laboratory.outcomes(scenes.fresh, [trial])[0]
        chosen = {"candidate": trial.candidate.name, "strength": trial.strength, "rule": trial.rule}
        return {"found": round(found, 4), "candidates": len(candidates), **chosen, **outcome.counted()}

    def _trial(self, row: Mapping[str, Any], kind: ConceptKind, concept: str) -> Trial:
        """The trial that a row has kept."""
        for name in OF_FEATURES:
            for candidate in self.candidates.of(name, kind, concept):
                if candidate.name == row["candidate"] and row["rule"] in candidate.rules:
                    return Trial(candidate, row["strength"], row["rule"])
        raise ValueError(f"no candidate is called {row['candidate']}")

    def _doses(self, scenes: Scenes, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        trial = self._trial(row, scenes.kind, scenes.concept)
        trials = [trial._replace(strength=share * trial.strength) for share in DOSES]
        found = self.laboratory.outcomes(scenes.few, trials)
        return [{"strength": one.strength, **outcome.counted()} for one, outcome in zip(trials, found, strict=True)]

    def _windows(self, scenes: Scenes, row: Mapping[str, Any]) -> dict[str, Any]:
        trial, steps = self._trial(row, scenes.kind, scenes.concept), len(self.sampling.timesteps) - 1
        subject = next(one for one in self.subjects if one.folder == trial.candidate.edits[0].sae)
        if subject.site.per_prompt:
            return {}  # a prompt is encoded once: no step
        return {
            name: self.laboratory.outcomes(scenes.few, [trial], list(some))[0].counted()
            for name, some in windows(steps).items()
        }

    def _others(self, kind: ConceptKind, concept: str, others: Mapping[str, Any]) -> dict[str, float]:
        """How often the features of other concepts put this one there: by their concept."""
        scenes = self._scenes(kind, concept)
        shares = {}
        for other, rows in others.items():
            row = rows["feature"]
            chosen = {name: row[name] for name in ("candidate", "strength", "rule")}

            def count(other: str = other, row: Mapping[str, Any] = row) -> float:
                trial = self._trial(row, kind, other)
                return float(self.laboratory.outcomes(scenes.few, [trial])[0].joint.mean())

            shares[other] = self._kept(kind, concept, "other", {"other": other, "chosen": chosen}, count)
        return shares

    @cached_property
    def candidates(self) -> Candidates:
        """What a search has to choose from."""
        settings, captures = self.settings, self.captures
        return Candidates(
            captures.of_site,
            captures.labels,
            self.subjects,
            settings.candidates,
            settings.controls,
            self._neuron_outputs,
        )

    # ---- The model, loaded when the first picture is made

    @cached_property
    def laboratory(self) -> Laboratory:
        """What edits are tried with."""
        sampling = self.sampling
        autoencoder = self.stack.enter_context(self._suite.autoencoder())
        grid = Grid(sampling.width, sampling.height)
        painter = Painter(
            self._model,
            autoencoder,
            grid,
            sampling.timesteps,
            sampling.guidance,
            self.dtype,
            meter=None,
            batch=BATCH,
            cpu_batch=BATCH,
        )
        steering = Steering(
            (),
            self.spec,
            grid=grid,
            num_steps=len(sampling.timesteps) - 1,
            txt_tokens=self._plain(sampling.prompt).txt.shape[1],
            device=self.placement.transformer,
        )
        return Laboratory(painter, steering, self._encode)

    @cached_property
    def _suite(self) -> Suite:
        return self.model.suite(self.machine, self.progress)

    @cached_property
    def _model(self) -> Transformer:
        return self.stack.enter_context(self._suite.transformer())

    @cached_property
    def _encoders(self) -> TextEncoders:
        return self.stack.enter_context(self._suite.text_encoders())

    @cached_property
    def _plain(self) -> Callable[[str], TextEmbedding]:
        return cache(lambda caption: encode(self._encoders.t5, self._encoders.clip, [caption]))

    def _encode(self, caption: str, steering: Steering | None) -> TextEmbedding:
        """The embedding of a caption; with edits of the text encoders it is not kept."""
        if steering is None:
            return self._plain(caption)
        with steering.during_text(self._encoders):
            return encode(self._encoders.t5, self._encoders.clip, [caption])

    @torch.no_grad()
    def _neuron_outputs(self, site: Site) -> Float[Tensor, "d neurons"]:
        """Of the transformer under the conditioning of the first caption at the middle of the schedule."""
        if site.per_prompt:
            return text_neuron_outputs(self._encoders, site)
        times, device = self.sampling.timesteps, self._model.img_in.weight.device
        time, guidance = (
            torch.tensor([value], device=device, dtype=self.dtype)
            for value in (times[(len(times) - 1) // 2], self.sampling.guidance)
        )
        y = self._plain(self.sampling.prompt).y.to(device, self.dtype)
        return neuron_outputs(self._model, site, self._model.conditioning(time, y, guidance))

    # ---- What a kept row depends on

    def _kept(self, kind: ConceptKind, concept: str, row: str, more: dict[str, Any], count: Callable[[], Any]) -> Any:
        """A row from the file of an earlier run, or counted and kept."""
        key = {
            "format": _FORMAT,
            "kind": kind,
            "concept": concept,
            "row": row,
            "captures": self.source.identity,
            "autoencoders": self._weights,
            "settings": self._described(),
            "device": torch.device(self.placement.transformer).type,
            **more,
        }
        return kept_result(self.settings.output_dir, f"{row}_{concept.replace(' ', '_')}", key, count)

    @cached_property
    def _weights(self) -> list[str]:
        return [hashlib.sha256(weights_file(f).read_bytes()).hexdigest()[:16] for f in self.settings.sae]

    def _described(self) -> dict[str, Any]:
        """The settings that a row depends on."""
        names = ("tasks", "search_tasks", "small_tasks", "candidates", "controls", "seed", "max_tokens")
        return {name: getattr(self.settings, name) for name in names} | {"strength": list(self.settings.strength)}


# ---- The report


def draw(folder: Path, kind: ConceptKind, concepts: Mapping[str, Mapping[str, Any]]) -> None:
    """Two grids of a kind of concept: rows by concept, and concepts by the concept whose feature was used."""
    names = list(concepts)
    joint = [[concepts[name][row]["joint"] for row in ROWS] for name in names]
    titles = [ROW_TITLES[row] for row in ROWS]
    subtitle = "share of scenes where only what was asked for changed"
    number_grid(folder / f"{kind}.png", names, titles, joint, kind, subtitle=subtitle, low=0.0, high=1.0)
    others = [
        [concepts[name]["feature"]["joint"] if of == name else concepts[name]["others"].get(of) for of in names]
        for name in names
    ]
    subtitle = "down: what is asked for; across: whose feature is used"
    number_grid(folder / f"{kind}_others.png", names, names, others, kind, subtitle=subtitle, low=0.0, high=1.0)


def write_table(path: Path, kinds: Mapping[ConceptKind, Mapping[str, Mapping[str, Any]]]) -> None:
    """A line per concept and row."""
    columns = ("joint", "low", "high", "changed", "kept", "tasks", "found", "candidate", "strength", "rule")
    rows = []
    for kind, concepts in kinds.items():
        for concept, found in concepts.items():
            for row in ROWS:
                low, high = found[row]["interval"]
                numbers = {**found[row], "low": low, "high": high}
                rows.append({"kind": kind, "concept": concept, "row": row} | {c: numbers.get(c) for c in columns})
    write_rows(path, rows)
