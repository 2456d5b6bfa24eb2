"""Neighbours of features against plain loops: by direction, by activity, in another dictionary."""

import math

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.features import decoder_view
from flux_ir.features.decoder_view import (
    Active,
    active_together,
    best_cosine,
    encoder_decoder_cosine,
    nearest_by_cosine,
)


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last of another size."""
    monkeypatch.setattr(decoder_view, "BLOCK_VALUES", 40)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_the_nearest_by_direction_are_those_of_the_loop(draw):
    W_dec = torch.randn(11, 5, generator=draw) * torch.rand(11, 1, generator=draw)
    W_dec[4] = 0
    found = nearest_by_cosine(W_dec, 3)
    for f in range(11):
        others = [(cosine(W_dec[f], W_dec[g]), g) for g in range(11) if g not in (f, 4) and f != 4]
        expected = sorted(others, key=lambda pair: (-pair[0], pair[1]))[:3]
        assert found.feature[f].tolist() == ([g for _, g in expected] or [-1] * 3)
        if expected:
            assert found.likeness[f].tolist() == pytest.approx([c for c, _ in expected], abs=1e-6)
        else:
            assert found.likeness[f].isnan().all()


def test_a_small_dictionary_has_fewer_neighbours(draw):
    found = nearest_by_cosine(torch.randn(3, 4, generator=draw), 5)
    assert (found.feature[:, 2:] == -1).all()
    assert found.likeness[:, 2:].isnan().all()
    assert (found.feature[:, :2] >= 0).all()


@pytest.mark.parametrize("block_values", [13 * 4, 10**6])
def test_activity_together_is_counted_as_sets_are(draw, block_values):
    """27 images in parts of 10; feature 3 is dead, feature 5 never meets another."""
    active = torch.rand(27, 13, generator=draw) < 0.3
    active[:, 3] = False
    active[:, 5] = False
    active[0] = False
    active[0, 5] = True

    def read():
        for start in range(0, 27, 10):
            rows = active[start : start + 10]
            item, feature = rows.nonzero(as_tuple=True)
            yield Active(len(rows), item, feature)

    found = active_together(read, 13, most=4, block_values=block_values)
    sets = [set(active[:, f].nonzero().flatten().tolist()) for f in range(13)]
    for f in range(13):
        meets = [
            (len(sets[f] & sets[g]) / len(sets[f] | sets[g]), g) for g in range(13) if g != f and sets[f] & sets[g]
        ]
        expected = sorted(meets, key=lambda pair: (-pair[0], pair[1]))[:4]
        lacking = 4 - len(expected)
        assert found.feature[f].tolist() == [g for _, g in expected] + [-1] * lacking
        values = [share for share, _ in expected] + [math.nan] * lacking
        assert found.likeness[f].tolist() == pytest.approx(values, nan_ok=True)


def test_counts_that_float32_cannot_hold_are_refused():
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(FluxIRError, match="at most 16777216 images or tokens: got 20000000"):
        active_together(lambda: [Active(20_000_000, none, none)], 3)


def test_a_dictionary_is_found_again_in_a_shuffled_copy_of_it(draw):
    W_dec = torch.randn(11, 6, generator=draw)
    order = torch.randperm(11, generator=draw)
    likeness, row = best_cosine(W_dec, 3 * W_dec[order])
    torch.testing.assert_close(likeness, torch.ones(11))
    assert torch.equal(order[row], torch.arange(11))


def test_the_best_in_another_dictionary_is_that_of_the_loop(draw):
    W_dec, other = torch.randn(9, 4, generator=draw), torch.randn(7, 4, generator=draw)
    W_dec[2] = 0
    likeness, row = best_cosine(W_dec, other)
    for f in range(9):
        cosines = [cosine(W_dec[f], other[g]) for g in range(7)]
        if f == 2:
            assert (likeness[f].isnan(), row[f].item()) == (True, -1)
        else:
            assert likeness[f].item() == pytest.approx(max(cosines), abs=1e-6)
            assert row[f] == cosines.index(max(cosines))


def test_reading_and_writing_directions_are_compared(draw):
    W_dec = torch.randn(4, 5, generator=draw)
    encoder = torch.stack([2 * W_dec[0], -W_dec[1], torch.zeros(5), torch.randn(5, generator=draw)])
    found = encoder_decoder_cosine(encoder, W_dec)
    assert found[:2].tolist() == pytest.approx([1, -1], abs=1e-6)
    assert found[2].isnan()
    assert found[3].item() == pytest.approx(cosine(encoder[3], W_dec[3]), abs=1e-6)
