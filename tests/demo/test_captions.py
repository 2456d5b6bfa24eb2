"""Captions by the thousand, for collecting."""

import pytest

from flux_ir.demo.captions import MOST_ALONE, PARTS, captions, part_of
from flux_ir.demo.scenes import vocabulary


def test_captions_differ_repeat_by_seed_and_grow_by_appending():
    few, many = captions(50, seed=3), captions(200, seed=3)
    assert len(set(many)) == 200
    assert set(few) <= set(many)
    assert many == captions(200, seed=3)
    assert many != captions(200, seed=4)
    assert {word for caption in many for word in caption.split()} <= set(vocabulary())


def test_parts_share_no_caption_whatever_the_seed():
    parts = {part: {*captions(300, seed, part)} for seed, part in enumerate(PARTS)}
    assert len(set().union(*parts.values())) == 1200
    assert all(part_of(caption) == part for part, some in parts.items() for caption in some)


def test_captions_of_one_object_are_as_many_as_asked_for():
    some = captions(500, seed=1, part="C", alone=200)
    assert (
        sum(
            not any(word in f" {caption} " for word in (" left of ", " right of ", " above ", " below "))
            for caption in some
        )
        == 200
    )
    for part in PARTS:
        assert len(captions(MOST_ALONE[part], 0, part, alone=MOST_ALONE[part])) == MOST_ALONE[part]
    with pytest.raises(ValueError, match=r"alone must be in 0\.\.340: got 341"):
        captions(500, 0, "A", alone=341)
