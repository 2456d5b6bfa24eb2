"""The numbers of demonstrations, where they can be worked out by hand."""

import numpy as np
import pytest

from flux_ir.errors import FluxIRError
from flux_ir.steering.demonstrations import (
    Demonstration,
    Scene,
    Summary,
    features_in,
    ranked,
    responses,
    symmetric,
)

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def demonstration(feature, score, *controls):
    """One prompt; every distance is the score."""
    own, *random = ((score, score, 0.0, score, score) for score in (score, *controls))
    return Demonstration(feature, 1.0, STRENGTHS, "latent", (Scene("a", 0, "pictures/a", own, tuple(random)),))


def test_the_response_to_a_strength_is_what_the_equation_says():
    assert responses((-1, 0, 1), (0.4, 0, 0.4)) == {1: pytest.approx(0.4)}  # both sides alike: their distance
    assert responses((-1, 0, 1), (0.0, 0, 0.4)) == {1: pytest.approx(0.1)}  # one side alone: half of the mean
    by_hand = {1: (0.1 + 0.3) / 2 * (0.5 + 0.5 / 3), 2: (0.5 + 1.0) / 2 * 0.75}
    assert responses(STRENGTHS, (1.0, 0.3, 0.0, 0.1, 0.5)) == pytest.approx(by_hand)
    assert responses(STRENGTHS, (0.0,) * 5) == {1: 0, 2: 0}


def test_scores_are_means_over_strengths_and_prompts():
    own, random = (1.0, 0.3, 0.0, 0.1, 0.5), (0.4, 0.2, 0.0, 0.2, 0.4)
    scenes = (Scene("a", 0, "pictures/a", own, (random,)), Scene("b", 0, "pictures/b", random, (own,)))
    by_hand = [np.mean(list(responses(STRENGTHS, distances).values())) for distances in (own, random)]
    alone, both = (Demonstration(1, 1.0, STRENGTHS, "latent", some) for some in (scenes[:1], scenes))
    assert (alone.score, alone.control) == pytest.approx(by_hand)
    assert both.score == both.control == pytest.approx(np.mean(by_hand))
    assert alone.above_at == [2]  # at 1 it is .133 against .2
    assert (alone.to_json()["above"], alone.to_json()["above_at"]) == (True, [2])


def test_the_window_is_of_percentiles_of_the_features_that_are_alive():
    values = np.arange(200.0)[::-1] / 100
    alive = np.ones(200, bool)
    alive[-100:] = False  # the smallest values: 0 to .99
    chosen = features_in(values, alive, (70, 95), 5)
    assert [round(float(values[feature]), 2) for feature in chosen] == [1.7, 1.76, 1.82, 1.88, 1.94]
    assert len(features_in(values, alive, (70, 95), 1000)) == 25
    assert features_in(values, np.zeros(200, bool), (70, 95), 5) == []


@pytest.mark.parametrize("strengths", [(1, 2), (-1, 2), (0,), (), (float("nan"),), (float("inf"), -float("inf"))])
def test_strengths_go_as_far_down_as_up(strengths):
    with pytest.raises(FluxIRError, match="strengths go as far down as up"):
        symmetric(strengths)


def test_strengths_are_in_order_with_zero():
    assert symmetric((2, -1, 1, -2)) == STRENGTHS


def test_a_feature_is_above_all_of_its_controls_or_has_failed():
    good, even, poor = demonstration(3, 0.5, 0.2, 0.4), demonstration(1, 0.5, 0.1, 0.5), demonstration(2, 0.3, 0.4, 0.4)
    assert [one.above for one in (good, even, poor)] == [True, False, False]
    assert [one.feature for one in ranked([poor, good, even])] == [1, 3, 2]  # by score minus the mean of the controls
    summary = Summary.of([good, even, poor])
    assert (summary.features, summary.above) == (3, 1)
    assert summary.by_chance == pytest.approx(1)  # a third of them: one feature and two random directions
    assert summary.p == pytest.approx(1 - (2 / 3) ** 3)
