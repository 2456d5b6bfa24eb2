"""JumpReLU: the kernel's estimates of its gradients, and thresholds that follow a target and stay above 0."""

import math

import pytest
import torch

from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from tests.sae.small_saes import D, F, N, grads, made, plain_pre, state_of, variance, xn_of


def jumprelu_near_its_thresholds(bandwidth=0.5, **fields):
    """A wide kernel, so that many pre-activations lie within it, on both sides of their thresholds."""
    sae = made("jumprelu", bandwidth=bandwidth / math.sqrt(D), **fields)
    with torch.no_grad():
        sae.threshold.copy_(0.3 + 0.5 * torch.rand(F, generator=torch.Generator().manual_seed(3)))
    return sae


def test_jumprelu_gradients_are_the_kernel_estimates():
    sae, xn = jumprelu_near_its_thresholds(l0_coefficient=0.3), xn_of()
    pre = plain_pre(sae, xn).detach()
    theta = sae.threshold.detach()
    kernel = ((pre - theta).abs() < 0.25).float() / 0.5
    z = torch.where(pre > theta, pre, 0).requires_grad_()
    fvu = (z @ sae.W_dec + sae.b_dec - xn).square().sum(dim=1).mean() / variance(xn)
    (d_z,) = torch.autograd.grad(fvu, z)
    d_theta = -(kernel * (d_z * theta + 0.3 / N)).sum(dim=0)
    d_pre = d_z * (pre > theta) + kernel * (d_z * theta + 0.3 / N)
    found = sae.loss(xn, state_of(sae))
    torch.testing.assert_close(found.reconstruction, fvu)
    torch.testing.assert_close(found.sparsity, 0.3 * (z > 0).sum(dim=1).float().mean())
    gradients = grads(sae, found.total)
    torch.testing.assert_close(gradients["threshold"], d_theta)
    torch.testing.assert_close(gradients["b_enc"], d_pre.sum(dim=0))
    torch.testing.assert_close(gradients["encoder"], d_pre.T @ (xn - sae.b_dec.detach()))


@pytest.mark.parametrize("side", [-0.2, 0.2])
def test_l0_moves_a_threshold_from_pre_activations_on_either_side_of_it(side):
    """A feature just below its threshold counts as much as one just above."""
    sae = jumprelu_near_its_thresholds()
    xn = xn_of(1)
    with torch.no_grad():
        sae.threshold.copy_(plain_pre(sae, xn)[0].abs() + 1)
        sae.b_enc += sae.threshold + side - plain_pre(sae, xn)[0]
    gradients = grads(sae, sae.loss(xn.repeat(2, 1), state_of(sae)).sparsity)
    torch.testing.assert_close(gradients["threshold"], torch.full((F,), -0.001 / 0.5))
    torch.testing.assert_close(gradients["b_enc"], torch.full((F,), 0.001 / 0.5))


@pytest.mark.parametrize(("target", "sign"), [(0.5, -1), (20.0, 1)])
def test_a_target_l0_pulls_thresholds_both_ways(target, sign):
    sae, xn = jumprelu_near_its_thresholds(target_l0=target), xn_of()
    gradient = grads(sae, sae.loss(xn, state_of(sae)).sparsity)["threshold"]
    assert (sign * gradient >= 0).all()
    assert gradient.any()


def test_thresholds_start_a_bandwidth_above_zero_and_are_float32():
    sae = made("jumprelu", bandwidth=0.001)
    assert torch.equal(sae.threshold.detach(), torch.full((F,), 0.001 * math.sqrt(D)))
    assert sae.threshold.dtype == sae.b_enc.dtype == torch.float32


def test_thresholds_start_where_the_target_l0_is(tokens):
    x = tokens(400)
    sae = make_sae(SAEConfig("jumprelu", d_in=12, d_sae=40, target_l0=3.0), sample=x)
    assert (sae.encode(x) > 0).sum().item() == pytest.approx(3 * 400, abs=1)
    every = make_sae(SAEConfig("jumprelu", d_in=12, d_sae=40, target_l0=1000.0), sample=x)
    assert (every.threshold == every.bandwidth).all()


def test_thresholds_stay_above_zero():
    sae, xn = made("jumprelu"), xn_of()
    with torch.no_grad():
        sae.threshold[:3] = torch.tensor([-1.0, 0.0, 1e-30])
    sae.loss(xn, state_of(sae))
    assert (sae.threshold > 0).all()
    assert sae.threshold[2].item() == pytest.approx(1e-30)
    with torch.no_grad():
        sae.threshold[0] = -1.0
    assert (sae.folded().threshold > 0).all()


def test_jumprelu_cuts_at_each_features_own_threshold():
    sae, xn = jumprelu_near_its_thresholds(), xn_of()
    pre = plain_pre(sae, xn)
    z = sae.features_of(xn)
    assert torch.equal(z > 0, pre > sae.threshold)
    torch.testing.assert_close(z[z > 0], pre[z > 0])
