"""Which features of two autoencoders are the same one: by direction, or by when they are active. Never by number.

The likeness of all features of one with all of the other is computed in blocks of rows, so that 65,536 of each fit into
memory. Up to 4,096 of each the one-to-one assignment with the largest sum of likenesses is exact (the Hungarian
method). Above, it is exact among the few most alike pairs of each row and each column, which is the same assignment
unless that needs a pair beyond these. A pair counts as matched if it is more alike than the pairs that the same
assignment finds under a null. Next: `compare`, which reads folders.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array, csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from flux_ir.features.significance import permutation_p, q_values

DENSE_FEATURES = 4096
"""With at most so many features on either side every pair is looked at: the matrix is 64 MB."""
STRATA = 4
"""Features are compared with the null of those that are active on about as many images: rare ones match by chance."""
_BLOCK_BYTES = 2**28
_DENSE_FROM, _DENSE_BYTES = 0.02, 2**30  # share of non-zeros, and size of the dense matrix

Blocks = Iterable[tuple[int, NDArray[np.float32]]]
"""The likeness of a run of rows to all columns [run, columns], with the first row's number; the rows in order."""


class PairedActivations(NamedTuple):
    """What the features of both sides do on the same images, or tokens: sparse float64, [rows, features] each."""

    a: csc_array
    b: csr_array
    rows_per_image: int
    groups: NDArray[np.int64]
    """[images]: which have the same prompt. They are no independent draws, so they stay together."""


class CandidatePairs(NamedTuple):
    """Pairs that may be matched: row, column and likeness of each, by row and then by column, none twice."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    score: NDArray[np.float32]


class Pairs(NamedTuple):
    """A one-to-one assignment, by row."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    score: NDArray[np.float32]
    mutual: NDArray[np.bool_]
    """Whether each is also the other's most alike."""


class Tested(NamedTuple):
    """An assignment against those of the null, by pair: [pairs] each."""

    p: NDArray[np.float64]
    q: NDArray[np.float64]
    null: NDArray[np.float32]
    """The likeness of every feature's pair in every draw of the null."""


# ---- Likeness


def cosines(w_a: Tensor, w_b: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Cosines of the rows of two decoders, [features, d] each of one d."""
    unit_a, unit_b = (torch.nn.functional.normalize(w.float(), dim=1) for w in (w_a, w_b))
    step = _block_rows(len(w_b), 4)
    for start in range(0, len(unit_a), step):
        yield start, (unit_a[start : start + step] @ unit_b.T).cpu().numpy()


def random_directions(like: Tensor, seeds: Iterable[int]) -> Iterator[Tensor]:
    """For each seed as many random directions, with the second moments of these.

    So the null leans where decoder rows lean; isotropic directions would be easier to beat.
    """
    unit = torch.nn.functional.normalize(like.double(), dim=1)
    variances, axes = torch.linalg.eigh(unit.T @ unit / len(unit))
    root = axes * variances.clamp_min(0).sqrt()
    for seed in seeds:
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        yield torch.nn.functional.normalize(noise @ root.T, dim=1).to(like.dtype)


def correlations(both: PairedActivations) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Pearson's correlation over all rows, zeros among them, of every feature of one with every feature of the other.

    r = (E[ab] - E[a] E[b]) / (sd(a) sd(b)), with E[ab] from the non-zero entries alone. A feature that never changes
    has a correlation of 0.
    """
    rows, columns = both.a.shape[1], both.b.shape[1]
    (mean_a, spread_a), (mean_b, spread_b) = map(_moments, (both.a, both.b))
    step = _block_rows(columns, 8)
    # Where a feature is active on more than a few rows in a hundred, products of dense matrices are faster.
    is_dense = both.b.nnz > _DENSE_FROM * math.prod(both.b.shape) and math.prod(both.b.shape) * 8 <= _DENSE_BYTES
    dense = both.b.toarray() if is_dense else None
    for start in range(0, rows, step):
        run = slice(start, start + step)
        of_a = both.a[:, run].T
        block = (of_a @ both.b).toarray() if dense is None else of_a.toarray() @ dense
        block /= both.a.shape[0]
        block -= mean_a[run, None] * mean_b
        scale = spread_a[run, None] * spread_b
        np.divide(block, scale, out=block, where=scale > 0)
        block[scale == 0] = 0
        yield start, block.astype(np.float32)


def _moments(values: csr_array | csc_array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of every column."""
    mean = np.asarray(values.mean(axis=0))
    variance = np.asarray(values.power(2).mean(axis=0)) - mean**2
    # The variance of a constant is not 0 after rounding.
    return mean, np.sqrt(np.where(variance > 1e-12 * mean**2, variance, 0))


def images_permuted(both: PairedActivations, seed: int) -> PairedActivations:
    """The same with the images of `b` permuted: prompts change places with all their images.

    Tokens keep their positions and steps, so that two features of the same place are still alike under this null.
    """
    images = permuted_groups(both.groups, np.random.default_rng(seed))
    rows = images[:, None] * both.rows_per_image + np.arange(both.rows_per_image)
    return both._replace(b=both.b[rows.ravel()])


def permuted_groups(groups: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of items that exchanges whole groups of equal size, so that groups stay together."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order][:1] - 1))
    sizes = np.diff(np.append(starts, len(groups)))
    permuted = np.empty(len(groups), np.int64)
    for size in np.unique(sizes):
        members = order[starts[sizes == size][:, None] + np.arange(size)]
        permuted[members] = members[draw.permutation(len(members))]
    return permuted


# ---- Assignment


def candidate_pairs(blocks: Blocks, columns: int, most: int) -> CandidatePairs:
    """The `most` most alike columns of every row, and rows of every column. Only likenesses above 0 count."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    best, best_row = torch.zeros(0, columns), torch.zeros(0, columns, dtype=torch.long)
    for start, likeness in blocks:
        block = torch.from_numpy(likeness)
        score, column = block.topk(min(most, columns), dim=1)
        found.append((torch.arange(start, start + len(block))[:, None].expand_as(column), column, score))
        score, row = block.topk(min(most, len(block)), dim=0)
        both, rows = torch.cat([best, score]), torch.cat([best_row, start + row])
        best, order = both.topk(min(most, len(both)), dim=0)  # the best rows of every column so far
        best_row = rows.gather(0, order)
    found.append((best_row, torch.arange(columns).expand_as(best_row), best))
    rows_of, columns_of, scores = (
        torch.cat([part.flatten() for part in side]).numpy() for side in zip(*found, strict=True)
    )
    _, once = np.unique(rows_of * columns + columns_of, return_index=True)
    once = once[scores[once] > 0]
    return CandidatePairs(rows_of[once], columns_of[once], scores[once])


def assign(blocks: Blocks, rows: int, columns: int, most: int) -> Pairs:
    """The one-to-one assignment with the largest sum of likenesses; features without a partner are left out.

    `most`: candidates of each feature, where there are more than 4,096 on a side.
    """
    if max(rows, columns) <= DENSE_FEATURES:
        every = np.zeros((rows, columns), np.float32)
        for start, block in blocks:
            every[start : start + len(block)] = block
        row, column = linear_sum_assignment(np.maximum(every, 0), maximize=True)
        best_column, best_row = every.argmax(1) if columns else row, every.argmax(0) if rows else column
        return _pairs(row, column, every[row, column], best_column, best_row)
    candidates = candidate_pairs(blocks, columns, most)
    best_column, best_row = (np.full(count, -1, np.int64) for count in (rows, columns))
    ascending = np.argsort(candidates.score, kind="stable")
    best_column[candidates.row[ascending]] = candidates.column[ascending]
    best_row[candidates.column[ascending]] = candidates.row[ascending]
    row, column, score = _sparse_assignment(candidates, rows, columns)
    return _pairs(row, column, score, best_column, best_row)


def _pairs(
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    score: NDArray[np.float32],
    best_column: NDArray[np.int64],
    best_row: NDArray[np.int64],
) -> Pairs:
    above = score > 0
    row, column, score = row[above], column[above], score[above]
    return Pairs(row, column, score, (best_column[row] == column) & (best_row[column] == row))


def _sparse_assignment(
    candidates: CandidatePairs, rows: int, columns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The assignment among candidate pairs. Every row has a spare column besides, so that it may stay unmatched."""
    # The method matches every row and takes a weight of 0 for no edge: so 1 is a spare column, 1 + likeness a pair.
    weights = np.concatenate([1 + candidates.score.astype(np.float64), np.ones(rows)])
    row = np.concatenate([candidates.row, np.arange(rows)])
    column = np.concatenate([candidates.column, columns + np.arange(rows)])
    graph = csr_array((weights, (row, column)), shape=(rows, columns + rows))
    row, column = min_weight_full_bipartite_matching(graph, maximize=True)
    paired = column < columns
    row, column = row[paired].astype(np.int64), column[paired].astype(np.int64)
    entry = np.searchsorted(candidates.row * columns + candidates.column, row * columns + column)
    return row, column, candidates.score[entry]


def compare_with_null(pairs: Pairs, nulls: Sequence[Pairs], counts: NDArray[np.int64]) -> Tested:
    """The p and q of every pair: how often pairs of the null are at least as alike.

    `counts` [rows] are the images each feature is active on: its null is that of features about as frequent.
    """
    scores = np.zeros((len(nulls), len(counts)), np.float32)  # 0: unmatched in this draw
    for draw, null in enumerate(nulls):
        scores[draw, null.row] = null.score
    p = np.ones(len(pairs.row))
    edges = np.quantile(counts, np.linspace(0, 1, STRATA + 1)[1:-1]) if len(counts) else np.zeros(0)
    strata = np.searchsorted(edges, counts, side="left")
    for stratum in np.unique(strata[pairs.row]):
        in_stratum = strata[pairs.row] == stratum
        p[in_stratum] = permutation_p(pairs.score[in_stratum], scores[:, strata == stratum])
    return Tested(p, q_values(p), scores.ravel())


def _block_rows(columns: int, bytes_each: int) -> int:
    return max(1, _BLOCK_BYTES // max(1, columns * bytes_each))
