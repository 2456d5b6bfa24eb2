"""Features of two sides matched: likeness against brute force, the assignment against the Hungarian one, the null."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array, csr_array

from flux_ir.features import matching
from flux_ir.features.matching import (
    PairedActivations,
    assign,
    candidate_pairs,
    compare_with_null,
    correlations,
    cosines,
    images_permuted,
    permuted_groups,
    random_directions,
)

ROWS, A, B = 60, 9, 7


def sparse(seed, rows, columns, density=0.3):
    draw = np.random.default_rng(seed)
    return draw.random((rows, columns)) * (draw.random((rows, columns)) < density)


@pytest.fixture
def both():
    a, b = sparse(0, ROWS, A), sparse(1, ROWS, B)
    b[:, 2] = 3 * a[:, 4] + 0.1 * b[:, 2]
    a[:, 0] = 0  # never active
    b[:, 1] = 0.1  # a constant, with its rounding
    return PairedActivations(csc_array(a), csr_array(b), 2, np.arange(ROWS // 2) // 3)


def whole(blocks):
    return np.concatenate([block for _, block in blocks])


@pytest.mark.parametrize(("block_bytes", "dense_bytes"), [(1, 2**30), (200, 0), (2**28, 2**30), (2**28, 0)])
def test_correlations_are_pearsons_over_all_rows_and_nought_for_constants(both, monkeypatch, block_bytes, dense_bytes):
    monkeypatch.setattr(matching, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(matching, "_DENSE_BYTES", dense_bytes)
    found = whole(correlations(both))
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(both.a.toarray().T, both.b.toarray().T)[:A, A:]
    expected[0], expected[:, 1] = 0, 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[4, 2] > 0.95


def test_cosines_are_of_directions_whatever_their_length(monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK_BYTES", 30)
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[1.0], [2.0], [0.5], [9.0], [1.0]])
    torch.testing.assert_close(torch.from_numpy(whole(cosines(w, scale * w))).diagonal(), torch.ones(5))


def blocks_of(every, step=3):
    return ((start, every[start : start + step]) for start in range(0, len(every), step))


@pytest.mark.parametrize("shape", [(12, 12), (12, 7), (7, 12), (1, 5)])
def test_sparse_and_dense_assignment_are_the_hungarian_one(monkeypatch, shape):
    every = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    row, column = linear_sum_assignment(np.maximum(every, 0), maximize=True)
    best = np.maximum(every, 0)[row, column].sum()
    for limit in (4096, 0):
        monkeypatch.setattr(matching, "DENSE_FEATURES", limit)
        found = assign(blocks_of(every), *shape, most=12)
        assert found.score.sum() == pytest.approx(best, rel=1e-6)
        assert len({*found.row}) == len({*found.column}) == len(found.row)
        np.testing.assert_array_equal(found.score, every[found.row, found.column])
        mutual = [
            every[i].argmax() == j and every[:, j].argmax() == i for i, j in zip(found.row, found.column, strict=True)
        ]
        assert found.mutual.tolist() == mutual


def test_few_candidates_leave_what_has_none_alone(monkeypatch):
    monkeypatch.setattr(matching, "DENSE_FEATURES", 0)
    every = np.full((6, 6), 0.1, np.float32)
    every[:, 0] = np.linspace(0.5, 0.9, 6)  # all like the same
    found = assign(blocks_of(every), 6, 6, most=1)
    assert (5, 0, True) in zip(found.row, found.column, found.mutual, strict=True)
    assert not (found.row[found.column == 0] - 5).any()
    assert 1 <= len(found.row) < 6
    nothing = assign(blocks_of(-every), 6, 6, most=1)
    assert len(nothing.row) == 0


def test_candidates_are_the_best_of_rows_and_of_columns_over_blocks():
    every = np.random.default_rng(5).normal(size=(20, 15)).astype(np.float32)
    found = candidate_pairs(blocks_of(every, 4), 15, 3)
    by_row = {(i, j) for i in range(20) for j in np.argsort(-every[i])[:3]}
    by_column = {(i, j) for j in range(15) for i in np.argsort(-every[:, j])[:3]}
    expected = {(i, j) for i, j in by_row | by_column if every[i, j] > 0}
    assert set(zip(found.row, found.column, strict=True)) == expected
    assert len(found.row) == len(expected)
    np.testing.assert_array_equal(found.score, every[found.row, found.column])


def test_permuting_keeps_prompts_together_and_tokens_in_their_place(both):
    groups = np.array([5, 1, 1, 2, 5, 2, 7, 3])  # three of two images, two of one
    for seed in range(5):
        order = permuted_groups(groups, np.random.default_rng(seed))
        assert sorted(order) == list(range(8))
        assert len({groups[order[i]] for i in (0, 4)}) == 1
        assert {int(groups[order[i]]) for i in (6, 7)} == {7, 3}
    moved = images_permuted(both, 1)
    tokens = moved.b.toarray().reshape(ROWS // 2, 2, B)
    known = both.b.toarray().reshape(ROWS // 2, 2, B).tolist()
    assert [tokens.tolist().index(image) >= 0 for image in known]  # whole images, their two rows in order
    assert not np.array_equal(moved.b.toarray(), both.b.toarray())
    np.testing.assert_array_equal(images_permuted(both, 1).b.toarray(), moved.b.toarray())


def test_what_is_the_same_is_beyond_the_null_and_what_is_independent_is_not():
    def matched(a, b):
        both = PairedActivations(csc_array(a), csr_array(b), 1, np.arange(len(a)))
        counts = (a > 0).sum(0)
        pairs = assign(correlations(both), a.shape[1], b.shape[1], 8)
        nulls = [assign(correlations(images_permuted(both, s)), a.shape[1], b.shape[1], 8) for s in range(20)]
        return pairs, compare_with_null(pairs, nulls, counts)

    a, noise = sparse(7, 300, 40), sparse(8, 300, 40)
    order = np.random.default_rng(9).permutation(40)
    same = np.where(order < 25, 1, 0)  # 25 of b's are a's, under other numbers; the others are noise
    pairs, tested = matched(a, np.where(same, a[:, order], noise))
    right = order[pairs.column] == pairs.row
    true = pairs.row < 25
    assert right[true].all()
    assert (tested.q[true] <= 0.05).all()
    assert (tested.q[~true] <= 0.05).mean() < 0.2
    _, tested = matched(a, noise)
    assert (tested.q <= 0.05).sum() == 0
    assert tested.null.shape == (20 * 40,)


def test_random_directions_lean_as_the_decoder_does():
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(2000, 6, generator=draw) * torch.tensor([9.0, 1, 1, 1, 1, 1])
    like, other = random_directions(w, (0, 1))
    assert not torch.equal(like, other)
    torch.testing.assert_close(like.norm(dim=1), torch.ones(2000))
    assert like[:, 0].abs().mean() > 2 * like[:, 1].abs().mean()
    assert (like - torch.nn.functional.normalize(w, dim=1)).abs().max() > 0.1
