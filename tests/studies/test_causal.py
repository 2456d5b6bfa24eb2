"""Editing tasks, what the judge says of them, regions, and the search; pictures are drawn, so every answer is known."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

import flux_ir
from flux_ir.demo.captions import part_of
from flux_ir.demo.drawing import draw
from flux_ir.demo.scenes import parse_caption
from flux_ir.sites import Site
from flux_ir.steering.edits import Edit
from flux_ir.studies.candidates import pursued, spots_of
from flux_ir.studies.caption_words import CONCEPTS, caption_labels, words_of
from flux_ir.studies.causal import (
    Candidate,
    EditingTask,
    Outcome,
    Trial,
    editing_tasks,
    image_rules,
    outcome,
    ready_task,
    region_of_rule,
    search,
    widened,
)

ALONE = "a large red circle in the center on a white background"
PAIR = "a small red circle left of a large blue square on a gray background"


def task(kind, concept, caption=PAIR, thing=0, **changed):
    """A task on a caption, for its object `thing` (None: the background)."""
    scene = parse_caption(caption)
    if thing is None:
        target = replace(scene, background=concept)
    else:
        things = list(scene.things)
        things[thing] = replace(things[thing], **{kind: concept})
        target = replace(scene, things=tuple(things))
    return EditingTask(kind, concept, scene, target, thing, 0)


@pytest.mark.parametrize("kind", CONCEPTS)
def test_tasks_ask_for_one_thing_that_is_not_there(kind):
    for concept in CONCEPTS[kind][:2]:
        tasks = list(islice(editing_tasks(kind, concept, "C", 3), 12))
        assert len({one.scene.caption for one in tasks}) == 12
        for one in tasks:
            words = one.scene.caption.split(), one.target.caption.split()
            assert part_of(one.scene.caption) == "C"
            assert parse_caption(one.target.caption) is not None
            assert concept in one.target.caption
            assert concept not in one.scene.caption
            if kind in ("colour", "background", "shape"):
                assert sum(before != after for before, after in zip(*words, strict=True)) == 1
            assert (one.thing is None) == (kind == "background")
            assert kind != "place" or one.scene.relation is None


def test_the_same_seed_gives_the_same_tasks_and_parts_share_no_caption():
    first, again, other = (
        [one.scene.caption for one in islice(editing_tasks("colour", "red", part, 1), 20)] for part in "AAC"
    )
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("kind", "concept", "caption", "thing"),
    [
        ("colour", "green", PAIR, 0),
        ("colour", "green", PAIR, 1),
        ("shape", "star", PAIR, 1),
        ("background", "black", PAIR, None),
        ("place", "on the left", ALONE, 0),
    ],
)
def test_outcomes_of_drawn_pictures(kind, concept, caption, thing):
    asked = task(kind, concept, caption, thing)
    target = parse_caption(asked.target.caption)  # with the place of its words
    if kind == "place":
        target = parse_caption(caption.replace("in the center", concept))
        asked = asked._replace(target=target)
    assert outcome(draw(target), asked) == (True, True)
    assert outcome(draw(asked.scene), asked) == (False, True)
    spoilt = replace(target, things=(replace(target.things[0], size="large", radius=0.22), *target.things[1:]))
    if caption == PAIR:
        assert outcome(draw(spoilt), asked) == (True, False)
        assert not outcome(draw(spoilt), asked).joint


def test_a_task_is_ready_only_where_the_unsteered_picture_is_right():
    asked = task("colour", "green")
    assert ready_task(asked, draw(asked.target)) is None
    ready = ready_task(asked, draw(asked.scene, 128))
    assert ready.cover.shape == (2, 64)
    masks = ready.cover.sum(axis=1) * 256
    assert masks[0] < masks[1]  # the small circle comes first, as in the caption
    assert ready.cover[0].reshape(8, 8)[:, 4:].sum() == 0 == ready.cover[1].reshape(8, 8)[:, :3].sum()


def test_regions_of_objects_and_of_the_background():
    ready = ready_task(task("colour", "green"), draw(parse_caption(PAIR), 128))
    mask, wide = (set(region_of_rule(ready, rule, 20).tokens) for rule in ("mask", "wide"))
    assert mask == set(np.flatnonzero(ready.cover[0] > 0))
    assert mask < wide
    assert region_of_rule(ready, "all", 20) is None
    ground = ready_task(task("background", "black", thing=None), draw(parse_caption(PAIR), 128))
    outside, clear = (set(region_of_rule(ground, rule, 20).tokens) for rule in ("mask", "wide"))
    assert clear == set(range(64)) - set(np.flatnonzero(ground.cover.sum(axis=0)))
    assert clear < outside < set(range(64))


def test_widened_reaches_the_eight_around_and_does_not_wrap():
    inside = np.zeros((8, 8), dtype=bool)
    inside[0, 7] = True
    assert {tuple(map(int, place)) for place in np.argwhere(widened(inside.reshape(-1)).reshape(8, 8))} == {
        (0, 6),
        (0, 7),
        (1, 6),
        (1, 7),
    }


def test_a_candidate_keeps_the_proportions_of_its_strengths():
    edit = Edit(vector=torch.ones(4), sites="double.0.img", unit="raw", strength=-0.5)
    assert [one.strengths for one in Candidate("one", (edit,), ("all",)).at(2.0, None)] == [(-1.0,)]
    swap = Edit(kind="set", sae="saes/one", feature=(3, 1), strength=(1.0, 0.0))
    assert [one.strengths for one in Candidate("swap", (swap,), ("word",)).at(2.0, None)] == [(2.0, 0.0)]


def test_the_search_finds_the_best_trial_and_counts_it_on_all_tasks():
    ready = ready_task(task("colour", "green"), draw(parse_caption(PAIR), 128))
    edit = Edit(vector=torch.ones(4), sites="double.0.img", unit="raw")
    candidates = [Candidate(str(number), (edit,), image_rules("colour")) for number in range(30)]
    tried = []

    def outcomes(tasks, trials):
        tried.append((len(tasks), len(trials)))
        return [Outcome(np.full(len(tasks), True), np.full(len(tasks), right(trial))) for trial in trials]

    def right(trial):
        return trial.candidate.name == "17" and trial.rule == "wide" and abs(trial.strength) >= 2

    best, share = search(outcomes, candidates, (4.0, 2.0, 1.0), [ready] * 10)
    assert best == Trial(candidates[17], 2.0, "wide")  # as good as 4, and weaker
    assert share == 1.0
    assert tried == [(3, 30 * 3 * 3), (3, 24), (4, 6)]


def test_pursuit_finds_the_rows_that_a_sum_is_of():
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    rows[:3] = torch.eye(16)[:3] * 5
    numbers, weights = pursued(2 * rows[0] - 0.5 * rows[2], rows, 2)
    assert numbers == (0, 2)
    assert weights == pytest.approx((2.0, -0.5), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "thing", "level", "words"),
    [
        ("colour", 0, "word", "red"),
        ("colour", 1, "word", "blue"),
        ("shape", 1, "word", "square"),
        ("shape", 0, "phrase", "a small red circle"),
        ("colour", 1, "phrase", "a large blue square"),
        ("background", None, "word", "gray"),
        ("background", None, "phrase", "on a gray background"),
    ],
)
def test_the_words_that_say_a_thing(kind, thing, level, words):
    scene = parse_caption(PAIR)
    where = words_of(scene, kind, thing, level, 20)
    assert " ".join(PAIR.split()[place] for place in where) == words
    ready = ready_task(task("colour", "green", thing=0), draw(scene, 128))
    ready = ready._replace(task=ready.task._replace(kind=kind, thing=thing))
    assert region_of_rule(ready, level, 20).tokens == tuple(where)
    assert region_of_rule(ready, "text", 20) is None


def test_the_words_of_a_place():
    where = words_of(parse_caption(ALONE), "place", 0, "word", 20)
    assert [ALONE.split()[place] for place in where] == ["in", "the", "center"]


def test_the_rest_is_what_describes_no_object():
    where = words_of(parse_caption(PAIR), "background", None, "rest", 16)
    assert " ".join(PAIR.split()[place] for place in where if place < 14) == "a left of a on a gray background"
    assert where[-3:] == [13, 14, 15]
    assert {one.rules for one in spots_of(Site.parse("t5.0"), "colour", "red")} == {("word",), ("phrase",), ("text",)}
    assert ("rest",) in {one.rules for one in spots_of(Site.parse("t5.0"), "background", "gray")}


def test_each_token_of_flux_tinys_t5_is_one_word():
    with flux_ir.load_model("flux-tiny").text_encoders() as encoders:
        for caption in (ALONE, PAIR):
            assert encoders.t5.length(caption) == len(caption.split()) + 1  # the last says that the text ends


def test_the_labels_of_words():
    labels = caption_labels([parse_caption(ALONE), parse_caption(PAIR)], 20)
    bits = {(one.kind, one.concept, one.level): labels.of(one) for one in labels.questions}
    red = bits["colour", "red", "word"]
    assert [np.flatnonzero(row & 1).tolist() for row in red] == [[2], [2]]
    assert [np.flatnonzero(row).tolist() for row in red] == [[2], [2, 8]]  # blue is the only other colour
    assert [np.flatnonzero(row & 1).tolist() for row in bits["shape", "square", "phrase"]] == [[], [6, 7, 8, 9]]
    assert (bits["background", "gray", "text"] & 1).sum(axis=1).tolist() == [0, 20]
    assert [np.flatnonzero(row).tolist() for row in bits["place", "in the center", "word"]] == [[4, 5, 6], []]
