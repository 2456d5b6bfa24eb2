"""Captions by the thousand, for collecting."""

from flux_ir.demo.captions import captions
from flux_ir.demo.scenes import vocabulary


def test_captions_differ_repeat_by_seed_and_grow_by_appending():
    few, many = captions(50, seed=3), captions(200, seed=3)
    assert len(set(many)) == 200
    assert set(few) <= set(many)
    assert many == captions(200, seed=3)
    assert many != captions(200, seed=4)
    assert {word for caption in many for word in caption.split()} <= set(vocabulary())
