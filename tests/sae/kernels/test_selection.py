"""The k largest of each row, found without searching whole rows."""

import pytest
import torch

from flux_ir.sae.kernels import reference
from flux_ir.sae.kernels.selection import largest, top_k


@pytest.mark.parametrize("width", [1, 7, 64, 513, 1024, 5003])
@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_columns_are_those_of_a_search_of_whole_rows(width, k, dtype):
    k = min(k, width)
    pre = torch.randn(9, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    values, indices = largest(pre, k)
    expected, _ = pre.topk(k, dim=1)
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_of_equal_entries_any_are_taken_but_none_twice():
    pre = torch.zeros(3, 2000)
    pre[1, 700:] = 1
    values, indices = largest(pre, 20)
    assert values[1].min() == 1
    assert values[[0, 2]].abs().max() == 0
    assert all(len(set(row)) == 20 for row in indices.tolist())


def test_rows_that_are_minus_infinity_but_for_a_few_places():
    pre = torch.full((2, 1000), -torch.inf)
    pre[:, 17] = -5
    values, indices = largest(pre, 4)
    assert values.max() == -5
    assert (indices == 17).sum() == 2


def test_all_columns_can_be_asked_for():
    pre = torch.randn(4, 300)
    values, _ = largest(pre, 300)
    assert torch.equal(values.sort(dim=1).values, pre.sort(dim=1).values)


def test_gradients_reach_the_chosen_entries_and_no_others():
    pre = torch.randn(5, 700, requires_grad=True)
    weights = torch.randn(5, 3)
    found, indices = top_k(pre, 3)
    (found.sort(dim=1, descending=True).values * weights).sum().backward()
    same = pre.detach().clone().requires_grad_()
    (reference.top_k(same, 3)[0] * weights).sum().backward()
    assert torch.equal(pre.grad, same.grad)
    assert (pre.grad != 0).sum() == indices.numel()
