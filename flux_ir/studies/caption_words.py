"""Where a caption of flux-tiny's world says a thing: the words to turn, and the labels of its text tokens.

Its T5 gives each word of such a caption one token, so the number of a word is that of its token. Next: `candidates`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from flux_ir.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene
from flux_ir.studies.labels import Labels, Question, TextLevel, make_bits

ConceptKind = Literal["colour", "background", "shape", "place"]
CONCEPTS: dict[ConceptKind, tuple[str, ...]] = {
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "shape": SHAPES,
    "place": tuple(PLACES),
}
"""What is asked for: recolour an object, change the background, reshape an object, move the only one."""
TEXT_LEVELS: tuple[TextLevel, ...] = get_args(TextLevel)
"""word: the words that name the concept; phrase: the object's noun phrase, or the four words that name the background;
rest: of the background alone, every token but the words for size, colour and shape of objects; text: every token. The
padding belongs to rest and text."""


def text_levels(kind: ConceptKind) -> tuple[TextLevel, ...]:
    """Which of them there are for a concept."""
    return tuple(level for level in TEXT_LEVELS if level != "rest" or kind == "background")


def words_of(scene: Scene, kind: ConceptKind, thing: int | None, level: TextLevel, tokens: int) -> list[int]:
    """The text tokens, of so many, that say the concept of an object (None: of the background)."""
    every, length = list(range(tokens)), len(scene.caption.split())
    phrase = len(scene.things[0].words.split())
    between = 0 if scene.relation is None else len(scene.relation.split())
    starts = [number * (phrase + between) for number in range(len(scene.things))]
    match level:
        case "text":
            return every
        case "rest":
            described = {start + within for start in starts for within in range(1, phrase)}
            return [token for token in every if token not in described]
        case "phrase":
            return every[length - 4 : length] if thing is None else every[starts[thing] : starts[thing] + phrase]
    if thing is None:
        return [length - 2]
    if kind == "place":
        return every[phrase : phrase + len(scene.things[0].place.split())]
    return [starts[thing] + scene.things[thing].words.split().index(getattr(scene.things[thing], kind))]


def said(scene: Scene, kind: ConceptKind) -> Iterator[tuple[int | None, str]]:
    """What a caption says of this kind: an object (None: the background) and its concept."""
    if kind == "background":
        yield None, scene.background
    elif kind != "place" or scene.relation is None:  # a relation names no place
        yield from ((number, getattr(thing, kind)) for number, thing in enumerate(scene.things))


def caption_labels(captions: Sequence[Scene], tokens: int) -> Labels:
    """The answers of text tokens, of captions with so many each: does this word, phrase or text say the concept?

    Of each level those tokens count that say some concept of the kind; the padding of a text counts as its words do.
    """
    questions, every = list[Question](), list[np.ndarray]()
    for kind, concepts in CONCEPTS.items():
        for level in text_levels(kind):
            value = np.full((len(concepts), len(captions), tokens), fill_value=False)
            for image, scene in enumerate(captions):
                for thing, concept in said(scene, kind):
                    where = words_of(scene, kind, thing, level, tokens)
                    value[concepts.index(concept), image, where] = True
            counted = np.asarray(value.any(axis=0))
            questions += [Question(kind, concept, level) for concept in concepts]
            every += [make_bits(positive, counted, counted) for positive in value]
    return Labels(
        images=np.arange(len(captions)),
        prompts=tuple(scene.caption for scene in captions),
        questions=tuple(questions),
        tokens=np.stack(every),
        pictures=np.zeros((0, len(captions)), dtype=np.uint8),
        dropped={},
        by_shape={},
    )
