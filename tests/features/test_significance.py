"""Lists of "significant" features: against scipy's, and on chance alone."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from flux_ir.features.significance import permutation_p, q_values


def test_q_values_are_those_of_scipy_in_any_shape():
    p = np.random.default_rng(0).random((5, 40)) ** 3
    np.testing.assert_allclose(q_values(p).ravel(), false_discovery_control(p.ravel()), rtol=1e-12)
    assert q_values([]).shape == (0,)
    assert q_values([0.3]).tolist() == [0.3]


def test_what_was_not_tested_stays_out_of_the_count():
    p = np.array([0.01, np.nan, 0.04, 0.5])
    np.testing.assert_allclose(q_values(p), [0.03, np.nan, 0.06, 0.5])
    np.testing.assert_allclose(q_values(p, tests=100), [1, np.nan, 1, 1])
    np.testing.assert_allclose(q_values([0.0001, 0.0002], tests=100), [0.01, 0.01])


def test_of_chance_alone_a_list_is_made_as_rarely_as_it_says():
    draw = np.random.default_rng(1)
    lists = sum((q_values(draw.random(200)) <= 0.05).any() for _ in range(1000))
    assert lists / 1000 == pytest.approx(0.05, abs=0.025)


def test_permutation_p_counts_ties_and_itself():
    null = [3.0, 1.0, 2.0]
    np.testing.assert_allclose(permutation_p([4.0, 3.0, 2.5, 0.0], null), [0.25, 0.5, 0.5, 1.0])
