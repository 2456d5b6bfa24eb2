"""The monosemanticity score in closed form: equal to the pairwise loop, and z and p to what all permutations give."""

import math
from itertools import permutations

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.features.coherence import coherence
from tests.features.dense import parts_of


def by_the_loop(activations, embeddings):
    """The definition, pair by pair, in plain Python."""
    units = [row / row.norm() for row in embeddings.double()]
    scores = []
    for column in activations.double().T:
        low, high = column.min(), column.max()
        a = ((column - low) / (high - low)).tolist()
        above = below = 0.0
        for i in range(len(a)):
            for j in range(i):
                above += a[i] * a[j] * float(units[i] @ units[j])
                below += a[i] * a[j]
        scores.append(above / below if below else math.nan)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def test_the_closed_form_is_the_pairwise_loop(draw):
    """Sparse features, one that is active everywhere, one with a strong and a weak image, a dead one, a lonely one."""
    activations = torch.rand(23, 9, generator=draw) * (torch.rand(23, 9, generator=draw) < 0.3)
    activations[:, 5] = 1 + torch.rand(23, generator=draw)
    activations[:, 6:] = 0
    activations[[2, 11], 6] = torch.tensor([5.0, 1e-3])
    activations[4, 7] = 1.0
    embeddings = torch.randn(23, 6, generator=draw) + 0.5
    found = coherence(parts_of(activations), embeddings, 9)
    expected = by_the_loop(activations, embeddings)
    assert expected.isnan().tolist() == [False] * 7 + [True] * 2
    torch.testing.assert_close(found.score, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found.z.isnan().tolist() == expected.isnan().tolist()
    assert found.p.isnan().all()


def test_the_length_of_parts_and_the_unit_of_activations_change_nothing(draw):
    activations = torch.rand(10, 4, generator=draw) * (torch.rand(10, 4, generator=draw) < 0.6)
    embeddings = torch.randn(10, 5, generator=draw)
    one = coherence(parts_of(activations, part=10), embeddings, 4, permutations=19)
    other = coherence(parts_of(activations * 8, part=1), embeddings * 3, 4, permutations=19, memory_bytes=1)
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_z_is_measured_by_the_mean_and_deviation_over_all_permutations(draw, n):
    activations = torch.rand(n, 3, generator=draw) + 0.1
    activations[0] = 0
    activations[1, 1] = 0  # with n = 2 nothing is left
    embeddings = torch.randn(n, 4, generator=draw)
    found = coherence(parts_of(activations), embeddings, 3)
    every = torch.stack([by_the_loop(activations, embeddings[list(order)]) for order in permutations(range(n))])
    deviation = every.std(dim=0, correction=0)
    expected = (found.score - every.mean(dim=0)) / torch.where(deviation > 1e-9, deviation, torch.nan)
    torch.testing.assert_close(found.z, expected, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_p_is_the_share_of_permutations_that_score_as_high(draw):
    """Drawn ones against all of them: 6 images, of which a feature has 2 that are twins."""
    activations = torch.zeros(6, 2)
    activations[:2, 0] = 1.0
    activations[2:5, 1] = torch.tensor([1.0, 0.5, 0.2])
    activations[5] = 1e-6
    embeddings = torch.randn(6, 3, generator=draw)
    embeddings[1] = embeddings[0]
    found = coherence(parts_of(activations), embeddings, 2, permutations=2000, generator=draw)
    every = torch.stack([by_the_loop(activations, embeddings[list(order)]) for order in permutations(range(6))])
    share = (every >= by_the_loop(activations, embeddings) - 1e-9).double().mean(dim=0)
    torch.testing.assert_close(found.p, share, rtol=0, atol=0.04)


def test_no_p_is_zero_and_a_feature_without_meaning_has_no_small_ones(draw):
    embeddings = torch.cat([torch.randn(40, 8, generator=draw) * 0.1 + 1, torch.randn(60, 8, generator=draw)])
    activations = torch.zeros(100, 60)
    activations[:40, 0] = 1 + torch.rand(40, generator=draw)  # chooses the images that are alike
    for feature in range(1, 60):
        activations[torch.randperm(100, generator=draw)[:20], feature] = 1 + torch.rand(20, generator=draw)
    found = coherence(parts_of(activations), embeddings, 60, permutations=99, generator=draw)
    assert found.p[0].item() == pytest.approx(1 / 100)
    assert found.z[0] > 10
    assert 0.35 < found.p[1:].mean() < 0.65
    assert abs(found.z[1:].mean()) < 0.5


def test_the_same_seed_draws_the_same_permutations(draw):
    activations, embeddings = torch.rand(12, 5, generator=draw), torch.randn(12, 3, generator=draw)
    twice = [coherence(parts_of(activations), embeddings, 5, permutations=20) for _ in range(2)]
    assert torch.equal(twice[0].p, twice[1].p)


def test_embeddings_that_say_nothing_are_refused(draw):
    activations, embeddings = torch.rand(4, 2, generator=draw), torch.randn(4, 3, generator=draw)
    with pytest.raises(FluxIRError, match="got 3 embeddings for 4 images"):
        coherence(parts_of(activations), embeddings[:3], 2)
    for wrong in (0.0, math.nan):
        broken = embeddings.clone()
        broken[2] = wrong
        with pytest.raises(FluxIRError, match="of some length: that of image 2 is not"):
            coherence(parts_of(activations), broken, 2)
