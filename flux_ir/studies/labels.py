"""The labels of the tokens and pictures of a collection: the known answers that features are held against.

A `Question` is one thing that a token or a picture has or has not: "red, where the object covers the patch". Each has
two sets of negatives: all others at its level, and hard ones. Labels of flux-tiny's pictures come from the objects that
`demo.judge` finds in the *generated* picture: a scene that is drawn again from the caption has another jitter, and 40
to 80 % of its well covered patches would be others. Labels of any other model come from files: `label_files`. Next:
`auroc`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from flux_ir.activations.blocks import TokenSource
from flux_ir.demo.scenes import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES
from flux_ir.errors import FluxIRError
from flux_ir.studies.judged import Judged

Level = Literal["interior", "any", "image"]
Negatives = Literal["all", "hard"]
TextLevel = Literal["word", "phrase", "rest", "text"]
LEVELS: tuple[Level, ...] = get_args(Level)
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)

POSITIVE, IN_ALL, IN_HARD = 1, 2, 4
"""The bits of a label: positive; counts if the negatives are all others; counts if they are the hard ones."""
_BIT: dict[Negatives, int] = {"all": IN_ALL, "hard": IN_HARD}

INSIDE_ABOVE, COVERED_ABOVE, CLEAR_BELOW = 0.9, 0.5, 0.05
"""Shares of a patch: covered by one object above the first it lies inside it, above the second it counts as covered,
and below the third as clear."""

KINDS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "place": tuple(PLACES),
    "relation": tuple(RELATIONS),
    "background": BACKGROUNDS,
}
"""flux-tiny's concepts. A place is known of a single object only: "left of" is not "on the left"."""
WORDS = {"number": "number of objects", "background": "background", "colour": "colour of an object"}
"""The aspects in which a picture must agree with its caption to be used at all, in words."""
_OF_PATCHES = ("colour", "shape", "size", "background")


class Question(NamedTuple):
    """Something that patches (`interior`, `any`), text tokens (a `TextLevel`) or pictures (`image`) have or not."""

    kind: str
    concept: str
    level: Level | TextLevel

    @property
    def of_tokens(self) -> bool:
        """Whether every token has its own answer."""
        return self.level != "image"


class Task(NamedTuple):
    """A classification task, which has an AUROC: a question and one of its two sets of negatives."""

    question: Question
    negatives: Negatives


@dataclass(frozen=True)
class Labels:
    """The answers to questions about some pictures of a collection.

    `tokens` and `pictures` hold the bits `POSITIVE`, `IN_ALL`, `IN_HARD`; 0 counts for neither set of negatives.
    """

    images: np.ndarray
    """int64 [images]: which generations of the source, ascending. Those whose picture is in doubt are missing."""
    prompts: tuple[str, ...]
    """The prompt of each image, or its id where it has none. Draws and permutations are of prompts, not of pictures."""
    questions: tuple[Question, ...]
    """Questions about tokens come before those about pictures."""
    tokens: np.ndarray
    """uint8 [token questions, images, tokens]."""
    pictures: np.ndarray
    """uint8 [other questions, images]."""
    dropped: Mapping[str, int]
    """How many pictures were left out of everything, or of the questions of a kind, by reason."""
    by_shape: Mapping[Question, Mapping[str, int]]
    """The positives of a question by the shape they are of, where that is known; not of pictures that were `chosen`."""
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Labels that are numbers, by name: float64 [images], NaN where one is not known."""

    def of(self, question: Question) -> np.ndarray:
        """The bits of one question: uint8 [images, tokens], or [images]."""
        number = self.questions.index(question)
        return self.tokens[number] if number < len(self.tokens) else self.pictures[number - len(self.tokens)]

    def chosen(self, kept: np.ndarray) -> "Labels":
        """The labels of some of the pictures: bool [images]."""
        if kept.all():
            return self
        prompts = tuple(prompt for prompt, stays in zip(self.prompts, kept, strict=True) if stays)
        images, tokens, pictures = self.images[kept], self.tokens[:, kept], self.pictures[:, kept]
        numbers = {name: values[kept] for name, values in self.numbers.items()}
        return replace(
            self, images=images, prompts=prompts, tokens=tokens, pictures=pictures, by_shape={}, numbers=numbers
        )

    def split(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Which are positive, and which count (positive or negative): bool, of the shape of `of`."""
        return split(self.of(task.question), task.negatives)

    def tasks(self) -> list[Task]:
        """Every question with every set of negatives it has."""
        return [
            Task(question, negatives)
            for question in self.questions
            for negatives in NEGATIVES
            if (self.of(question) & _BIT[negatives]).any()
        ]

    @property
    def groups(self) -> np.ndarray:
        """int64 [images]: the number of each image's prompt, in the order they first occur."""
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
        return np.array([numbers[prompt] for prompt in self.prompts], dtype=np.int64)


def permuted(labels: Labels, seed: int | Sequence[int]) -> np.ndarray:
    """A permutation of label maps for a null: picture i gets the map of picture order[i], int64 [images].

    Whole prompts are permuted, since pictures of one prompt are much alike: prompts with equally many pictures exchange
    the maps of their first pictures, of their second ones, and so on. Maps are not changed: positions stay.
    """
    draw, order = np.random.default_rng(seed), np.arange(len(labels.images))
    _, count = np.unique(labels.groups, return_counts=True)
    of_group = np.argsort(labels.groups, kind="stable")
    starts = np.cumsum(count) - count
    for size in np.unique(count):
        alike = of_group[starts[count == size][:, None] + np.arange(size)]  # [prompts, pictures]
        order[alike] = alike[draw.permutation(len(alike))]
    return order


def split(bits: np.ndarray, negatives: Negatives) -> tuple[np.ndarray, np.ndarray]:
    """Which are positive, and which count, by the bits of a question: two arrays of bool."""
    counted = (bits & _BIT[negatives]) != 0
    return counted & ((bits & POSITIVE) != 0), counted


def known_answers(judged: Judged) -> Labels:
    """The labels of flux-tiny's pictures. Pictures that disagree with their caption are left out, and counted.

    A picture must show as many objects as its caption names, in these colours, on this background; the questions about
    shapes, sizes, places and relations are asked of those that agree in that as well.

    Raises FluxIRError if nothing is left.
    """
    dropped, kept = Counter[str](), np.ones(len(judged.images), dtype=bool)
    for aspect in ("number", "background", "colour"):
        wrong = kept & ~judged.agrees[aspect]
        dropped[f"the picture shows another {WORDS[aspect]}"] = int(wrong.sum())
        kept &= ~wrong
    if not kept.any():
        raise FluxIRError(
            f"at least one picture must show what its caption says: of {len(kept)} none does",
            hint="collect more pictures, or look at them: the model may be another than the captions are for",
        )
    judged = judged.chosen(kept)
    table = _Table(judged)
    for kind in ("shape", "size", "place", "relation"):
        if wrong_of_kind := int((table.asked(kind) & ~judged.agrees[kind]).sum()):
            dropped[f"the picture shows another {kind} (only of questions about {kind}s)"] = wrong_of_kind
    answers = list(table.patches("interior")) + list(table.patches("any")) + list(table.images())
    tokens = [bits for question, bits in answers if question.of_tokens]
    pictures = [bits for question, bits in answers if not question.of_tokens]
    return Labels(
        images=judged.images,
        prompts=tuple(scene.caption for scene in judged.scenes),
        questions=tuple(question for question, _ in answers),
        tokens=np.stack(tokens),
        pictures=np.stack(pictures),
        dropped=dropped,
        by_shape={question: table.by_shape(question, bits) for question, bits in answers},
    )


class _Table:
    """The words of captions as numbers, by picture, and the questions that they answer."""

    def __init__(self, judged: Judged) -> None:
        self.judged, self.cover = judged, judged.cover  # [images, 2, tokens]
        scenes = judged.scenes
        self.background = np.array([BACKGROUNDS.index(scene.background) for scene in scenes])
        self.relation = np.array([-1 if s.relation is None else KINDS["relation"].index(s.relation) for s in scenes])
        self.place = np.array([-1 if s.relation else KINDS["place"].index(s.things[0].place) for s in scenes])
        self.object = {
            kind: np.array(
                [[KINDS[kind].index(getattr(t, kind)) for t in s.things] + [-1] * (2 - len(s.things)) for s in scenes]
            )
            for kind in ("colour", "shape", "size")
        }  # [images, 2], -1 where there is no second object
        self.alone = self.relation < 0
        self.covered = self.cover.sum(1)

    def asked(self, kind: str) -> np.ndarray:
        """Which pictures have captions that name a word of this kind: bool [images]."""
        return {"place": self.alone, "relation": ~self.alone}.get(kind, np.ones(len(self.alone), dtype=bool))

    def patches(self, level: Level) -> Iterator[tuple[Question, np.ndarray]]:
        """The questions about patches at one level."""
        clear = self.covered < CLEAR_BELOW
        inside = (self.cover > INSIDE_ABOVE).any(1)
        for kind in _OF_PATCHES:
            usable = self.judged.agrees[kind][:, None]
            of_ground = kind == "background"
            for value, concept in enumerate(KINDS[kind]):
                share = self._share(kind, value)
                if level == "interior":
                    # One surface alone: an object's, or the background's.
                    all_there, rivals = inside | clear, clear if of_ground else inside
                    positive = clear & (share > 0) if of_ground else self._inside(value, kind)
                else:
                    positive, negative = share > COVERED_ABOVE, share < CLEAR_BELOW
                    surface = 1 - self.covered > COVERED_ABOVE if of_ground else (self.cover > COVERED_ABOVE).any(1)
                    all_there, rivals = positive | negative, positive | (negative & surface)
                yield Question(kind, concept, level), make_bits(positive, all_there & usable, rivals & usable)

    def images(self) -> Iterator[tuple[Question, np.ndarray]]:
        """The questions about whole pictures. Hard negatives, and their positives, are pictures of two objects.

        A positive then has, as a rule, an object without the concept too, and no negative has fewer objects.
        """
        for kind, concepts in KINDS.items():
            usable = self.judged.agrees[kind]
            everyone, nobody = np.ones(len(self.alone), dtype=bool), np.zeros(len(self.alone), dtype=bool)
            for value, concept in enumerate(concepts):
                if kind in self.object:
                    positive, all_there, rivals = (self.object[kind] == value).any(1), everyone, ~self.alone
                elif kind == "place":
                    positive, all_there, rivals = self.place == value, self.alone, nobody
                elif kind == "relation":
                    positive, all_there, rivals = self.relation == value, everyone, ~self.alone
                else:
                    positive, all_there, rivals = self.background == value, everyone, nobody
                yield Question(kind, concept, "image"), make_bits(positive, all_there & usable, rivals & usable)

    def by_shape(self, question: Question, bits: np.ndarray) -> dict[str, int]:
        """The positives of a question by the shape of the object they are of; none for backgrounds and relations."""
        positive, shapes = (bits & POSITIVE) != 0, self.object["shape"]
        if question.kind in ("background", "relation", "shape"):
            return {}
        if question.of_tokens:
            owner = self.cover.argmax(1)  # [images, tokens]
            of_token = np.take_along_axis(shapes, owner, axis=1)
            return {shape: int((positive & (of_token == number)).sum()) for number, shape in enumerate(SHAPES)}
        value = KINDS[question.kind].index(question.concept)
        has = np.ones_like(shapes, bool) if question.kind == "place" else self.object[question.kind] == value
        return {shape: int((positive & (has & (shapes == number)).any(1)).sum()) for number, shape in enumerate(SHAPES)}

    def _share(self, kind: str, value: int) -> np.ndarray:
        """The share of each patch that has a concept: [images, tokens]."""
        if kind == "background":
            return (1 - self.covered) * (self.background == value)[:, None]
        return (self.cover * (self.object[kind] == value)[:, :, None]).sum(1)

    def _inside(self, value: int, kind: str) -> np.ndarray:
        """The patches that lie inside one object that has the concept."""
        return ((self.cover > INSIDE_ABOVE) & (self.object[kind] == value)[:, :, None]).any(1)


def make_bits(positive: np.ndarray, in_all: np.ndarray, in_hard: np.ndarray) -> np.ndarray:
    """The bits of a question; what counts for no negatives is not positive either."""
    counts = in_all * np.uint8(IN_ALL) + in_hard * np.uint8(IN_HARD)
    return (counts + (positive & (counts > 0)) * np.uint8(POSITIVE)).astype(np.uint8)


def check_sources_apart(pick: tuple[str, TokenSource], report: tuple[str, TokenSource]) -> None:
    """Raises FluxIRError if two collections share a prompt, or are the same captures (which may have no prompts)."""
    check_apart(*((name, [one.prompt for one in source.generations]) for name, source in (pick, report)))
    if pick[1].identity == report[1].identity:
        raise FluxIRError(
            f"what picks and what reports must share no picture: {pick[0]} and {report[0]} are the same captures",
            hint="divide the pictures, and collect each share by itself",
        )


def check_apart(pick: tuple[str, Sequence[str]], report: tuple[str, Sequence[str]]) -> None:
    """Raises FluxIRError if two sets, each a name and its prompts, share one. Pictures without a prompt share none."""
    prompts = set(pick[1]) - {""}
    if common := next((prompt for prompt in report[1] if prompt in prompts), None):
        raise FluxIRError(
            f"what picks and what reports must share no prompt: {pick[0]} and {report[0]} both have {common!r}",
            hint="collect sets of other prompts: python -m flux_ir.demo.captions --part A, B and so on",
        )
