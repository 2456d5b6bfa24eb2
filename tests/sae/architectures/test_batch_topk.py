"""BatchTopK keeps the largest of the batch and learns a threshold; Matryoshka does so for nested dictionaries."""

import pytest
import torch

from flux_ir.sae.architectures.batch_topk import BatchTopK
from tests.sae.small_saes import F, K, N, grads, made, plain_pre, state_of, variance, xn_of


def top_of_batch(pre, k):
    kept = pre.relu().flatten()
    values, indices = kept.topk(k * len(pre))
    return torch.zeros_like(kept).scatter(0, indices, values).view_as(pre)


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
