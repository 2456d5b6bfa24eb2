"""TopK, the loss and gradients of the paper; and what every architecture with a k does with dead features and its k."""

import pytest
import torch

from tests.sae.small_saes import F, K, grads, made, plain_pre, state_of, variance, with_k, xn_of


def top_of_rows(pre, k):
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


@pytest.mark.parametrize("with_dead", [False, True])
def test_topk_loss_and_gradients_are_those_of_the_paper(with_dead):
    sae, xn = made("topk", k_aux=2), xn_of()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[1, 4, 9, 20]] = with_dead
    found = sae.loss(xn, state_of(sae, dead=dead))

    pre = plain_pre(sae, xn)
    x_hat = top_of_rows(pre, K) @ sae.W_dec + sae.b_dec
    total = (x_hat - xn).square().sum(dim=1).mean() / variance(xn)
    if with_dead:
        values, indices = pre.masked_fill(~dead, -torch.inf).topk(2, dim=1)
        residual = (xn - x_hat).detach()
        explained = torch.zeros_like(pre).scatter(1, indices, values) @ sae.W_dec
        total = total + 1 / 32 * (explained - residual).square().sum(dim=1).mean() / variance(residual)
    torch.testing.assert_close(found.total, total)
    for name, gradient in grads(sae, total).items():
        torch.testing.assert_close(grads(sae, sae.loss(xn, state_of(sae, dead=dead)).total)[name], gradient, msg=name)


@with_k
def test_the_auxiliary_gradient_reaches_encoder_rows_of_dead_features(architecture):
    """Also where all their pre-activations are negative, as a dead feature's are."""
    sae, xn = made(architecture, k_aux=4), xn_of()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[2, 7, 11, 23]] = True
    with torch.no_grad():
        sae.b_enc[dead] = -100
    assert (plain_pre(sae, xn)[:, dead] < 0).all()
    without = grads(sae, sae.loss(xn, state_of(sae)).total)
    with_aux = grads(sae, sae.loss(xn, state_of(sae, dead=dead)).total)
    for name in ("encoder", "b_enc", "W_dec"):
        assert (without[name][dead] == 0).all(), name
        assert (with_aux[name][dead] != 0).any(dim=-1).all(), name


@with_k
def test_fewer_dead_features_than_auxiliary_slots_leave_the_living_alone(architecture):
    sae, xn = made(architecture, k_aux=10), xn_of()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[5] = True
    only_auxiliary = grads(sae, sae.loss(xn, state_of(sae, dead=dead)).auxiliary)
    assert torch.isfinite(only_auxiliary["encoder"]).all()
    assert (only_auxiliary["encoder"][~dead] == 0).all()
    assert (only_auxiliary["W_dec"][~dead] == 0).all()
    assert (only_auxiliary["encoder"][5] != 0).all()


@with_k
def test_no_dead_features_make_no_auxiliary_loss(architecture):
    sae = made(architecture)
    found = sae.loss(xn_of(), state_of(sae, dead=torch.zeros(F, dtype=torch.bool)))
    assert found.auxiliary == 0


@with_k
def test_to_be_chosen_is_not_to_fire(architecture):
    sae, xn = made(architecture), xn_of()
    with torch.no_grad():
        sae.b_enc.fill_(-100)
        sae.b_enc[3] = 100
    found = sae.loss(xn, state_of(sae))
    assert found.fired.nonzero().flatten().tolist() == [3]
    assert found.l0 == 1


@with_k
def test_k_of_the_step_is_what_counts_in_training(architecture):
    sae, xn = made(architecture), xn_of(200)
    for k in (1, 2, 5):
        assert sae.loss(xn, state_of(sae, k=k)).l0.item() == pytest.approx(k, rel=0.02)
