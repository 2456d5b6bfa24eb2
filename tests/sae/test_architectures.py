import math

import pytest
import torch

from flux_ir.sae import losses
from flux_ir.sae.architectures import make_sae
from flux_ir.sae.batch_topk import BatchTopK
from flux_ir.sae.config import ARCHITECTURES, HAS_K, SAEConfig
from flux_ir.sae.losses import TrainingState

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
with_k = pytest.mark.parametrize("architecture", HAS_K)
N, D, F, K = 16, 8, 24, 3


def xn_of(n=N, seed=0, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(sae, *, dead=None, l1_scale=1.0, across=None, k=None):
    across = losses.OneProcess() if across is None else across
    return TrainingState(0, 0, dead, k or sae.config.k, l1_scale, across)


def made(architecture, **fields):
    """Encoder and decoder apart, biases not 0, so that no term hides behind another."""
    sae = make_sae(SAEConfig(architecture, **{"d_in": D, "d_sae": F, "k": K, **fields}))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec" and name != "threshold":
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return sae


def grads(sae, total):
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def plain_pre(sae, xn):
    return (xn - sae.b_dec) @ sae.encoder.T + sae.b_enc


def top_of_rows(pre, k):
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def top_of_batch(pre, k):
    kept = pre.relu().flatten()
    values, indices = kept.topk(k * len(pre))
    return torch.zeros_like(kept).scatter(0, indices, values).view_as(pre)


def variance(x):
    return (x - x.mean(dim=0)).square().sum(dim=1).mean()


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


# TopK


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


# BatchTopK and Matryoshka


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_batch_topk_keeps_the_largest_of_the_batch_exactly(spread):
    """With a spread, some tokens take so many that the columns first looked at are not enough."""
    sae, xn = made("batch_topk", k=2), xn_of(64)
    xn = xn * (1 + spread * (torch.arange(64) > 60))[:, None]
    found = sae.loss(xn, state_of(sae))
    z = top_of_batch(plain_pre(sae, xn), 2)
    assert ((z > 0).sum(dim=1).max() > 8) == bool(spread)
    total = (z @ sae.W_dec + sae.b_dec - xn).square().sum(dim=1).mean() / variance(xn)
    torch.testing.assert_close(found.total, total)
    assert found.l0.item() == 2
    assert torch.equal(found.fired, (z > 0).any(dim=0))
    for name, gradient in grads(sae, total).items():
        torch.testing.assert_close(grads(sae, sae.loss(xn, state_of(sae)).total)[name], gradient, msg=name)


def test_batch_topk_without_enough_positive_activations_keeps_those_there_are():
    sae, xn = made("batch_topk"), xn_of()
    with torch.no_grad():
        sae.b_enc.fill_(-2.5)
    found = sae.loss(xn, state_of(sae))
    assert 0 < found.l0 < K
    assert found.l0.item() * N == pytest.approx((plain_pre(sae, xn) > 0).sum().item())


def test_the_threshold_follows_the_smallest_kept_activation():
    sae, smallest = made("batch_topk"), []
    assert sae.threshold == 0
    for seed in range(30):
        xn = xn_of(seed=seed)
        z = top_of_batch(plain_pre(sae, xn), K)
        smallest.append(z[z > 0].min().item())
        sae.loss(xn, state_of(sae))
        if seed == 0:
            assert sae.threshold.item() == pytest.approx(smallest[0])
    assert min(smallest) < sae.threshold < max(smallest)
    assert sae.threshold.item() == pytest.approx(sum(smallest) / 30, rel=0.1)
    assert sae.threshold.dtype == torch.float32


def test_a_batch_without_activations_leaves_the_threshold():
    sae = made("batch_topk")
    sae.loss(xn_of(), state_of(sae))
    before = sae.threshold.clone()
    with torch.no_grad():
        sae.b_enc.fill_(-1000)
    found = sae.loss(xn_of(), state_of(sae))
    assert found.l0 == 0
    assert torch.isfinite(found.total)
    assert sae.threshold == before


def test_batch_topk_at_inference_takes_each_token_on_its_own():
    sae, xn = made("batch_topk"), xn_of()
    sae.loss(xn, state_of(sae))
    z = sae.features_of(xn)
    torch.testing.assert_close(z[3:4], sae.features_of(xn[3:4]))
    pre = plain_pre(sae, xn)
    torch.testing.assert_close(z, torch.where(pre > sae.threshold, pre, 0))


def test_two_processes_choose_what_one_would():
    """One process has the large tokens; each keeps its share of the largest of all."""
    xn = xn_of(32) * (1 + (torch.arange(32) < 16))[:, None]
    whole = made("batch_topk")
    together = whole.loss(xn, state_of(whole))
    halves = (xn[:16], xn[16:])

    class Both:
        """Knows what the other process would say to each question, in order."""

        def __init__(self, mine, other, sae):
            self.first = mine is halves[0]
            values = plain_pre(sae, other).relu().topk(4 * K, dim=1).values
            mean = xn.mean(dim=0)
            self.means = [torch.tensor(0.0), other.mean(dim=0), (other - mean).square().sum(dim=1).mean()]
            self.values = values

        def mean(self, value):
            return (value + self.means.pop(0)) / 2

        def gather(self, value):
            return torch.cat([value, self.values] if self.first else [self.values, value])

    parts = []
    for mine, other in (halves, halves[::-1]):
        sae = made("batch_topk")
        parts.append(sae.loss(mine, state_of(sae, across=Both(mine, other, sae))))
        torch.testing.assert_close(sae.threshold, whole.threshold)
    torch.testing.assert_close((parts[0].total + parts[1].total) / 2, together.total)
    assert parts[0].l0 > K > parts[1].l0


def test_matryoshka_is_the_mean_of_its_nested_dictionaries():
    sae, xn = made("matryoshka", prefixes=(2, 10, F)), xn_of()
    assert isinstance(sae, BatchTopK)
    z = top_of_batch(plain_pre(sae, xn), K)
    errors = []
    for size in (2, 10, F):
        x_hat = z[:, :size] @ sae.W_dec[:size] + sae.b_dec
        errors.append((x_hat - xn).square().sum(dim=1).mean() / variance(xn))
    found = sae.loss(xn, state_of(sae))
    total = torch.stack(errors).mean()
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.fvu, errors[-1].detach())
    for name, gradient in grads(sae, total).items():
        torch.testing.assert_close(grads(sae, sae.loss(xn, state_of(sae)).total)[name], gradient, msg=name)


def test_matryoshka_of_one_dictionary_is_batch_topk():
    xn = xn_of()
    one, plain = made("matryoshka", prefixes=(F,)), made("batch_topk")
    torch.testing.assert_close(one.loss(xn, state_of(one)).total, plain.loss(xn, state_of(plain)).total)


def test_a_nested_dictionary_in_which_nothing_is_active_is_no_trouble():
    sae, xn = made("matryoshka", prefixes=(2, 4, F)), xn_of()
    with torch.no_grad():
        sae.b_enc[:4] = -1000
    found = sae.loss(xn, state_of(sae))
    found.total.backward()
    assert not found.fired[:4].any()
    assert torch.isfinite(sae.encoder.grad).all()


# L1


def test_l1_loss_and_gradients_are_the_formula():
    sae, xn = made("l1", l1_coefficient=0.7), xn_of()
    z = plain_pre(sae, xn).relu()
    error = (z @ sae.W_dec + sae.b_dec - xn).square().sum(dim=1).mean()
    total = error + 0.7 * 0.25 * (z * sae.W_dec.norm(dim=1)).sum(dim=1).mean()
    found = sae.loss(xn, state_of(sae, l1_scale=0.25))
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.reconstruction, error)
    for name, gradient in grads(sae, total).items():
        torch.testing.assert_close(
            grads(sae, sae.loss(xn, state_of(sae, l1_scale=0.25)).total)[name], gradient, msg=name
        )


@pytest.mark.parametrize("architecture", ["l1", "gated", "jumprelu"])
def test_the_penalty_warms_up(architecture):
    sae, xn = made(architecture), xn_of()
    whole = sae.loss(xn, state_of(sae)).sparsity
    assert sae.loss(xn, state_of(sae, l1_scale=0.0)).sparsity == 0
    torch.testing.assert_close(sae.loss(xn, state_of(sae, l1_scale=0.5)).sparsity, whole / 2)


# JumpReLU


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


# Gated


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
