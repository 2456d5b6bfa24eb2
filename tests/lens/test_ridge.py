"""Ridge regression from sums, against numpy's least squares."""

import numpy as np
import pytest
import torch

from flux_ir.lens.ridge import AffineMap, RidgeSums


@pytest.fixture
def data():
    """300 rows of 12 correlated channels with means of their own, and what depends on them."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(300, 12, generator=draw, dtype=torch.float64) @ torch.randn(12, 12, generator=draw).double() + 3
    y = x @ torch.randn(12, 12, generator=draw).double() + torch.randn(300, 12, generator=draw) - 5
    return x, y


def summed(x, y, batch):
    sums = RidgeSums(x.shape[1])
    for part_x, part_y in zip(x.split(batch), y.split(batch), strict=True):
        sums.add(part_x, part_y)
    return sums


@pytest.mark.parametrize("strength", [1e-9, 0.01, 1.0, 100.0])
def test_the_solution_is_that_of_least_squares_with_penalty_rows(data, strength):
    x, y = (part.numpy() for part in data)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    rho = strength * (centred_x**2).sum(0).mean()
    rows = np.concatenate([centred_x, np.sqrt(rho) * np.eye(12)])
    weight, *_ = np.linalg.lstsq(rows, np.concatenate([centred_y, np.zeros((12, 12))]), rcond=None)
    found = summed(*data, batch=300).solve(strength)
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.bias.numpy(), y.mean(0) - x.mean(0) @ weight, rtol=1e-7, atol=1e-8)


def test_batches_and_added_sums_change_nothing_but_rounding(data):
    whole = summed(*data, batch=300).solve(0.1)
    parts = summed(*(part[:100] for part in data), batch=7)
    parts.add_sums(summed(*(part[100:] for part in data), batch=33))
    torch.testing.assert_close(parts.solve(0.1), whole, rtol=1e-9, atol=1e-9)


def test_rows_that_never_vary_give_the_mean(data):
    constant = torch.full((300, 12), 2.0, dtype=torch.float64)
    found = summed(constant, data[1], batch=300).solve(0.1)
    torch.testing.assert_close(found.bias, data[1].mean(0))
    assert not found.weight.any()


def test_a_map_adds_to_tokens_in_their_dtype():
    tokens = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    added = AffineMap(torch.zeros(3, 3), torch.tensor([0.0, 1.0, 2.0])).applied_to(tokens)
    assert added.dtype == torch.bfloat16
    assert added.tolist() == [[[1, 2, 3], [1, 2, 3]]]
