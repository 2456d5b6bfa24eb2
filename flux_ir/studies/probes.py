"""Linear probes: logistic regression for words, ridge regression for numbers.

The penalty is picked by two-fold cross-validation: fitted on one half of the prompts, judged on the other, and the
other way round. The probe is then fitted on all of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

from flux_ir.errors import FluxIRError
from flux_ir.studies.auroc import auroc

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties on the squared length of the weights, for inputs of unit variance and a loss per token."""
MOST_OF_EACH = 8192
"""Most positives, and most negatives, that a probe is fitted on; each probe has its own draw."""


class Probe(NamedTuple):
    """A linear read-out: scores are x @ weight + bias."""

    weight: Tensor
    """float32 [d]."""
    bias: float
    penalty: float

    def scores(self, x: Tensor) -> np.ndarray:
        """The score of each row: float32."""
        return (x.float() @ self.weight + self.bias).numpy()


def fit_probe(x: Tensor, y: np.ndarray, group: np.ndarray, penalties: Sequence[float] = PENALTIES) -> Probe:
    """Logistic regression of y, bool [n], on x, [n, d]. `group` [n] is the prompt of each row.

    The penalty is the one with the best AUROC on the halves that were not fitted on.
    """

    def judge(probe: Probe, rows: np.ndarray) -> float:
        return auroc(probe.scores(x[rows]), y[rows], np.ones(len(rows), dtype=bool))

    return _fit(x, torch.from_numpy(y).float(), group, penalties, _logistic, judge)


def fit_ridge(x: Tensor, y: np.ndarray, group: np.ndarray, penalties: Sequence[float] = PENALTIES) -> Probe:
    """Ridge regression of numbers y [n] on x [n, d], with the penalty of the best R^2, likewise."""

    def judge(probe: Probe, rows: np.ndarray) -> float:
        return r_squared(probe.scores(x[rows]), y[rows])

    return _fit(x, torch.from_numpy(y).float(), group, penalties, _ridge, judge)


def r_squared(predicted: np.ndarray, y: np.ndarray) -> float:
    """The share of the variance of y that is predicted; NaN where there is none, negative for worse than the mean."""
    variance = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / variance if variance else float("nan")


def balanced(positive: np.ndarray, counted: np.ndarray, seed: int, most: int = MOST_OF_EACH) -> np.ndarray:
    """At most so many positives and as many negatives, drawn without replacement: their numbers, ascending."""
    draw = np.random.default_rng(seed)
    sides = np.flatnonzero(positive), np.flatnonzero(counted & ~positive)
    return np.sort(np.concatenate([draw.choice(side, min(most, len(side)), replace=False) for side in sides]))


Fit = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]


def _fit(
    x: Tensor,
    y: Tensor,
    group: np.ndarray,
    penalties: Sequence[float],
    fit: Fit,
    judge: Callable[[Probe, np.ndarray], float],
) -> Probe:
    first = _half(group)
    halves = np.flatnonzero(first), np.flatnonzero(~first)
    if len(penalties) > 1 and not len(halves[1]):
        raise FluxIRError(
            f"a probe's penalty is picked on other prompts than it is fitted on: all {len(x)} rows are of one prompt",
            hint="collect more prompts, or raise --least_positives",
        )
    held_out = np.zeros(len(penalties))
    if len(penalties) > 1:
        for rows, others in (halves, halves[::-1]):
            scaled, mean, scale = _standardised(x[rows])
            weights = None
            # From the strongest penalty down: each solution is where the next one starts.
            for number, penalty in reversed(list(enumerate(penalties))):
                weights = fit(scaled, y[rows], penalty, weights)
                held_out[number] += judge(_raw(weights, mean, scale, penalty), others)
    penalty = penalties[int(np.argmax(np.nan_to_num(held_out, nan=-np.inf)))]
    scaled, mean, scale = _standardised(x)
    return _raw(fit(scaled, y, penalty, None), mean, scale, penalty)


def _half(group: np.ndarray) -> np.ndarray:
    """Every other group: bool [n]."""
    return np.unique(group, return_inverse=True)[1] % 2 == 0


def _standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns with mean 0 and variance 1, their means and their scales. A constant column becomes 0."""
    x = x.float()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x - mean) / scale, mean, scale


def _raw(weights: Tensor, mean: Tensor, scale: Tensor, penalty: float) -> Probe:
    """The probe for columns that are not standardised. `weights` end with the bias."""
    weight = weights[:-1] / scale
    return Probe(weight, float(weights[-1] - weight @ mean), penalty)


def _logistic(x: Tensor, y: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    """The minimum of the mean logistic loss plus penalty / 2 |w|^2, found by L-BFGS. Weights end with the bias."""
    signs = 2 * y - 1

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(values).float()
        margin = signs * (x @ weights[:-1] + weights[-1])
        pull = -signs * torch.sigmoid(-margin) / len(y)
        gradient = torch.cat([pull @ x + penalty * weights[:-1], pull.sum()[None]])
        value = softplus(-margin).mean() + 0.5 * penalty * weights[:-1].square().sum()
        return float(value), gradient.double().numpy()

    begin = np.zeros(x.shape[1] + 1) if start is None else start.double().numpy()
    # float32 losses cannot tell smaller steps apart
    solution = minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-8, "gtol": 1e-5})
    return torch.from_numpy(solution.x).float()


def _ridge(x: Tensor, y: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    """The minimum of the mean squared error plus penalty |w|^2, in closed form: x has mean 0."""
    moment = (x.T @ x).double() / len(x)
    mean = y.mean()
    right = (x.T @ (y - mean)).double() / len(x)
    weights = torch.linalg.solve(moment + penalty * torch.eye(len(moment), dtype=torch.float64), right)
    return torch.cat([weights.float(), mean[None]])
