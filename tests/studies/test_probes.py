"""Probes: the minimum they claim, the penalty that generalises, and what they find."""

import numpy as np
import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.studies.auroc import auroc
from flux_ir.studies.probes import Probe, balanced, fit_probe, fit_ridge, r_squared


def draw(n=600, d=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * [1, 10, 0.1, 3, 1][:d] + 5
    margin = (x - 5) @ np.array([1, 0.1, 0, 0, 0.5])[:d]
    return torch.tensor(x).float(), rng.random(n) < 1 / (1 + np.exp(-margin)), np.arange(n) // 4


def test_the_probe_is_the_minimum_of_its_loss():
    x, y, group = draw()
    penalty = 1e-2
    probe = fit_probe(x, y, group, [penalty])
    assert probe.penalty == penalty
    mean, scale = x.double().mean(0), x.double().std(0, correction=0)
    z = (x.double() - mean) / scale
    w = torch.zeros(6, dtype=torch.float64)
    full = torch.cat([z, torch.ones(len(z), 1)], 1)
    ridge = torch.diag(torch.tensor([penalty] * 5 + [0.0], dtype=torch.float64))
    for _ in range(30):  # Newton's method
        p = torch.sigmoid(full @ w)
        gradient = full.T @ (p - torch.tensor(y).double()) / len(z) + ridge @ w
        w -= torch.linalg.solve(full.T @ (full * (p * (1 - p))[:, None]) / len(z) + ridge, gradient)
    expected = (full @ w).numpy()
    np.testing.assert_allclose(probe.scores(x), expected, atol=2e-3)


def test_ridge_is_the_minimum_of_its_loss():
    x, _, group = draw()
    y = (x @ torch.tensor([1.0, 2, 3, 4, 5]) + 7).numpy() + np.random.default_rng(0).normal(size=600)
    probe = fit_ridge(x, y, group, [0.1])
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    w = np.linalg.solve(z.T @ z / 600 + 0.1 * np.eye(5), z.T @ (y - y.mean()) / 600)
    np.testing.assert_allclose(probe.scores(x), z @ w + y.mean(), rtol=1e-4)


def test_the_penalty_is_the_one_that_holds_on_other_prompts():
    """Few pictures in many dimensions: without a penalty a probe learns them by heart."""
    rng = np.random.default_rng(1)
    group = np.arange(400) // 2
    x = torch.tensor(rng.normal(size=(400, 200))).float()
    x[:, 0] += 1.5 * torch.tensor(group % 3 == 0).float()
    y = group % 3 == 0
    fresh = torch.tensor(rng.normal(size=(4000, 200))).float()
    truth = rng.random(4000) < 0.5
    fresh[:, 0] += 1.5 * torch.tensor(truth).float()
    everyone = np.ones(4000, bool)
    chosen = fit_probe(x, y, group, [1e-5, 1.0])
    weak, strong = (auroc(fit_probe(x, y, group, [p]).scores(fresh), truth, everyone) for p in (1e-5, 1.0))
    assert chosen.penalty == 1.0
    assert weak < strong == auroc(chosen.scores(fresh), truth, everyone)


def test_one_prompt_leaves_nothing_to_pick_a_penalty_on():
    x, y, _ = draw()
    with pytest.raises(FluxIRError, match="rows are of one prompt"):
        fit_probe(x, y, np.zeros(len(x), np.int64))


def test_a_constant_column_does_no_harm():
    x, y, group = draw()
    x[:, 2] = 3
    probe = fit_probe(x, y, group)
    assert probe.weight[2] == 0
    assert np.isfinite(probe.scores(x)).all()


def test_what_can_be_read_is_read_and_what_cannot_is_not():
    x, y, group = draw(4000)
    half = len(x) // 2
    everyone = np.ones(half, bool)
    found = fit_probe(x[:half], y[:half], group[:half])
    assert auroc(found.scores(x[half:]), y[half:], everyone) > 0.75
    noise = np.random.default_rng(5).permutation(y[:half])
    assert abs(auroc(fit_probe(x[:half], noise, group[:half]).scores(x[half:]), y[half:], everyone) - 0.5) < 0.1


def test_r_squared_is_one_for_the_numbers_and_zero_for_their_mean():
    y = np.array([1.0, 2, 4])
    assert r_squared(y, y) == 1
    assert r_squared(np.full(3, y.mean()), y) == pytest.approx(0)
    assert np.isnan(r_squared(y, np.ones(3)))


def test_as_many_negatives_as_positives_are_drawn_from_who_counts():
    rng = np.random.default_rng(0)
    counted = rng.random(1000) < 0.9
    positive = counted & (rng.random(1000) < 0.2)
    rows = balanced(positive, counted, seed=0, most=100)
    assert len(set(rows.tolist())) == 200
    assert counted[rows].all()
    assert positive[rows].sum() == 100
    assert (np.diff(rows) > 0).all()
    assert (balanced(positive, counted, seed=0, most=10**6) == np.flatnonzero(counted)).all()


def test_scores_are_a_plane():
    probe = Probe(torch.tensor([1.0, -2.0]), 0.5, 1.0)
    np.testing.assert_allclose(probe.scores(torch.tensor([[1.0, 1.0], [0.0, 0.0]])), [-0.5, 0.5])
