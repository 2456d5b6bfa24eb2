"""Labels of pictures as drawn: the patches an object covers, what is left out, and pictures that disagree."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from flux_ir.demo.scenes import COLOURS, PLACES, RELATIONS, SHAPES, parse_caption, scenes
from flux_ir.errors import FluxIRError
from flux_ir.studies.judged import Judged, judge_collection
from flux_ir.studies.labels import (
    IN_ALL,
    POSITIVE,
    Question,
    Task,
    check_apart,
    check_sources_apart,
    known_answers,
    permuted,
)
from tests.studies.drawn import TrueScenes, drawn, of_colour, true_cover


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("drawn"), 60, 0)


@pytest.fixture(scope="module")
def judged(source):
    return judge_collection(source)


@pytest.fixture(scope="module")
def labels(judged):
    return known_answers(judged)


def colour(name, level):
    return Question("colour", name, level)


def test_the_cover_of_every_patch_is_that_of_the_drawn_objects(source, judged):
    expected = np.stack([true_cover(scene) for scene in source.scenes])
    assert np.abs(judged.cover - expected).max() < 0.13  # 2 of 16 rows of pixels: a soft edge
    assert np.abs(judged.cover - expected).mean() < 0.002
    assert all(right.all() for right in judged.agrees.values())


@pytest.mark.parametrize("name", COLOURS)
def test_labels_of_a_colour_are_those_of_the_drawn_cover(source, judged, labels, name):
    share = np.stack([of_colour(scene, name) for scene in source.scenes])
    every = np.stack([true_cover(scene) for scene in source.scenes])
    blurred = (
        (np.abs(every - 0.5) < 0.02).any(1) | (np.abs(every - 0.05) < 0.02).any(1) | (np.abs(every - 0.9) < 0.03).any(1)
    )
    for level, negatives, positive, counted in (
        ("any", "all", share > 0.5, (share > 0.5) | (share < 0.05)),
        ("any", "hard", share > 0.5, (share > 0.5) | ((share < 0.05) & (every > 0.5).any(1))),
        ("interior", "all", share > 0.9, (every > 0.9).any(1) | (every.sum(1) < 0.05)),
        ("interior", "hard", share > 0.9, (every > 0.9).any(1)),
    ):
        found = labels.split(Task(colour(name, level), negatives))
        sure = ~blurred
        np.testing.assert_array_equal(found[0][sure], (positive & counted)[sure], err_msg=f"{level} {negatives}")
        np.testing.assert_array_equal(found[1][sure], counted[sure], err_msg=f"{level} {negatives}")


def test_backgrounds_are_the_patches_without_objects(source, labels):
    every = np.stack([true_cover(scene).sum(0) for scene in source.scenes])
    white = np.array([scene.background == "white" for scene in source.scenes])[:, None]
    positive, counted = labels.split(Task(Question("background", "white", "interior"), "hard"))
    sure = np.abs(every - 0.05) > 0.02
    np.testing.assert_array_equal(positive[sure], ((every < 0.05) & white)[sure])
    np.testing.assert_array_equal(counted[sure], (every < 0.05)[sure])
    positive, counted = labels.split(Task(Question("background", "white", "any"), "all"))
    sure &= np.abs(every - 0.5) > 0.02
    np.testing.assert_array_equal(positive[sure], ((every < 0.5) & white)[sure])
    assert (counted | ~white.repeat(64, 1) | (every > 0.45)).all()
    assert counted[~white[:, 0]].all()  # another background covers nothing with white


def test_pictures_have_what_their_captions_name(source, labels):
    for shape in SHAPES:
        has = np.array([any(thing.shape == shape for thing in scene.things) for scene in source.scenes])
        two = np.array([len(scene.things) == 2 for scene in source.scenes])
        positive, counted = labels.split(Task(Question("shape", shape, "image"), "all"))
        np.testing.assert_array_equal(positive, has)
        assert counted.all()
        positive, counted = labels.split(Task(Question("shape", shape, "image"), "hard"))
        np.testing.assert_array_equal(positive, has & two)
        np.testing.assert_array_equal(counted, two)


def test_a_relation_implies_no_place(source, labels):
    alone = np.array([len(scene.things) == 1 for scene in source.scenes])
    for place in PLACES:
        bits = labels.of(Question("place", place, "image"))
        assert not bits[~alone].any()
        expected = [scene.things[0].place == place for scene in source.scenes]
        np.testing.assert_array_equal((bits & POSITIVE) != 0, alone & expected)
    for relation in RELATIONS:
        bits = labels.of(Question("relation", relation, "image"))
        np.testing.assert_array_equal((bits & POSITIVE) != 0, [scene.relation == relation for scene in source.scenes])
        assert (bits & IN_ALL).all()


def test_positives_are_counted_by_the_shape_they_are_of(labels):
    for question, counts in labels.by_shape.items():
        if question.kind in ("colour", "size") and question.of_tokens:
            assert sum(counts.values()) == ((labels.of(question) & POSITIVE) != 0).sum()
    assert labels.by_shape[colour("red", "any")].keys() == set(SHAPES)
    assert labels.by_shape[Question("background", "white", "any")] == {}


def test_pictures_that_disagree_are_dropped_and_counted(tmp_path):
    source = drawn(tmp_path, 20, 2)
    shown = list(source.scenes)

    def asks(number, scene):
        source.scenes[number] = scene
        source.generations[number] = replace(source.generations[number], prompt=scene.caption)

    one = next(i for i, scene in enumerate(shown) if scene.relation is None)
    first, second, third, fourth = [i for i, scene in enumerate(shown) if scene.relation][:4]
    other = {"white": "black", "black": "gray", "gray": "beige", "beige": "white"}
    asks(first, replace(shown[first], background=other[shown[first].background]))
    asks(second, parse_caption("a small red circle on the left on a white background"))
    things = shown[third].things
    asks(
        third,
        replace(
            shown[third], things=(replace(things[0], colour="red" if things[0].colour != "red" else "blue"), things[1])
        ),
    )
    things = shown[fourth].things
    asks(
        fourth,
        replace(
            shown[fourth], things=(replace(things[0], shape="ring" if things[0].shape != "ring" else "star"), things[1])
        ),
    )
    moved = "at the top" if shown[one].things[0].place != "at the top" else "at the bottom"
    asks(one, replace(shown[one], things=(replace(shown[one].things[0], place=moved),)))
    judged = judge_collection(source)
    labels = known_answers(judged)
    assert labels.dropped == Counter(
        {
            "the picture shows another number of objects": 1,
            "the picture shows another background": 1,
            "the picture shows another colour of an object": 1,
            "the picture shows another shape (only of questions about shapes)": 1,
            "the picture shows another place (only of questions about places)": 1,
        }
    )
    assert set(range(20)) - set(labels.images.tolist()) == {first, second, third}
    assert labels.prompts == tuple(source.scenes[i].caption for i in labels.images)
    at = labels.images.tolist().index
    for question in labels.questions:
        if question.kind == "shape":
            assert not labels.of(question)[at(fourth)].any()
        if question.kind == "place":
            assert not labels.of(question)[at(one)].any()
        if question.kind == "background" and question.of_tokens:
            assert labels.of(question)[at(fourth)].any()


def test_nothing_left_is_an_error(judged):
    nothing = {**judged.agrees, "number": np.zeros(len(judged.images), bool)}
    with pytest.raises(FluxIRError, match="of 60 none does"):
        known_answers(Judged(judged.images, judged.scenes, judged.cover, nothing))


def test_what_the_judge_saw_is_kept_and_not_looked_at_again(tmp_path):
    source = drawn(tmp_path, 4, 4)
    first = judge_collection(source, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    content = path.read_bytes()
    for picture in (tmp_path / "pictures" / "000000").iterdir():
        picture.unlink()
    again = judge_collection(source, tmp_path / "kept")
    np.testing.assert_array_equal(again.cover, first.cover)
    assert {aspect: right.tolist() for aspect, right in again.agrees.items()} == {
        aspect: right.tolist() for aspect, right in first.agrees.items()
    }
    assert path.read_bytes() == content
    with pytest.raises(FluxIRError, match=r"every generation must have its picture: 4 of 4 have none.*--save_images"):
        judge_collection(source)


def test_prompts_that_are_no_captions_are_refused(tmp_path):
    source = TrueScenes(tmp_path, list(islice(scenes(0, "train"), 2)))
    source.generations[1] = replace(source.generations[1], prompt="a cat")
    with pytest.raises(
        FluxIRError, match=r"labels come from the captions of flux-tiny's world: got 'a cat'.*--labels FILE"
    ):
        judge_collection(source)


def test_sets_with_a_common_prompt_are_refused():
    check_apart(("A", ["one", "two", "one"]), ("B", ["three"]))
    for first, second in ((["one", "two"], ["three", "two"]), (["two"], ["two"])):
        with pytest.raises(FluxIRError, match="must share no prompt: A and A both have 'two'"):
            check_apart(("A", first), ("A", second))


def test_pictures_without_prompts_are_apart_if_their_captures_are(tmp_path):
    bare, other = drawn(tmp_path, 2, 7), drawn(tmp_path, 2, 8)
    for one in (bare, other):
        one.generations = [replace(generation, prompt="") for generation in one.generations]
    check_sources_apart(("A", bare), ("B", other))
    with pytest.raises(FluxIRError, match="must share no picture: A and A are the same captures"):
        check_sources_apart(("A", bare), ("A", bare))


def test_some_of_the_pictures(labels):
    kept = np.arange(len(labels.images)) % 3 == 0
    fewer = labels.chosen(kept)
    assert fewer.prompts == labels.prompts[::3]
    for question in labels.questions:
        np.testing.assert_array_equal(fewer.of(question), labels.of(question)[kept])
    assert len(set(fewer.groups.tolist())) == len(set(fewer.prompts))


def test_a_permutation_moves_prompts_as_a_whole(labels):
    prompts = tuple(f"prompt {number}" for number in (0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5))
    some = replace(labels.chosen(np.arange(60) < 12), prompts=prompts)
    seen = set()
    for seed in range(40):
        order = permuted(some, seed)
        assert sorted(order) == list(range(12))
        moved = [prompts[i] for i in order]
        for start in (0, 4, 8):  # three prompts with three pictures, three with one
            assert order[start : start + 3].tolist() in ([0, 1, 2], [4, 5, 6], [8, 9, 10])
        assert {moved[i] for i in (3, 7, 11)} == {"prompt 1", "prompt 3", "prompt 5"}
        seen.add(tuple(order))
    assert len(seen) > 20
    np.testing.assert_array_equal(permuted(some, 3), permuted(some, 3))
