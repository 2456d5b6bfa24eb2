"""The effect of features on the velocity: equal to finite differences on a tiny network, at every kind of site."""

import numpy as np
import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.features.effect import EffectMeter, generations_for, gradients, why_not_run
from flux_ir.features.folder import open_features
from flux_ir.recording.intervention import Intervention
from flux_ir.sampling.generate import Inputs
from flux_ir.sites import Site

D_SAE, SIGNS, T = 6, 2, 0.75


@pytest.fixture
def inputs(tiny_inputs):
    given = tiny_inputs(batch=2)
    return Inputs(given.img.double(), given.img_ids, given.txt.double(), given.txt_ids, given.y.double())


@pytest.fixture
def model(tiny_flux):
    """In float64: a difference of two velocities has digits left."""
    return tiny_flux(dtype=torch.float64)


def width(site):
    return 256 if site.endswith("neurons") else 64


def directions(site):
    rows = torch.randn(D_SAE, width(site), generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(rows, dim=1)


def moved(model, inputs, site, direction, token, size):
    """The velocity with `size` of a direction added on one token."""

    def add(value, step):
        value = value.clone()
        value[:, token] += size * direction
        return value

    times = torch.full((2,), T, dtype=torch.float64)
    with torch.no_grad(), Intervention(model, {site: add}):
        return model(inputs.img, inputs.img_ids, inputs.txt, inputs.txt_ids, times, inputs.y, None)


@pytest.mark.parametrize(
    "site", ["double.0.img", "double.1.txt", "single.1.img", "single.1.img.update", "double.0.img.mlp", "single.0.out"]
)
def test_gradients_are_finite_differences(model, inputs, site):
    tokens = {"img": 12, "txt": 7, None: 19}[Site.parse(site).stream]
    found = list(
        gradients(
            model, Site.parse(site), inputs, T, 3.0, generator=torch.Generator().manual_seed(0), sign_vectors=SIGNS
        )
    )
    assert len(found) == SIGNS
    assert found[0].shape == (2, tokens, 64)
    draw, shape = torch.Generator().manual_seed(0), inputs.img.shape
    signs = [torch.randint(0, 2, shape, generator=draw).double() * 2 - 1 for _ in range(SIGNS)]
    size = 1e-2  # parts of the network compute in float32
    for token in (0, tokens - 1):
        direction = directions(site)[0].double()
        up, down = (moved(model, inputs, site, direction, token, sign * size) for sign in (1, -1))
        for u, gradient in zip(signs, found, strict=True):
            expected = (u * (up - down)).sum(dim=(1, 2)) / (2 * size)
            torch.testing.assert_close(gradient[:, token] @ direction, expected, rtol=2e-3, atol=2e-3)


def test_the_effect_is_the_root_mean_square_over_tokens_and_sign_vectors(model, inputs):
    """Written out with loops, everywhere and where active; the fourth feature is never active."""
    draw = np.random.default_rng(0)
    rows = directions("single.1.img")
    meter = EffectMeter(rows)
    everywhere, active = [[] for _ in range(D_SAE)], [[] for _ in range(D_SAE)]
    site = Site.parse("single.1.img")
    for gradient in gradients(model, site, inputs, T, 3.0, generator=torch.Generator(), sign_vectors=SIGNS):
        for image in range(2):
            token, feature = np.nonzero(draw.random((12, D_SAE)) < 0.4)
            token, feature = token[feature != 3], feature[feature != 3]
            meter.add(gradient[image].float(), token, feature)
            for t in range(12):
                for f in range(D_SAE):
                    effect = float(gradient[image, t] @ rows[f].double())
                    everywhere[f].append(effect**2)
                    if f in feature[token == t]:
                        active[f].append(effect**2)
    np.testing.assert_allclose(meter.everywhere(), [np.mean(f) ** 0.5 for f in everywhere], rtol=1e-4)
    expected = [np.mean(f) ** 0.5 if f else np.nan for f in active]
    assert np.isnan(expected).tolist() == [False, False, False, True, False, False]
    np.testing.assert_allclose(meter.where_active(), expected, rtol=1e-4)


def test_many_sign_vectors_come_to_the_length_of_the_jacobian(model, inputs):
    """Of one token and direction: the velocity moves by |dv / dz|, whatever signs are drawn."""
    direction = directions("single.2.img")[0].double()
    size = 1e-2  # parts of the network compute in float32
    up, down = (moved(model, inputs, "single.2.img", direction, 5, sign * size) for sign in (1, -1))
    length = ((up - down)[0] / (2 * size)).norm()
    site, draw = Site.parse("single.2.img"), torch.Generator().manual_seed(1)
    effects = [
        float(gradient[0, 5] @ direction) ** 2
        for gradient in gradients(model, site, inputs, T, 3.0, generator=draw, sign_vectors=100)
    ]
    assert np.mean(effects) ** 0.5 == pytest.approx(length.item(), rel=0.2)


def test_no_hook_and_no_gradient_stay_behind(model, inputs):
    list(gradients(model, Site.parse("single.1.img"), inputs, T, 3.0, generator=torch.Generator(), sign_vectors=1))
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_that_cannot_be_run_again_say_why(small):
    folder = open_features(small / "features" / "img")
    source = open_source(small / "captures")
    assert why_not_run(folder, source, None) == "these activations are of tiny, which this program does not have"
    assert "got 'tiny'" in why_not_run(folder, source, "flux-tiny")  # whose schedule it was, is not known
    assert "of no model that can be run" in why_not_run(folder, object(), "flux-tiny")


def test_generations_are_spread_over_the_prompts(small):
    folder = open_features(small / "features" / "img")  # ten images, two of each prompt
    assert generations_for(folder, 3) == [0, 4, 8]
    assert generations_for(folder, 99) == [0, 2, 4, 6, 8]
