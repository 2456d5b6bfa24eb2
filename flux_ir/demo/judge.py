"""Says what a picture shows by looking at its pixels, and holds that against the scene its caption asked for.

`look` never learns the caption: it finds the background and each object's colour, shape, size and place, and
`find_objects` also gives the pixels of each. `judge` compares that with a scene, `tally` counts over many. Colours,
silhouettes and places come from `drawing` and `scenes`, so on a scene as drawn every verdict is right (tested); what
the judge says about a sampled picture rests on that.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from flux_ir.demo.drawing import RGB, silhouette
from flux_ir.demo.scenes import PLACES, RADIUS, RELATIONS, SHAPES, Scene, Thing

# RGB distance from which a pixel may belong to an object. The closest pair is pink on beige, 72 apart.
OBJECT_DISTANCE = 30.0
# RGB distance up to which a colour has the name of the nearest: half of what the closest pair is apart. What flux-tiny
# draws from captions is at most 10 away (1,007 objects); what steering makes may be no colour that has a name.
KNOWN_WITHIN = 36.0
# Where an object ends: half of its own distance, looked up this far around (share of the side), because edges are soft.
EDGE_REACH = 0.025
# Share of the picture. The smallest object, a small star, covers .020; what is below a quarter of that is a speck.
LEAST_AREA = 0.005
# Overlap with the best template below which a blob has no shape. Objects as drawn reach .88, degraded ones .87.
LEAST_OVERLAP = 0.75
# Every shape is tried sharp and with corners rounded by a blur of this share of its radius: a low contrast (purple on
# gray) leaves the autoencoder with blunt stars, which a person still calls stars.
BLUNTNESS = (0.0, 0.12)
# More than any caption names: two extra objects are as wrong as twenty.
MOST_OBJECTS = 4


class Seen(NamedTuple):
    """One object of a picture. `x`, `y` (its centre of gravity) and `radius` are in units of the picture's side."""

    colour: str | None
    """None: none that the world has, as shape."""
    shape: str | None
    size: str
    place: str
    x: float
    y: float
    radius: float


class Sight(NamedTuple):
    """What a picture shows; objects from the largest to the smallest."""

    background: str | None
    objects: list[Seen]


class ObjectVerdict(NamedTuple):
    """What is right about one object of the caption; a missing one is wrong in everything.

    `place` is None where the caption names no place (two objects) and wrong where there are too many objects.
    """

    colour: bool
    place: bool | None
    size: bool
    shape: bool


class Verdict(NamedTuple):
    """What is right about a picture; `number` means as many objects as the caption names.

    `relation` is None for one object and wrong unless exactly two are there.
    """

    background: bool
    number: bool
    relation: bool | None
    objects: tuple[ObjectVerdict, ...]


class TallyRow(NamedTuple):
    """One row of the tally: the share of `n` cases where `aspect` was right, for captions with `captions` objects."""

    captions: int
    aspect: str
    share: float
    n: int


def look(picture: np.ndarray) -> Sight:
    """What is on a picture, uint8 [side, side, 3]. The corners, which no object reaches, tell the background."""
    return find_objects(picture)[0]


def find_objects(picture: np.ndarray) -> tuple[Sight, np.ndarray]:
    """What is on a picture, uint8 [side, side, 3], and where: the pixels of each of its objects, in the same order.

    The masks are bool [objects, side, side]; no two of them share a pixel. `match_objects` says which object of a
    caption each stands for.
    """
    side = picture.shape[0]
    if picture.shape != (side, side, 3) or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [side, side, 3], got {picture.dtype} {list(picture.shape)}")
    ends = np.r_[: side // 8, side - side // 8 : side]
    ground = np.median(picture[np.ix_(ends, ends)], axis=(0, 1))
    blobs = _components(_object_mask(picture, ground), round(LEAST_AREA * side * side))
    masks = np.stack(blobs[:MOST_OBJECTS]) if blobs else np.zeros((0, side, side), dtype=bool)
    return Sight(_known_colour(ground), [_describe(picture, mask) for mask in masks]), masks


def judge(picture: np.ndarray, scene: Scene) -> Verdict:
    """Holds what is on the picture, uint8 [side, side, 3], against what the scene's caption asks for."""
    return compare(look(picture), scene)


def compare(sight: Sight, scene: Scene) -> Verdict:
    """Holds what was seen on a picture against what the scene's caption asks for."""
    matched = tuple(None if found is None else sight.objects[found] for found in match_objects(sight.objects, scene))
    number = len(sight.objects) == len(scene.things)
    return Verdict(
        background=sight.background == scene.background,
        number=number,
        relation=None if scene.relation is None else number and _relation_of(matched) == scene.relation,
        objects=tuple(
            ObjectVerdict(
                colour=seen is not None and seen.colour == thing.colour,
                place=None if scene.relation is not None else number and seen is not None and seen.place == thing.place,
                size=seen is not None and seen.size == thing.size,
                shape=seen is not None and seen.shape == thing.shape,
            )
            for seen, thing in zip(matched, scene.things, strict=True)
        ),
    )


def match_objects(seen: list[Seen], scene: Scene) -> tuple[int | None, ...]:
    """For each object of the caption the number of the found one that stands for it; None where one is missing.

    Colours decide. Where they cannot (both alike, or neither found) shapes do, then sizes, then the relation asked for.
    """

    def agreement(candidate: tuple[int | None, ...]) -> tuple[int, int, int, bool]:
        objects = tuple(None if number is None else seen[number] for number in candidate)
        pairs = [(s, thing) for s, thing in zip(objects, scene.things, strict=True) if s is not None]
        colours = sum(s.colour == thing.colour for s, thing in pairs)
        shapes = sum(s.shape == thing.shape for s, thing in pairs)
        sizes = sum(s.size == thing.size for s, thing in pairs)
        return colours, shapes, sizes, _relation_of(objects) == scene.relation

    count = len(scene.things)
    padded: list[int | None] = [*range(len(seen)), *[None] * (count - len(seen))]
    return max(permutations(padded, count), key=agreement)


def tally(verdicts: Iterable[tuple[Verdict, Scene]]) -> list[TallyRow]:
    """How often each aspect was right, over how many cases: first for captions with one object, then with two."""
    pairs = list(verdicts)
    rows: list[TallyRow] = []
    for captions, aspects in ((1, _ONE_OBJECT), (2, _TWO_OBJECTS)):
        group = [verdict for verdict, scene in pairs if len(scene.things) == captions]
        for aspect, cases in aspects.items():
            right = [case for verdict in group for case in cases(verdict)]
            if right:
                rows.append(TallyRow(captions, aspect, sum(right) / len(right), len(right)))
    return rows


Cases = Callable[[Verdict], list[bool]]
_SHARED: dict[str, Cases] = {
    "background": lambda v: [v.background],
    "number of objects": lambda v: [v.number],
}
_ONE_OBJECT: dict[str, Cases] = _SHARED | {
    "colour": lambda v: [v.objects[0].colour],
    "place": lambda v: [v.objects[0].place is True],
    "size": lambda v: [v.objects[0].size],
    "shape": lambda v: [v.objects[0].shape],
    "everything": lambda v: [_everything(v)],
}
_TWO_OBJECTS: dict[str, Cases] = _SHARED | {
    "both colours": lambda v: [all(o.colour for o in v.objects)],
    "relation": lambda v: [v.relation is True],
    "relation and both colours": lambda v: [v.relation is True and all(o.colour for o in v.objects)],
    "size of each": lambda v: [o.size for o in v.objects],
    "both sizes": lambda v: [all(o.size for o in v.objects)],
    "shape of each": lambda v: [o.shape for o in v.objects],
    "both shapes": lambda v: [all(o.shape for o in v.objects)],
    "everything": lambda v: [_everything(v)],
}


def _everything(verdict: Verdict) -> bool:
    answers = (verdict.background, verdict.number, verdict.relation, *(answer for o in verdict.objects for answer in o))
    return all(answer is not False for answer in answers)


def _relation_of(objects: tuple[Seen | None, ...]) -> str | None:
    """The relation word whose direction is closest to the one from the second object to the first."""
    if len(objects) != 2 or objects[0] is None or objects[1] is None:
        return None
    dx, dy = objects[0].x - objects[1].x, objects[0].y - objects[1].y

    def agreement(relation: str) -> float:
        (x1, y1), (x2, y2) = (PLACES[place] for place in RELATIONS[relation])
        return dx * (x1 - x2) + dy * (y1 - y2)

    return max(RELATIONS, key=agreement)


def _object_mask(picture: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Pixels that are more object than background, bool [side, side].

    A soft edge pixel is a mixture, so the limit is half the largest distance nearby: one fixed limit would make objects
    of a strong contrast too large, and join neighbours.
    """
    distance = np.linalg.norm(picture - ground, axis=2)
    halved = Image.fromarray((distance / 2).astype(np.uint8))  # distances reach 442, a byte 255
    reach_px = max(1, round(EDGE_REACH * len(picture)))
    nearby_limit = np.asarray(halved.filter(ImageFilter.MaxFilter(2 * reach_px + 1)))
    return distance > np.maximum(nearby_limit, OBJECT_DISTANCE)


def _components(mask: np.ndarray, least_px: int) -> list[np.ndarray]:
    """The connected parts (sides touching) of a mask with at least `least_px` pixels, the largest first.

    Works on runs of pixels within a row, a few hundred a picture, and joins those that overlap in neighbouring rows.
    """
    gapped = np.pad(mask, ((0, 0), (1, 1)))  # no run goes on into the next row
    edges = np.flatnonzero(np.diff(gapped.ravel().astype(np.int8))) + 1
    starts, ends = edges[::2], edges[1::2]
    parent = list(range(len(starts)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    stride = gapped.shape[1]
    first = np.searchsorted(ends, starts + stride, side="right").tolist()
    after_last = np.searchsorted(starts, ends + stride, side="left").tolist()
    for run, (low, high) in enumerate(zip(first, after_last, strict=True)):
        for below in range(low, high):
            parent[root(run)] = root(below)
    labels = np.full(gapped.shape, -1)
    labels[gapped] = np.repeat([root(run) for run in parent], ends - starts)
    labels = labels[:, 1:-1]
    names, areas = np.unique(labels[mask], return_counts=True)
    return [labels == names[i] for i in np.argsort(-areas, kind="stable") if areas[i] >= least_px]


def _describe(picture: np.ndarray, blob: np.ndarray) -> Seen:
    """Colour, shape, size and place of the object that covers `blob`, bool [side, side]."""
    side = len(blob)
    rows, columns = np.nonzero(blob)
    x, y = float(columns.mean() + 0.5) / side, float(rows.mean() + 0.5) / side  # the centre of every shape
    window = _window(rows, columns)
    overlap, shape, radius_px = max(_fit(window, shape, blunt) for shape in SHAPES for blunt in BLUNTNESS)
    return Seen(
        colour=_known_colour(np.median(picture[_interior(blob)], axis=0)),
        shape=shape if overlap >= LEAST_OVERLAP else None,
        size=min(RADIUS, key=lambda size: abs(RADIUS[size] - radius_px / side)),
        place=min(PLACES, key=lambda place: math.dist(PLACES[place], (x, y))),
        x=x,
        y=y,
        radius=radius_px / side,
    )


def _window(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """These pixels alone in a square around their centre, large enough for every template of their area: faster."""
    down, right = rows - round(rows.mean()), columns - round(columns.mean())
    tips = math.ceil(0.95 * len(rows) ** 0.5)  # a star's, the furthest of all, reach .9 of the root of its area
    reach = max(tips, int(np.abs(down).max()), int(np.abs(right).max()))
    window = np.zeros((2 * reach + 1, 2 * reach + 1), dtype=bool)
    window[down + reach, right + reach] = True
    return window


def _fit(blob: np.ndarray, shape: str, blunt: float) -> tuple[float, str, float]:
    """How well this shape of the blob's own area and centre covers it (intersection over union), its radius [px]."""
    rows, columns = np.nonzero(blob)
    radius_px = math.sqrt(len(rows) / _area_at_unit_radius(shape, blunt))
    template = _template(shape, float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, radius_px, blunt, len(blob))
    return float((template & blob).sum() / (template | blob).sum()), shape, radius_px


@cache
def _area_at_unit_radius(shape: str, blunt: float) -> float:
    return float(_template(shape, 128, 128, 80, blunt, 256).sum()) / 80**2


def _template(shape: str, x_px: float, y_px: float, radius_px: float, blunt: float, side_px: int) -> np.ndarray:
    thing = Thing("any", "any", shape, "any", x_px / side_px, y_px / side_px, radius_px / side_px)
    sharp = silhouette(thing, side_px)
    if blunt == 0:
        return sharp
    soft = Image.fromarray(sharp.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blunt * radius_px))
    return np.asarray(soft) > 127


def _interior(blob: np.ndarray) -> np.ndarray:
    """The blob without its soft edge, two pixels deep; the whole blob where nothing else would be left."""
    inner = blob
    for _ in range(2):
        around = np.pad(inner, 1)
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return inner if inner.any() else blob


def _known_colour(rgb: np.ndarray) -> str | None:
    """The nearest of all twelve named colours: a red ground is then no background, and a gray object no colour.

    None: it is none of them (`KNOWN_WITHIN`).
    """
    nearest = min(RGB, key=lambda name: math.dist(RGB[name], rgb))
    return nearest if math.dist(RGB[nearest], rgb) <= KNOWN_WITHIN else None
