"""Estimates of removals: against exact derivatives of the whole sampler, and what is counted and compared."""

import pytest
import torch

from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.generate import noise_for, prepare, sample
from flux_ir.sites import Site
from flux_ir.steering.apply import steered
from flux_ir.steering.attribution import Source, Walk, estimate_in_parts, joined, signs, states_of, walk_back
from flux_ir.steering.edits import Edit
from tests.steering.conftest import D_SAE, GRID, TXT_TOKENS

TIMES = [1.0, 0.6, 0.3, 0.0]
INSIDE = torch.arange(GRID.tokens) < 5


@pytest.fixture
def run(tiny_flux, tiny_inputs):
    """The tiny network in float64 and the inputs of one run."""
    model, given = tiny_flux(dtype=torch.float64), tiny_inputs(dtype=torch.float64)
    noise = noise_for([0], GRID.height, GRID.width, "cpu", torch.float64)
    return model, prepare(noise, TextEmbedding(given.txt, given.y), GRID.height, GRID.width)


def estimates_of(run, sae, site, probes=2, steps=range(3), draws=None):
    model, inputs = run
    states = states_of(model, inputs, TIMES, 1.0, {}).before
    draws = signs(probes, INSIDE, states[0].shape[2], seed=0) if draws is None else draws
    walk = Walk(inputs, states, TIMES, 1.0, [Source(sae, site, "")], list(steps), INSIDE)
    return joined([one for (one,) in estimate_in_parts(model, walk, draws)])


def values_of(token, count, packed=64):
    """A draw for each of the first values of one token, in place of signs: what comes of it has no error."""
    draws = torch.zeros(count, GRID.tokens, packed)
    draws[:, token, :count] = torch.eye(count)
    return draws


def derivative(run, steering, edit, tokens):
    """d(finished latent of some tokens) / d(share that is removed) at 0, by scale edits on both sides."""
    model, inputs = run

    def latent(share):
        with steered(model, [steering(edit.at(1 - share), num_steps=3)]):
            *_, last = sample(model, inputs, TIMES, 1.0)
        return last.after[0, tokens]

    return (latent(1e-3) - latent(-1e-3)) / 2e-3


@pytest.mark.parametrize("name", ["double.1.img", "double.0.txt", "single.1", "single.0.img", "double.1.img.update"])
def test_gradients_give_the_exact_derivative_through_all_steps(run, tiny_sae, steering, name):
    sae, token, count = tiny_sae(site=name), 2, 12
    found = estimates_of(run, sae, Site.parse(name), draws=values_of(token, count))
    for feature in found.change.topk(2).indices.tolist():
        exact = derivative(run, steering, Edit(kind="scale", sae=sae, feature=feature), token)[:count]
        assert torch.allclose(found.dots[:, feature], exact.float(), rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_the_mean_over_draws_is_the_length_of_the_exact_derivative(run, tiny_sae, steering):
    sae = tiny_sae()
    found = estimates_of(run, sae, Site.parse("double.1.img"), probes=48)
    first, second = found.change.topk(2).indices.tolist()
    for features, estimate in (
        (first, found.change[first]),
        (second, found.change[second]),
        ((first, second), found.dots[:, [first, second]].sum(dim=1).square().mean().sqrt()),
    ):
        exact = derivative(run, steering, Edit(kind="scale", sae=sae, feature=features), INSIDE).norm()
        assert float(estimate) == pytest.approx(float(exact), rel=0.2)  # twice the standard error of 48 draws


def test_one_step_alone_is_the_removal_at_that_step(run, tiny_sae, steering):
    sae, site = tiny_sae(), Site.parse("double.1.img")
    every, middle = (estimates_of(run, sae, site, 8, steps) for steps in (range(3), [1]))
    assert torch.allclose(every.by_step[1], middle.by_step[1])
    assert torch.allclose(middle.change, middle.by_step[1])
    assert not middle.by_step[[0, 2]].any()


def test_what_is_never_active_has_no_effect_and_what_is_counted_is_active(run, tiny_sae):
    sae, site = tiny_sae(), Site.parse("double.1.img")
    sae.b_enc[:4] = -1e6  # four features that are never active
    found = estimates_of(run, sae, site, probes=8)
    model, inputs = run
    states = states_of(model, inputs, TIMES, 1.0, {}).before
    assert not found.fires[:4].any()
    assert not found.change[:4].any()
    assert not found.dots.isnan().any()
    draws = signs(1, INSIDE, 64, seed=0)
    z = torch.stack(
        [
            sae.encode(at.values[site].float())
            for at in walk_back(model, inputs, states, TIMES, 1.0, [site], draws, [0, 1, 2])
        ]
    )
    assert torch.equal(found.active, (z > 0).sum(dim=(0, 1)))
    assert torch.equal(found.active_inside, (z[:, INSIDE] > 0).sum(dim=(0, 1)))
    assert torch.equal(found.fires, (z > 0).any(dim=(0, 1)))


def test_text_tokens_of_a_single_block_are_no_place_on_the_picture(run, tiny_sae):
    whole = estimates_of(run, tiny_sae(site="single.1"), Site.parse("single.1"), probes=2)
    image = estimates_of(run, tiny_sae(site="single.1.img"), Site.parse("single.1.img"), probes=2)
    assert torch.equal(whole.active, image.active)
    assert torch.equal(whole.active_inside, image.active_inside)
    text = estimates_of(run, tiny_sae(site="double.1.txt"), Site.parse("double.1.txt"), probes=2)
    assert not text.active.any()
    assert text.fires.any()


def test_the_walk_leaves_no_hook_and_the_same_draws(run, tiny_sae):
    model, _ = run
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    first, second = (estimates_of(run, tiny_sae(), Site.parse("double.1.img"), probes=4) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == before
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_estimates_do_not_depend_on_the_number_of_threads(run, tiny_sae):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(estimates_of(run, tiny_sae(), Site.parse("double.1.img"), probes=6))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_stored_states_are_used_and_compared(run):
    model, inputs = run
    plain = states_of(model, inputs, TIMES, 1.0, {})
    *_, last = sample(model, inputs, TIMES, 1.0)
    assert torch.equal(plain.last, last.after)
    assert plain.drift == 0
    again = states_of(model, inputs, TIMES, 1.0, {0: plain.before[0], 2: plain.before[2]})
    assert all(map(torch.equal, plain.before, again.before))
    assert again.drift == 0
    off = states_of(model, inputs, TIMES, 1.0, {1: 1.01 * plain.before[1]})
    assert off.drift == pytest.approx(0.01 / 1.01)
    assert torch.equal(off.before[1], 1.01 * plain.before[1])
    assert not torch.equal(off.last, plain.last)


def test_signs_are_on_the_region_alone_and_do_not_depend_on_it():
    draws = signs(3, INSIDE, 8, seed=5)
    assert draws[:, INSIDE].abs().eq(1).all()
    assert not draws[:, ~INSIDE].any()
    assert torch.equal(signs(3, INSIDE | True, 8, seed=5)[:, INSIDE], draws[:, INSIDE])
    assert not torch.equal(signs(3, INSIDE, 8, seed=6), draws)


def test_there_are_as_many_numbers_as_features(run, tiny_sae):
    found = estimates_of(run, tiny_sae(), Site.parse("double.1.img"), probes=2)
    assert found.dots.shape == (2, D_SAE)
    assert TXT_TOKENS == 7  # what `tiny_inputs` makes, too
