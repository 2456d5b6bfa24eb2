"""Gated: the loss and gradients of the paper; its gate alone decides what fires."""

import torch

from tests.sae.small_saes import N, grads, made, plain_pre, state_of, xn_of


def test_gated_loss_and_gradients_are_those_of_the_paper():
    sae, xn = made("gated", l1_coefficient=0.4), xn_of()
    pre = (xn - sae.b_dec) @ sae.encoder.T
    gate = (pre + sae.b_enc).relu()
    z = (gate > 0) * (pre * sae.r_mag.exp() + sae.b_mag).relu()
    error = (z @ sae.W_dec + sae.b_dec - xn).square().sum(dim=1).mean()
    held = (gate @ sae.W_dec.detach() + sae.b_dec.detach() - xn).square().sum(dim=1).mean()
    total = error + 0.4 * (gate * sae.W_dec.norm(dim=1)).sum(dim=1).mean() + held
    found = sae.loss(xn, state_of(sae))
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(sae.features_of(xn), z)
    for name, gradient in grads(sae, total).items():
        torch.testing.assert_close(
            grads(sae, sae.loss(xn, state_of(sae)).total)[name], gradient, rtol=1e-4, atol=1e-5, msg=name
        )


def test_the_gate_gets_a_sparsity_gradient_and_the_magnitude_none():
    sae, xn = made("gated"), xn_of()
    gradients = grads(sae, sae.loss(xn, state_of(sae)).sparsity)
    opened = (plain_pre(sae, xn) > 0).sum(dim=0)
    torch.testing.assert_close(gradients["b_enc"], sae.config.l1_weight * opened / N)
    assert not gradients["b_mag"].any()
    assert not gradients["r_mag"].any()


def test_the_auxiliary_reconstruction_of_the_gate_leaves_the_decoder_alone():
    sae, xn = made("gated"), xn_of()
    gradients = grads(sae, sae.loss(xn, state_of(sae)).auxiliary)
    assert not gradients["W_dec"].any()
    assert gradients["b_enc"].any()
    through_encoder = -(gradients["b_enc"] @ sae.encoder)  # b_dec is also what the encoder is centred by
    torch.testing.assert_close(gradients["b_dec"], through_encoder)


def test_a_closed_gate_means_no_feature_however_large_its_magnitude():
    sae, xn = made("gated"), xn_of()
    with torch.no_grad():
        sae.b_enc[4], sae.b_mag[4] = -100, 100
        sae.b_enc[5], sae.b_mag[5] = 100, -100
    found = sae.loss(xn, state_of(sae))
    assert not found.fired[4]
    assert not found.fired[5]
    assert not sae.features_of(xn)[:, 4:6].any()
