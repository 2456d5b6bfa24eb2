"""The judge calls every scene as drawn right, also when degraded, and every wrong picture wrong in the right field."""

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image, ImageFilter

from flux_ir.demo.drawing import RGB, SIDE_PX, draw, silhouette
from flux_ir.demo.judge import ObjectVerdict, Sight, TallyRow, Verdict, find_objects, judge, look, match_objects, tally
from flux_ir.demo.scenes import PLACES, RADIUS, RELATIONS, SHAPES, Scene, Thing, scenes

TRUE_SCENES = list(islice(scenes(7, "train"), 400))
RIGHT = ObjectVerdict(colour=True, place=None, size=True, shape=True)
MISSING = ObjectVerdict(colour=False, place=None, size=False, shape=False)


def thing(size: str, colour: str, shape: str, place: str) -> Thing:
    x, y = PLACES[place]
    return Thing(size, colour, shape, place, x, y, RADIUS[size])


def pair(first: str, relation: str, second: str, background: str = "white") -> Scene:
    """A two-object scene from phrases such as "large red circle"."""
    places = RELATIONS[relation]
    one, two = (thing(*words.split(), place) for words, place in zip((first, second), places, strict=True))
    return Scene((one, two), relation, background)


RED_CIRCLE = Scene((thing("large", "red", "circle", "in the center"),), None, "white")
STAR_AND_RING = pair("small blue star", "left of", "large pink ring", "gray")


def jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return np.asarray(Image.open(file))


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(rng.normal(picture.astype(np.float32), 4), 0, 255).astype(np.uint8)


def blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)))


def test_every_true_scene_is_right_in_everything() -> None:
    rows = tally((judge(draw(scene), scene), scene) for scene in TRUE_SCENES)
    assert len(rows) == 7 + 10
    assert [row for row in rows if row.share < 1] == []


@pytest.mark.parametrize("degrade", [jpeg, noisy, blurred])
def test_mild_degradation_changes_almost_no_verdict(
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    rows = tally((judge(degrade(draw(scene), rng), scene), scene) for scene in TRUE_SCENES[:60])
    assert len(rows) == 7 + 10
    assert [row for row in rows if row.share < 0.99] == []


def test_the_judge_works_at_other_picture_sizes() -> None:
    for side_px in (64, 256):
        rows = tally((judge(draw(scene, side_px), scene), scene) for scene in TRUE_SCENES[:15])
        assert [row for row in rows if row.share < 1] == []


def test_the_four_measures_of_an_object_are_found_where_they_are() -> None:
    scene = TRUE_SCENES[0]
    seen = look(draw(scene)).objects
    for real in scene.things:
        nearest = min(seen, key=lambda s: abs(s.x - real.x) + abs(s.y - real.y))
        assert (nearest.x, nearest.y, nearest.radius) == pytest.approx((real.x, real.y, real.radius), abs=0.008)


def test_the_pixels_of_every_object_are_those_it_was_drawn_on() -> None:
    for scene in TRUE_SCENES[:60]:
        sight, masks = find_objects(draw(scene))
        assert masks.shape == (len(scene.things), SIDE_PX, SIDE_PX)
        assert masks.sum(0).max() == 1
        for thing, found in zip(scene.things, match_objects(sight.objects, scene), strict=True):
            drawn = silhouette(thing)
            assert (masks[found] ^ drawn).sum() <= 0.05 * drawn.sum(), scene.caption
            assert not (masks[found] & ~np.asarray(_grown(drawn))).any()


def _grown(mask: np.ndarray) -> Image.Image:
    """The mask and one pixel around it."""
    return Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(3)).convert("1")


def test_a_picture_without_objects_has_no_masks() -> None:
    sight, masks = find_objects(draw(Scene((), None, "beige")))
    assert sight == Sight("beige", [])
    assert masks.shape == (0, SIDE_PX, SIDE_PX)


def test_found_objects_are_matched_in_the_order_of_the_caption() -> None:
    swapped = replace(STAR_AND_RING, things=STAR_AND_RING.things[::-1])
    seen = look(draw(STAR_AND_RING)).objects
    assert [o.shape for o in seen] == ["ring", "star"]  # the largest first
    assert match_objects(seen, STAR_AND_RING) == (1, 0)
    assert match_objects(seen, swapped) == (0, 1)
    assert match_objects(seen[:1], STAR_AND_RING) == (None, 0)
    assert match_objects([], STAR_AND_RING) == (None, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape_is_wrong_in_shape_only(shape: str) -> None:
    shown = replace(RED_CIRCLE, things=(thing("large", "red", shape, "in the center"),))
    assert judge(draw(shown), RED_CIRCLE) == Verdict(
        background=True,
        number=True,
        relation=None,
        objects=(ObjectVerdict(colour=True, place=True, size=True, shape=shape == "circle"),),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("asked", "shown"), [("small", "large"), ("large", "small")])
def test_the_other_size_is_wrong_in_size_only(shape: str, asked: str, shown: str) -> None:
    wanted = Scene((thing(asked, "cyan", shape, "at the top"),), None, "black")
    verdict = judge(draw(replace(wanted, things=(thing(shown, "cyan", shape, "at the top"),))), wanted)
    assert verdict.objects == (ObjectVerdict(colour=True, place=True, size=False, shape=True),)


def test_another_place_is_wrong_in_place_only() -> None:
    shown = replace(RED_CIRCLE, things=(thing("large", "red", "circle", "on the left"),))
    assert judge(draw(shown), RED_CIRCLE).objects == (ObjectVerdict(colour=True, place=False, size=True, shape=True),)


def test_another_colour_is_wrong_in_colour_only() -> None:
    shown = replace(RED_CIRCLE, things=(thing("large", "orange", "circle", "in the center"),))
    assert judge(draw(shown), RED_CIRCLE).objects == (ObjectVerdict(colour=False, place=True, size=True, shape=True),)


@pytest.mark.parametrize("background", ["black", "gray", "beige"])
def test_another_background_is_wrong_in_background_only(background: str) -> None:
    verdict = judge(draw(replace(RED_CIRCLE, background=background)), RED_CIRCLE)
    assert not verdict.background
    assert verdict.objects == (ObjectVerdict(colour=True, place=True, size=True, shape=True),)


def test_a_coloured_ground_is_no_background_at_all() -> None:
    scene = replace(RED_CIRCLE, background="yellow")
    assert look(draw(scene)).background == "yellow"
    assert not any(judge(draw(scene), replace(scene, background=b)).background for b in ("white", "beige"))


def test_a_colour_between_two_names_is_none_of_them() -> None:
    picture = draw(RED_CIRCLE)
    (mask,) = find_objects(picture)[1]
    between = (np.array(RGB["red"]) + np.array(RGB["blue"])) // 2
    (seen,) = look(np.where(mask[..., None], between, picture).astype(np.uint8)).objects
    assert (seen.colour, seen.shape) == (None, "circle")
    assert look(np.full((SIDE_PX, SIDE_PX, 3), (90, 200, 140), dtype=np.uint8)) == Sight(None, [])


def test_objects_on_the_wrong_sides_are_wrong_in_relation_only() -> None:
    shown = pair("large pink ring", "left of", "small blue star", "gray")
    assert judge(draw(shown), STAR_AND_RING) == Verdict(True, True, False, (RIGHT, RIGHT))


def test_objects_along_the_other_axis_are_wrong_in_relation_only() -> None:
    shown = pair("small blue star", "above", "large pink ring", "gray")
    assert judge(draw(shown), STAR_AND_RING) == Verdict(True, True, False, (RIGHT, RIGHT))


def test_swapped_colours_are_wrong_in_what_the_colours_are_bound_to() -> None:
    shown = pair("small pink star", "left of", "large blue ring", "gray")
    verdict = judge(draw(shown), STAR_AND_RING)
    assert verdict.relation is False
    assert [(o.colour, o.shape, o.size) for o in verdict.objects] == [(True, False, False)] * 2


def test_one_wrong_colour_of_two_is_wrong_for_that_object_only() -> None:
    shown = pair("small green star", "left of", "large pink ring", "gray")
    assert judge(draw(shown), STAR_AND_RING) == Verdict(True, True, True, (RIGHT._replace(colour=False), RIGHT))


def test_objects_of_one_colour_are_told_apart_by_shape() -> None:
    asked = pair("large red circle", "above", "large red cross")
    assert judge(draw(asked), asked).relation is True
    assert judge(draw(pair("large red cross", "above", "large red circle")), asked).relation is False


def test_objects_of_one_colour_and_shape_are_told_apart_by_size() -> None:
    asked = pair("large red ring", "right of", "small red ring")
    assert judge(draw(asked), asked).relation is True
    assert judge(draw(pair("small red ring", "right of", "large red ring")), asked).relation is False


def test_twins_need_only_the_right_axis() -> None:
    asked = pair("large red ring", "right of", "large red ring")
    assert judge(draw(asked), asked).relation is True
    assert judge(draw(pair("large red ring", "left of", "large red ring")), asked).relation is True
    assert judge(draw(pair("large red ring", "above", "large red ring")), asked).relation is False


def test_a_missing_object_is_wrong_in_everything_it_should_have_been() -> None:
    only_the_ring = replace(STAR_AND_RING, things=STAR_AND_RING.things[1:])
    assert judge(draw(only_the_ring), STAR_AND_RING) == Verdict(True, False, False, (MISSING, RIGHT))


def test_an_empty_picture_has_a_background_and_nothing_else() -> None:
    empty = replace(RED_CIRCLE, things=())
    assert look(draw(empty)) == Sight("white", [])
    assert judge(draw(empty), RED_CIRCLE) == Verdict(True, False, None, (MISSING._replace(place=False),))


def test_a_third_object_is_wrong_in_number_and_relation() -> None:
    third = thing("small", "green", "square", "at the bottom")
    crowded = replace(STAR_AND_RING, things=(*STAR_AND_RING.things, third))
    assert judge(draw(crowded), STAR_AND_RING) == Verdict(True, False, False, (RIGHT, RIGHT))


def test_a_second_object_beside_a_single_one_is_wrong_in_number_and_place() -> None:
    asked = Scene((thing("small", "red", "circle", "at the top"),), None, "white")
    crowded = replace(asked, things=(*asked.things, thing("small", "green", "square", "at the bottom")))
    verdict = judge(draw(crowded), asked)
    assert not verdict.number
    assert verdict.objects == (ObjectVerdict(colour=True, place=False, size=True, shape=True),)


def test_specks_are_no_objects() -> None:
    picture = draw(RED_CIRCLE).copy()
    picture[100:108, 20:28] = RGB["blue"]
    assert judge(picture, RED_CIRCLE).number
    picture[100:112, 20:32] = RGB["blue"]
    assert not judge(picture, RED_CIRCLE).number


def test_a_blob_like_no_shape_has_none() -> None:
    picture = draw(replace(RED_CIRCLE, things=())).copy()
    picture[60:68, 10:118] = RGB["red"]
    assert look(picture).objects[0].shape is None


def test_a_star_that_lost_its_tips_is_still_a_star() -> None:
    """What a strongly compressing autoencoder makes of a small purple star on gray."""
    star = thing("small", "purple", "star", "in the center")
    across, down = np.meshgrid(np.arange(SIDE_PX) + 0.5, np.arange(SIDE_PX) + 0.5)
    near = np.hypot(across - star.x * SIDE_PX, down - star.y * SIDE_PX) < 0.62 * star.radius * SIDE_PX
    picture = draw(Scene((), None, "gray")).copy()
    picture[silhouette(star) & near] = RGB["purple"]
    assert look(picture).objects[0].shape == "star"


def test_objects_a_few_pixels_apart_stay_two() -> None:
    left, right = (thing("large", "purple", "square", place) for place in ("on the left", "on the right"))
    reach = 0.85 * RADIUS["large"]
    near = Scene((replace(left, x=0.5 - reach - 0.012), replace(right, x=0.5 + reach + 0.012)), "left of", "gray")
    assert judge(draw(near), near) == Verdict(True, True, True, (RIGHT, RIGHT))


def test_tally_counts_one_and_two_object_captions_apart() -> None:
    wrong_ring = pair("small blue star", "left of", "large pink cross", "gray")
    judged = [
        (judge(draw(RED_CIRCLE), RED_CIRCLE), RED_CIRCLE),
        (judge(draw(replace(RED_CIRCLE, background="gray")), RED_CIRCLE), RED_CIRCLE),
        (judge(draw(wrong_ring), STAR_AND_RING), STAR_AND_RING),
    ]
    rows = tally(judged)
    assert TallyRow(1, "background", 0.5, 2) in rows
    assert TallyRow(1, "everything", 0.5, 2) in rows
    assert TallyRow(1, "place", 1.0, 2) in rows
    assert TallyRow(2, "shape of each", 0.5, 2) in rows
    assert TallyRow(2, "both shapes", 0.0, 1) in rows
    assert TallyRow(2, "relation and both colours", 1.0, 1) in rows
    assert TallyRow(2, "everything", 0.0, 1) in rows


def test_tally_leaves_out_what_was_never_judged() -> None:
    assert tally([]) == []
    assert {row.captions for row in tally([(judge(draw(RED_CIRCLE), RED_CIRCLE), RED_CIRCLE)])} == {1}


@pytest.mark.parametrize(
    "picture",
    [np.zeros((128, 64, 3), np.uint8), np.zeros((3, 128, 128), np.uint8), np.zeros((128, 128, 3), np.float32)],
)
def test_anything_but_a_square_byte_picture_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a picture is uint8 \[side, side, 3\], got"):
        look(picture)
