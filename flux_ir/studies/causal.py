"""Known answers, causally: does an edit put one thing into a scene, and leave everything else as it was?

A task asks for one change of a scene that flux-tiny drew right: another colour, shape or place of one object, or
another background. It succeeds jointly: the thing is as asked, *and* all else that the judge knows is as before (the
background, the number of objects, and colour, shape, size, place or relation of each). One edit is one direction, one
strength and one rule for its region, the same for all tasks of a concept: found on one set of scenes by `search`,
reported on another. The region of image tokens comes from the unsteered picture, whose objects the judge has found;
that of text tokens from the caption.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, product
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binomtest

from flux_ir.demo.captions import CaptionPart, part_of
from flux_ir.demo.judge import Verdict, compare, find_objects, match_objects
from flux_ir.demo.scenes import Scene, parse_caption, scene_at
from flux_ir.errors import FluxIRError
from flux_ir.models.text import TextEmbedding
from flux_ir.steering.apply import Steering
from flux_ir.steering.dose import Painter, Variant
from flux_ir.steering.edits import Edit
from flux_ir.steering.regions import Region
from flux_ir.studies.caption_words import ConceptKind, words_of
from flux_ir.studies.judged import PATCH_PX, covered_px
from flux_ir.studies.labels import TextLevel

PICK: CaptionPart = "A"  # no caption is in two parts
REPORT: CaptionPart = "C"
RegionRule = Literal["mask", "wide", "all"] | TextLevel
"""Of the image: mask: patches of which the object covers a part; wide: these and their neighbours; all: every patch. Of
a background: patches that no object covers whole; those that no object touches; every patch. A move has no region. Of
the text: `caption_words.TEXT_LEVELS`."""


class EditingTask(NamedTuple):
    """One change of one scene."""

    kind: ConceptKind
    concept: str
    scene: Scene
    target: Scene
    thing: int | None
    """The object that is to change; None: the background is."""
    seed: int
    """Of the noise."""


class Ready(NamedTuple):
    """A task whose unsteered picture is right, and which patches are the objects'."""

    task: EditingTask
    cover: Float[np.ndarray, "objects patches"]
    """The share of each patch that each object of the caption covers in the unsteered picture."""


def editing_tasks(kind: ConceptKind, concept: str, part: CaptionPart, seed: int) -> Iterator[EditingTask]:
    """Endless tasks for a concept, from captions of one part that do not name it; no caption comes twice."""
    seen: set[str] = set()
    for index in count():
        scene = parse_caption(scene_at(seed, index).caption)  # without jitter: only the caption is known of a picture
        if scene.caption in seen or part_of(scene.caption) != part:
            continue
        seen.add(scene.caption)
        things = scene.things
        number = None if kind == "background" else index % len(things)
        if kind == "place" and scene.relation is not None:
            continue  # a relation names no place
        named = [scene.background] if number is None else [getattr(thing, kind) for thing in things]
        if concept not in named:
            yield EditingTask(kind, concept, scene, _changed(scene, kind, concept, number), number, index)


def _changed(scene: Scene, kind: ConceptKind, concept: str, number: int | None) -> Scene:
    if number is None:
        return replace(scene, background=concept)
    things = list(scene.things)
    changed: dict[str, Any] = {kind: concept}
    things[number] = replace(things[number], **changed)
    return replace(scene, things=tuple(things))


class Outcome(NamedTuple):
    """What a picture came to: one task, or arrays of many."""

    changed: Bool[np.ndarray, "*tasks"]
    """The thing is as asked."""
    kept: Bool[np.ndarray, "*tasks"]
    """All else is as before."""

    @property
    def joint(self) -> Bool[np.ndarray, "*tasks"]:
        """Success: both."""
        return np.asarray(self.changed & self.kept)  # of one task it would be a number

    def counted(self) -> dict[str, Any]:
        """Shares of tasks; the interval of the joint one is Wilson's, 95 %."""
        joint = self.joint
        low, high = binomtest(int(joint.sum()), len(joint)).proportion_ci(method="wilson")
        return {
            "tasks": len(joint),
            "joint": round(float(joint.mean()), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
            "changed": round(float(self.changed.mean()), 4),
            "kept": round(float(self.kept.mean()), 4),
        }


def outcome(picture: np.ndarray, task: EditingTask) -> Outcome:
    """What the judge says of a steered picture, uint8 [side, side, 3]."""
    answers = answers_of(compare(find_objects(picture)[0], task.target))
    asked = answers.pop((task.thing, task.kind))
    return Outcome(np.array(asked), np.array(all(answers.values())))


def answers_of(verdict: Verdict) -> dict[tuple[int | None, str], bool]:
    """Every answer that the scene asks for: by the number of the object (None: of the picture) and the aspect."""
    given: dict[tuple[int | None, str], bool | None] = {
        (None, "background"): verdict.background,
        (None, "number"): verdict.number,
        (None, "relation"): verdict.relation,
    }
    for number, found in enumerate(verdict.objects):
        given |= {(number, aspect): right for aspect, right in found._asdict().items()}
    return {question: right for question, right in given.items() if right is not None}


def ready_task(task: EditingTask, picture: np.ndarray) -> Ready | None:
    """The task with the patches of its objects; None where the unsteered picture is not what its caption says."""
    sight, masks = find_objects(picture)
    if not all(answers_of(compare(sight, task.scene)).values()):
        return None
    ordered = np.stack([masks[found] for found in match_objects(sight.objects, task.scene) if found is not None])
    return Ready(task, (covered_px(ordered) / PATCH_PX**2).astype(np.float64))


def image_rules(kind: ConceptKind) -> tuple[RegionRule, ...]:
    """The rules that a region of image tokens may follow."""
    return ("all",) if kind == "place" else ("mask", "wide", "all")


def region_of_rule(ready: Ready, rule: RegionRule, txt_tokens: int) -> Region | None:
    """The patches, or words, that an edit of this task may change; None: all of them."""
    if rule in ("all", "text"):
        return None
    if rule in ("word", "phrase", "rest"):
        task = ready.task
        return Region(tokens=tuple(words_of(task.scene, task.kind, task.thing, rule, txt_tokens)))
    if ready.task.thing is None:
        cover = ready.cover.sum(axis=0)
        inside = cover < 1 - 1e-6 if rule == "mask" else cover == 0
    else:
        inside = ready.cover[ready.task.thing] > 0
        if rule == "wide":
            inside = widened(inside)
    return Region(tokens=tuple(np.flatnonzero(inside).tolist()))


def widened(inside: Bool[np.ndarray, "patches"]) -> Bool[np.ndarray, "patches"]:
    """These patches of a square picture, and the eight around each."""
    side = round(len(inside) ** 0.5)
    grid = np.pad(inside.reshape(side, side), 1)
    around = [np.roll(grid, shift, (0, 1)) for shift in product((-1, 0, 1), repeat=2)]
    return np.any(around, axis=0)[1:-1, 1:-1].reshape(-1)


# ---- Trying edits


class Candidate(NamedTuple):
    """What may steer: one edit, or several at once, whose strengths are those of strength 1."""

    name: str
    edits: tuple[Edit, ...]
    rules: tuple[RegionRule, ...]
    """Those that its region may follow."""

    def at(self, strength: float, region: Region | None) -> list[Edit]:
        """The edits at a strength, in a region."""
        return [
            replace(edit, strength=[strength * one for one in edit.strengths], region=region) for edit in self.edits
        ]


class Trial(NamedTuple):
    """One candidate at one strength with one rule for its region."""

    candidate: Candidate
    strength: float
    rule: RegionRule


@dataclass(frozen=True)
class Laboratory:
    """What it takes to try edits on tasks."""

    painter: Painter
    steering: Steering
    """Without edits: it makes others ready for the same runs."""
    encode: Callable[[str, Steering | None], TextEmbedding]
    """The embedding of a caption, with the edits of the text encoders that there are."""

    def unsteered(self, tasks: Iterator[EditingTask], number: int, *, most: int) -> tuple[list[Ready], int]:
        """The first `number` tasks whose unsteered picture is right, of at most `most`, and how many it looked at."""
        found: list[Ready] = []
        looked = 0
        while len(found) < number and looked < most:
            some = [next(tasks) for _ in range(min(number - len(found), most - looked))]
            looked += len(some)
            variants = [
                Variant("unsteered", 0.0, task.seed, self.encode(task.scene.caption, None), None) for task in some
            ]
            for task, made in zip(some, self.painter.make(variants), strict=True):
                if (ready := ready_task(task, made.picture.numpy())) is not None:
                    found.append(ready)
        return found[:number], looked

    def outcomes(
        self, tasks: Sequence[Ready], trials: Sequence[Trial], at_steps: Sequence[int] | None = None
    ) -> list[Outcome]:
        """What each trial comes to on the tasks; `at_steps`: with the edit at these steps alone."""
        variants = [self._variant(ready, trial, at_steps) for trial in trials for ready in tasks]
        judged = [
            outcome(made.picture.numpy(), ready.task)
            for made, ready in zip(self.painter.make(variants), list(tasks) * len(trials), strict=True)
        ]
        changed, kept = (np.array(one, dtype=bool).reshape(len(trials), -1) for one in zip(*judged, strict=True))
        return [Outcome(*rows) for rows in zip(changed, kept, strict=True)]

    def ceiling(self, tasks: Sequence[Ready]) -> Outcome:
        """What the changed caption itself comes to, from the same noise: no edit is expected to beat it."""
        variants = [
            Variant("caption", 0.0, ready.task.seed, self.encode(ready.task.target.caption, None), None)
            for ready in tasks
        ]
        judged = [
            outcome(made.picture.numpy(), ready.task)
            for made, ready in zip(self.painter.make(variants), tasks, strict=True)
        ]
        return Outcome(*(np.array(one, dtype=bool) for one in zip(*judged, strict=True)))

    def _variant(self, ready: Ready, trial: Trial, at_steps: Sequence[int] | None) -> Variant:
        steering = self.steering.of(
            trial.candidate.at(trial.strength, region_of_rule(ready, trial.rule, self.steering.txt_tokens))
        )
        if at_steps is not None:
            steering = steering.at_steps(at_steps)
        text = self.encode(ready.task.scene.caption, steering if steering.text_sites else None)
        return Variant("edit", trial.strength, ready.task.seed, text, steering)


ROUNDS = ((3, 24), (6, 6))
"""Of a search: so many tasks for every trial, then this number of trials stays; the last round has all other tasks."""


def search(
    outcomes: Callable[[Sequence[Ready], Sequence[Trial]], list[Outcome]],
    candidates: Sequence[Candidate],
    strengths: Sequence[float],
    tasks: Sequence[Ready],
) -> tuple[Trial, float]:
    """The trial that succeeds most often on these tasks, and how often: the best of many, so too good.

    `outcomes` is that of a laboratory. By successive halving (`ROUNDS`). Ties go to the trial that changed the thing
    more often, then to the weaker one.
    """
    trials = [
        Trial(candidate, strength, rule)
        for candidate, strength in product(candidates, strengths)
        for rule in candidate.rules
    ]
    scores = np.zeros((len(trials), 2))
    start = 0
    for number, keep in (*ROUNDS, (len(tasks), 1)):
        some = tasks[start:number]
        if some:
            found = outcomes(some, trials)
            scores += np.array([(one.joint.sum(), one.changed.sum()) for one in found])
            start = number
        order = sorted(range(len(trials)), key=lambda i: (*-scores[i], abs(trials[i].strength), i))[:keep]
        trials, scores = [trials[i] for i in order], scores[order]
    return trials[0], float(scores[0, 0] / len(tasks))


class Scenes:
    """The scenes of one concept whose unsteered picture is right: those to search on, and fresh ones to count on."""

    def __init__(
        self,
        laboratory: Callable[[], Laboratory],
        kind: ConceptKind,
        concept: str,
        *,
        seed: int,
        to_search: int,
        to_count: int,
        few: int,
    ) -> None:
        """`laboratory` is asked for when the first picture is made: until then nothing is loaded."""
        self.kind, self.concept = kind, concept
        self._laboratory, self._seed = laboratory, seed
        self._to_search, self._to_count, self._few = to_search, to_count, few

    @cached_property
    def known(self) -> list[Ready]:
        """Scenes to search on."""
        return self._found(PICK, self._to_search)[0]

    @property
    def fresh(self) -> list[Ready]:
        """Scenes to count on, of captions that no search has seen."""
        return self._fresh[0]

    @property
    def few(self) -> list[Ready]:
        """Some of them, for what is counted many times."""
        return self.fresh[: self._few]

    @property
    def looked(self) -> int:
        """How many unsteered pictures it took to find them."""
        return self._fresh[1]

    @cached_property
    def _fresh(self) -> tuple[list[Ready], int]:
        return self._found(REPORT, self._to_count)

    def _found(self, part: CaptionPart, number: int) -> tuple[list[Ready], int]:
        tasks = editing_tasks(self.kind, self.concept, part, self._seed)
        found, looked = self._laboratory().unsteered(tasks, number, most=4 * number + 32)
        if len(found) < number:
            raise FluxIRError(
                f"{number} scenes of {self.concept} with a right unsteered picture are needed: {len(found)} of the "
                f"first {looked} have one",
                hint="lower --tasks, or look at the pictures: the model may be another than flux-tiny",
            )
        return found, looked
