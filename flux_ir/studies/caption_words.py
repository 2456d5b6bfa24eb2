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
text: every token, padding too."""


def words_of(scene: Scene, kind: ConceptKind, thing: int | None, level: Literal["word", "phrase"]) -> range:
    """The words of a caption, counted from 0, that say the concept of an object (None: of the background)."""
    if thing is None:
        length = len(scene.caption.split())
        return range(length - 2, length - 1) if level == "word" else range(length - 4, length)
    phrase = len(scene.things[0].words.split())
    between = 0 if scene.relation is None else len(scene.relation.split())
    start = thing * (phrase + between)
    if level == "phrase":
        return range(start, start + phrase)
    if kind == "place":
        return range(phrase, phrase + len(scene.things[0].place.split()))
    within = scene.things[thing].words.split().index(getattr(scene.things[thing], kind))
    return range(start + within, start + within + 1)


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
        for level in TEXT_LEVELS:
            value = np.full((len(concepts), len(captions), tokens), fill_value=False)
            for image, scene in enumerate(captions):
                for thing, concept in said(scene, kind):
                    where = range(tokens) if level == "text" else words_of(scene, kind, thing, level)
                    value[concepts.index(concept), image, where.start : where.stop] = True
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
