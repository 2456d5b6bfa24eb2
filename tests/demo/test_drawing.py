"""Scenes as pixels: the right format, the right colours in the right places, and templates that match what is drawn."""

from itertools import combinations, islice

import numpy as np
import pytest

from flux_ir.demo.drawing import RGB, SIDE_PX, draw, silhouette
from flux_ir.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, scenes

SOME_SCENES = list(islice(scenes(1, "train"), 60))


def centred(shape: str, radius: float = 0.22) -> Thing:
    return Thing("large", "red", shape, "in the center", 0.5, 0.5, radius)


def pixel_at(picture: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    side_px = len(picture)
    return tuple(int(value) for value in picture[int(y * side_px), int(x * side_px)])


@pytest.mark.parametrize("side_px", [64, SIDE_PX])
def test_a_picture_is_square_bytes(side_px: int) -> None:
    picture = draw(SOME_SCENES[0], side_px)
    assert picture.shape == (side_px, side_px, 3)
    assert picture.dtype == np.uint8


def test_the_same_scene_is_the_same_picture() -> None:
    assert np.array_equal(draw(SOME_SCENES[0]), draw(SOME_SCENES[0]))
    assert not np.array_equal(draw(SOME_SCENES[0]), draw(SOME_SCENES[1]))


def test_an_object_has_its_colour_at_its_centre_and_a_ring_has_a_hole_there() -> None:
    for scene in SOME_SCENES:
        picture = draw(scene)
        for thing in scene.things:
            expected = scene.background if thing.shape == "ring" else thing.colour
            assert pixel_at(picture, thing.x, thing.y) == RGB[expected]


def test_a_ring_has_its_colour_between_its_two_circles() -> None:
    ring = centred("ring")
    assert pixel_at(draw(Scene((ring,), None, "white")), ring.x + 0.78 * ring.radius, ring.y) == RGB["red"]


def test_the_corners_are_background() -> None:
    for scene in SOME_SCENES:
        corners = draw(scene)[np.ix_([0, -1], [0, -1])].reshape(4, 3)
        assert {tuple(int(v) for v in corner) for corner in corners} == {RGB[scene.background]}


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_silhouette_is_where_the_picture_differs_from_the_background(shape: str, background: str) -> None:
    """Edge pixels are mixtures: a silhouette holds those that are at least half object."""
    thing = centred(shape)
    picture = draw(Scene((thing,), None, background)).astype(float)
    contrast = np.subtract(RGB["red"], RGB[background])
    object_share = (picture - RGB[background]) @ contrast / (contrast @ contrast)
    where = silhouette(thing)
    assert where.shape == (SIDE_PX, SIDE_PX)
    assert where.dtype == np.bool_
    assert object_share[where].min() > 0.45
    assert object_share[~where].max() < 0.55


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_circle_and_never_leaves_it(shape: str) -> None:
    thing = centred(shape)
    rows, columns = np.nonzero(silhouette(thing))
    reach = np.hypot((columns + 0.5) / SIDE_PX - thing.x, (rows + 0.5) / SIDE_PX - thing.y).max()
    # The square's corners and the cross's arm ends, drawn a little wider than the circle, are the two exceptions.
    limit = {"square": 0.85 * 2**0.5, "cross": np.hypot(1, 0.34)}.get(shape, 1.0)
    assert reach == pytest.approx(limit * thing.radius, abs=0.012)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_centre_of_gravity_at_its_centre(shape: str) -> None:
    rows, columns = np.nonzero(silhouette(centred(shape)))
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((SIDE_PX / 2, SIDE_PX / 2), abs=0.5)


def test_no_two_shapes_of_one_area_look_alike() -> None:
    def at_equal_area(shape: str) -> np.ndarray:
        radius_of_area_one = 0.3 / float(silhouette(centred(shape, 0.3), 512).mean()) ** 0.5
        return silhouette(centred(shape, 0.2 * radius_of_area_one), 512)

    for one, other in combinations(SHAPES, 2):
        a, b = at_equal_area(one), at_equal_area(other)
        assert a.sum() == pytest.approx(b.sum(), rel=0.02)
        assert (a & b).sum() / (a | b).sum() < 0.87


def test_every_colour_stands_out_from_every_background_and_from_every_other() -> None:
    for one, other in combinations((*COLOURS, *BACKGROUNDS), 2):
        assert np.linalg.norm(np.subtract(RGB[one], RGB[other])) > 70


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no way to draw the shape 'blob'"):
        silhouette(centred("blob"))
