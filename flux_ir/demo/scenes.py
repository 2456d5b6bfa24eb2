"""The world flux-tiny knows: one or two coloured shapes on a plain background, captioned, with their ground truth.

Any number of scenes comes from one seed; the same seed and index always give the same scene. Captions are split once
and for all into training and held-out ones by a hash of the caption. Next: `drawing`, which turns a scene into pixels.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "gray", "beige")

# Place words with the centre they stand for, in units of the picture's side from its top left corner.
PLACES = {
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}
# Relation words with the places of the first and the second object.
RELATIONS = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
RADIUS = {"small": 0.14, "large": 0.22}  # circumradius in units of the picture's side
PLACE_JITTER, RADIUS_JITTER = 0.02, 0.04  # absolute, relative: two large objects still never touch
TWO_OBJECTS_SHARE = 0.65
HELD_OUT_ONE_IN = 8

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Thing:
    """One object: its words, and where and how large it really is (units of the picture's side)."""

    size: str
    colour: str
    shape: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        """The object as a noun phrase: "a large red circle"."""
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One picture's ground truth. `relation` is None for a single object."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        """The sentence that describes the scene."""
        first = self.things[0].words
        rest = self.things[0].place if self.relation is None else f"{self.relation} {self.things[1].words}"
        return f"{first} {rest} on a {self.background} background"

    @property
    def split(self) -> Split:
        """Which side of the split the caption is on: all scenes of one caption are on the same side."""
        return "held_out" if hashlib.sha256(self.caption.encode()).digest()[0] % HELD_OUT_ONE_IN == 0 else "train"


def scene_at(seed: int, index: int) -> Scene:
    """The scene with this number in the endless list of `seed`, whichever split it belongs to."""
    rng = random.Random(f"flux-tiny scene {seed} {index}")
    background = rng.choice(BACKGROUNDS)
    if rng.random() < TWO_OBJECTS_SHARE:
        relation = rng.choice(tuple(RELATIONS))
        first, second = RELATIONS[relation]
        return Scene((_thing(rng, first), _thing(rng, second)), relation, background)
    return Scene((_thing(rng, rng.choice(tuple(PLACES))),), None, background)


def scenes(seed: int, split: Split, start: int = 0) -> Iterator[Scene]:
    """The endless list of scenes of one split, from index `start` of the unsplit list on."""
    index = start
    while True:
        scene = scene_at(seed, index)
        if scene.split == split:
            yield scene
        index += 1


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """`count` held-out scenes with captions that all differ."""
    by_caption: dict[str, Scene] = {}
    for scene in scenes(seed, "held_out"):
        by_caption.setdefault(scene.caption, scene)
        if len(by_caption) == count:
            break
    return list(by_caption.values())


def parse_caption(caption: str) -> Scene:
    """The scene a caption names, with every object where and as large as its words say, without jitter.

    Raises ValueError for a sentence that is no caption.
    """
    words = _CAPTION.fullmatch(caption)
    if words is None:
        raise ValueError(f"not a caption of flux-tiny's world: {caption!r}")
    if words["place"]:
        return Scene((_standing(words, "", words["place"]),), None, words["background"])
    first, second = RELATIONS[words["relation"]]
    return Scene((_standing(words, "", first), _standing(words, "2", second)), words["relation"], words["background"])


def vocabulary() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    phrases = ["a", *SIZES, *COLOURS, *SHAPES, *PLACES, *RELATIONS, "on a", *BACKGROUNDS, "background"]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def _thing(rng: random.Random, place: str) -> Thing:
    size, colour, shape = rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)
    x, y = (centre + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for centre in PLACES[place])
    radius = RADIUS[size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER))
    return Thing(size, colour, shape, place, x, y, radius)


def _standing(found: re.Match[str], number: str, place: str) -> Thing:
    size, colour, shape = (found[f"{word}{number}"] for word in ("size", "colour", "shape"))
    return Thing(size, colour, shape, place, *PLACES[place], RADIUS[size])


def _words(name: str, words: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


_NOUNS = [
    f"a {_words(f'size{n}', SIZES)} {_words(f'colour{n}', COLOURS)} {_words(f'shape{n}', SHAPES)}" for n in ("", "2")
]
_CAPTION = re.compile(
    f"{_NOUNS[0]} ({_words('place', PLACES)}|{_words('relation', RELATIONS)} {_NOUNS[1]}) "
    f"on a {_words('background', BACKGROUNDS)} background"
)
