import pytest
import torch

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.losses import OneProcess


class OfTwo:
    """The other process has seen `other`, a value for each question in turn."""

    def __init__(self, *others):
        self.others = list(others)

    def mean(self, value):
        return (value + self.others.pop(0)) / 2

    def gather(self, value):
        return torch.cat([value, self.others.pop(0)])


def test_squared_error_sums_over_the_width_and_averages_over_tokens():
    of, to = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert losses.squared_error(of, to) == (1 + 4 + 16) / 2


def test_variance_is_about_the_mean_and_has_no_gradient():
    x = torch.randn(50, 3, requires_grad=True)
    found = losses.variance(x + 100, OneProcess())
    assert found.item() == pytest.approx(x.var(dim=0, correction=0).sum().item(), rel=1e-4)
    assert not found.requires_grad


def test_variance_of_two_processes_is_that_of_their_tokens_together():
    x = torch.randn(40, 3) * torch.tensor([1.0, 5.0, 2.0])
    x[20:] += 3
    mine, theirs = x[:20], x[20:]
    mean = x.mean(dim=0)
    others = OfTwo(theirs.mean(dim=0), (theirs - mean).square().sum(dim=1).mean())
    torch.testing.assert_close(losses.variance(mine, others), losses.variance(x, OneProcess()))


def test_auxk_is_one_for_the_residuals_own_mean_and_gives_the_residual_no_gradient():
    residual = torch.randn(20, 4, requires_grad=True)
    mean = residual.detach().mean(dim=0).expand(20, 4).clone().requires_grad_()
    found = losses.auxk(residual, mean, OneProcess())
    found.backward()
    assert found.item() == pytest.approx(1)
    assert residual.grad is None
    assert mean.grad is not None


def test_auxk_of_a_perfect_reconstruction_is_finite():
    zeros = torch.zeros(5, 4)
    assert torch.isfinite(losses.auxk(zeros, zeros, OneProcess()))


def test_l1_counts_the_decoder_norm_once():
    z = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    decoder = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert losses.l1(z, decoder) == (1 * 5 + 2 * 5 + 3 * 2) / 2
    assert losses.l1(z, 2 * decoder) == 2 * losses.l1(z, decoder)


def test_l1_does_not_change_when_scale_moves_from_code_to_decoder():
    z, decoder = torch.rand(6, 4), torch.randn(4, 3)
    torch.testing.assert_close(losses.l1(z * 7, decoder / 7), losses.l1(z, decoder))


@pytest.mark.parametrize(("l0", "penalty", "slope"), [(2.0, 0.25, -0.25), (4.0, 0.0, 0.0), (6.0, 0.25, 0.25)])
def test_l0_penalty_pulls_to_its_target_from_both_sides(l0, penalty, slope):
    active = torch.tensor(l0, requires_grad=True)
    found = losses.l0_penalty(active, 4.0, OneProcess())
    found.backward()
    assert (found.item(), active.grad.item()) == (penalty, slope)


def test_l0_penalty_without_target_is_l0():
    assert losses.l0_penalty(torch.tensor(3.0), None, OneProcess()) == 3


def test_l0_penalty_of_two_processes_is_of_the_mean_and_their_gradients_average_to_its_gradient():
    slopes = []
    for mine, other in ((2.0, 8.0), (8.0, 2.0)):
        active = torch.tensor(mine, requires_grad=True)
        found = losses.l0_penalty(active, 4.0, OfTwo(torch.tensor(other)))
        found.backward()
        assert found.item() == (5 / 4 - 1) ** 2
        slopes.append(active.grad.item())
    assert sum(slopes) / 2 == 2 * (5 / 4 - 1) / 4


def test_fired_needs_a_value_above_zero():
    z = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])
    assert losses.fired(z).tolist() == [False, True, False]
    values, indices = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1, 0], [1, 2]])
    assert losses.fired_sparse(values, indices, 4).tolist() == [False, True, False, False]
    assert losses.mean_active(z) == losses.mean_active(values) == 1


def test_total_is_the_sum_of_the_parts():
    made = losses.parts(
        torch.tensor(1.0),
        torch.tensor(2.0),
        None,
        fired=torch.tensor([True]),
        l0=torch.tensor(1.0, requires_grad=True),
        fvu=torch.tensor(0.5, requires_grad=True),
    )
    assert made.total == 3
    assert made.auxiliary == 0
    assert not made.l0.requires_grad
    assert not made.fvu.requires_grad
