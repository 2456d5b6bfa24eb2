"""Losses of every architecture: made of their parts, exact in their gradients, and smaller after training."""

import pytest
import torch

from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from tests.sae.small_saes import D, F, K, every_architecture, grads, made, plain_pre, state_of, xn_of


@every_architecture
def test_a_loss_is_made_of_its_parts_and_reaches_every_parameter(architecture):
    sae = made(architecture)
    sae.keep_valid()
    found = sae.loss(xn_of(300), state_of(sae))
    assert found.total.item() == pytest.approx((found.reconstruction + found.sparsity + found.auxiliary).item())
    assert found.fired.dtype == torch.bool
    assert found.fired.shape == (F,)
    found.total.backward()
    for name, parameter in sae.named_parameters():
        if name != "threshold":  # few pre-activations are so near to it
            assert parameter.grad.abs().sum() > 0, name


@every_architecture
@pytest.mark.parametrize("tied", [False, True])
def test_training_explains_more(architecture, tied):
    sae = make_sae(SAEConfig(architecture, d_in=D, d_sae=F, k=K, tied=tied, l1_coefficient=0.1, target_l0=4.0))
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.01)
    directions = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    codes = torch.rand(256, 20, generator=torch.Generator().manual_seed(2))
    xn = torch.where(codes > 0.9, codes, 0) @ directions
    fvus = []
    for _ in range(60):
        found = sae.loss(xn, state_of(sae))
        optimiser.zero_grad()
        found.total.backward()
        optimiser.step()
        sae.keep_valid()
        sae.normalise_decoder()
        fvus.append(found.fvu.item())
    assert fvus[-1] < 0.6 * fvus[0]
    assert not tied or torch.equal(sae.encoder, sae.W_dec)


def test_l1_loss_and_gradients_are_the_formula():
    sae, xn = made("l1", l1_coefficient=0.7), xn_of()
    z = plain_pre(sae, xn).relu()
    error = (z @ sae.W_dec + sae.b_dec - xn).square().sum(dim=1).mean()
    total = error + 0.7 * 0.25 * (z * sae.W_dec.norm(dim=1)).sum(dim=1).mean()
    found = sae.loss(xn, state_of(sae, sparsity_scale=0.25))
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.reconstruction, error)
    for name, gradient in grads(sae, total).items():
        torch.testing.assert_close(
            grads(sae, sae.loss(xn, state_of(sae, sparsity_scale=0.25)).total)[name], gradient, msg=name
        )


@pytest.mark.parametrize("architecture", ["l1", "gated", "jumprelu"])
def test_the_penalty_warms_up(architecture):
    sae, xn = made(architecture), xn_of()
    whole = sae.loss(xn, state_of(sae)).sparsity
    assert sae.loss(xn, state_of(sae, sparsity_scale=0.0)).sparsity == 0
    torch.testing.assert_close(sae.loss(xn, state_of(sae, sparsity_scale=0.5)).sparsity, whole / 2)


@every_architecture
def test_losses_are_differentiated_exactly_in_float64(architecture):
    """Each against finite differences, except where a jump is estimated on purpose."""
    fields = {"l1_coefficient": 0.5, "l0_coefficient": 0.0, "bandwidth": 1e-9}
    sae = made(architecture, d_in=D, **fields).double()
    xn = xn_of(6, dtype=torch.float64)
    # What is held as a constant in one term is no function's derivative: the decoder of gated.
    left_out = {"threshold"} | ({"W_dec", "b_dec"} if architecture == "gated" else set())
    moving = {name: parameter for name, parameter in sae.named_parameters() if name not in left_out}
    draw = torch.Generator().manual_seed(11)
    direction = {name: torch.randn(p.shape, generator=draw, dtype=torch.float64) for name, p in moving.items()}

    def moved(step):
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter += step * direction[name]
            value = sae.loss(xn, state_of(sae)).total.item()
            for name, parameter in moving.items():
                parameter -= step * direction[name]
        return value

    found = grads(sae, sae.loss(xn, state_of(sae)).total)
    slope = sum((found[name] * direction[name]).sum() for name in moving)
    assert slope.item() == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-4)
