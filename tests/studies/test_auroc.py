"""AUROC of sparse codes against the pairwise count: ties, zeros, negative values, and tokens that are left out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.studies.auroc import (
    Codes,
    RankedCodes,
    at_threshold,
    auroc,
    bootstrap,
    precise_threshold,
    weighted_auroc,
)


def pairs(scores, positive, counted):
    """Every positive against every negative."""
    p, n = scores[positive & counted], scores[counted & ~positive]
    return (np.sum(p[:, None] > n) + 0.5 * np.sum(p[:, None] == n)) / (len(p) * len(n))


def sparse(values):
    token, feature = np.nonzero(values)
    return Codes(
        token.astype(np.int32), feature.astype(np.int32), values[token, feature].astype(np.float32), *values.shape
    )


def dense_codes(values):
    """Every score as a code, zeros included."""
    tokens, features = values.shape
    token = np.repeat(np.arange(tokens, dtype=np.int32), features)
    feature = np.tile(np.arange(features, dtype=np.int32), tokens)
    return Codes(token, feature, np.ascontiguousarray(values).reshape(-1), tokens, features)


def draw(seed, tokens=60, features=7, *, signed=False):
    rng = np.random.default_rng(seed)
    values = rng.integers(-3 if signed else 0, 4, (tokens, features)) * (rng.random((tokens, features)) < 0.4)
    counted = rng.random(tokens) < 0.8
    positive = counted & (rng.random(tokens) < 0.3)
    return values.astype(np.float32), positive, counted


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_sparse_and_dense_codes_agree_with_every_pair(seed, signed):
    values, positive, counted = draw(seed, signed=signed)
    if not positive.any() or not (counted & ~positive).any():
        return
    expected = [pairs(column, positive, counted) for column in values.T]
    for codes in (sparse(values), dense_codes(values)):
        ranked = RankedCodes(codes)
        np.testing.assert_allclose(ranked.auroc(positive, counted), expected, rtol=0, atol=1e-12)
        alone = [ranked.auroc_of(feature, positive, counted) for feature in range(values.shape[1])]
        np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose([auroc(column, positive, counted) for column in values.T], expected, atol=1e-12)


def test_questions_one_after_another_do_not_disturb_each_other():
    values, positive, counted = draw(1)
    ranked = RankedCodes(sparse(values))
    first = ranked.auroc(positive, counted)
    other = ~counted | positive
    np.testing.assert_allclose(ranked.auroc(positive, other), [pairs(c, positive, other) for c in values.T])
    np.testing.assert_array_equal(ranked.auroc(positive, counted), first)
    rest = counted & ~positive
    np.testing.assert_allclose(ranked.auroc(rest, counted), 1 - first)


def test_values_without_ties_and_features_that_never_fire():
    rng = np.random.default_rng(0)
    values = rng.random((200, 5)).astype(np.float32) * (rng.random((200, 5)) < 0.3)
    values[:, 3] = 0
    positive = rng.random(200) < 0.2
    everyone = np.ones(200, bool)
    found = RankedCodes(sparse(values)).auroc(positive, everyone)
    np.testing.assert_allclose(found, [pairs(c, positive, everyone) for c in values.T])
    assert found[3] == 0.5


def test_without_positives_or_negatives_there_is_no_number():
    values, positive, counted = draw(2)
    ranked = RankedCodes(sparse(values))
    assert np.isnan(ranked.auroc(np.zeros_like(positive), counted)).all()
    assert np.isnan(ranked.auroc(counted, counted)).all()
    assert np.isnan(auroc(values[:, 0], counted, counted))


def test_scores_that_are_not_finite_are_refused():
    values, positive, counted = draw(3)
    values[counted.argmax(), 0] = np.inf
    with pytest.raises(ValueError, match="finite"):
        RankedCodes(sparse(values))
    with pytest.raises(ValueError, match="finite"):
        auroc(values[:, 0], positive, counted)


def test_the_largest_value_of_every_picture():
    values, *_ = draw(4, tokens=60)
    pooled = sparse(values).pooled(5)
    assert (pooled.tokens, pooled.features) == (12, 7)
    expected = values.reshape(12, 5, 7).max(1)
    for feature in range(7):
        np.testing.assert_array_equal(pooled.column(feature), expected[:, feature])
    assert (np.diff(pooled.token) >= 0).all()
    nothing = sparse(np.zeros((10, 3), np.float32)).pooled(5)
    assert (nothing.tokens, len(nothing.token)) == (2, 0)


def test_weights_count_a_token_as_often_as_they_say():
    values, positive, counted = draw(5)
    weight = np.random.default_rng(0).integers(0, 3, len(values))
    repeated = [np.repeat(x, weight) for x in (values[:, 0], positive, counted)]
    assert weighted_auroc(values[:, 0], positive, counted, [weight]) == pytest.approx([pairs(*repeated)])


def test_the_bootstrap_draws_whole_groups():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(50), 20)
    of_group = rng.normal(size=50)
    positive = (rng.random(50) < 0.5)[group]
    everyone = np.ones(1000, bool)
    low, high = bootstrap(of_group[group], positive, everyone, group, draws=400, seed=0)
    one_by_one = bootstrap(of_group[group], positive, everyone, np.arange(1000), draws=400, seed=0)
    assert low < pairs(of_group[group], positive, everyone) < high
    assert high - low > 3 * (one_by_one[1] - one_by_one[0])  # 20 copies of a number know no more than one
    assert bootstrap(of_group[group], positive, everyone, group, draws=400, seed=0) == (low, high)


@pytest.mark.filterwarnings("error")
def test_a_bootstrap_without_a_draw_of_both_sides_is_no_interval():
    scores, group = np.arange(4.0), np.array([0, 0, 1, 1])
    nobody, everyone = np.zeros(4, bool), np.ones(4, bool)
    assert bootstrap(scores, nobody, everyone, group, draws=3, seed=0) is None
    assert bootstrap(scores, group == 0, everyone, group, draws=50, seed=0) == (0, 0)


def test_the_bootstrap_of_many_negatives_stays_around_the_auroc_of_all():
    rng = np.random.default_rng(2)
    group, positive = np.arange(60_000) // 100, rng.random(60_000) < 0.02
    scores, everyone = rng.normal(size=60_000) + 2 * positive, np.ones(60_000, bool)
    low, high = bootstrap(scores, positive, everyone, group, draws=50, seed=0)
    exact = auroc(scores, positive, everyone)
    assert low < exact < high < low + 0.03


def test_sums_of_features_over_some_tokens():
    values, positive, _ = draw(6)
    np.testing.assert_allclose(sparse(values).sums(positive), values[positive].sum(0))


def test_the_threshold_finds_the_most_at_the_precision_asked_for():
    scores = np.array([9, 8, 8, 7, 6, 5, 0, 0], np.float32)
    positive = np.array([1, 1, 0, 1, 1, 0, 1, 0], bool)
    everyone = np.ones(8, bool)
    assert precise_threshold(scores, positive, everyone, 0.8) == 6
    assert precise_threshold(scores, positive, everyone, 0.95) == 9
    assert precise_threshold(scores, ~positive, everyone, 0.95) == np.inf
    assert at_threshold(scores, positive, everyone, 6) == (6, 0.8, 0.8)
    assert at_threshold(scores, positive, everyone, np.inf) == (np.inf, None, 0)
    left_out = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    assert precise_threshold(scores, positive, left_out, 0.95) == 6
