"""Derivatives of the velocity by block outputs, and the lens that is made of them, on random networks in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.functional import jacobian

from flux_ir.errors import FluxIRError
from flux_ir.lens.jacobian import (
    JacobianLens,
    JacobianMap,
    MeanJacobian,
    jacobians_of,
    linearise,
    load_jacobian_lens,
    receptive_fields,
)
from flux_ir.lens.judge import Spread
from flux_ir.models.flux1.attention import rotary_table
from flux_ir.recording.recorder import Recorder
from flux_ir.sampling.generate import Inputs
from flux_ir.sites import Site

SITES = [Site.parse(name) for name in ("double.0.img", "double.1.img", "single.0.img", "single.1.img", "single.2.img")]
LAST, BEFORE = SITES[-1], SITES[-2]
T = 0.75


@pytest.fixture
def model(tiny_flux):
    return tiny_flux(dtype=torch.float64)


@pytest.fixture
def inputs(tiny_inputs):
    made = tiny_inputs(batch=2, dtype=torch.float64)
    return Inputs(made.img, made.img_ids, made.txt.double(), made.txt_ids, made.y.double())


@pytest.fixture
def recorded(model, inputs):
    """What single blocks 1 and 2 put out, text and image, the velocity, and the conditioning."""
    timesteps = torch.full((2,), T, dtype=torch.float64)
    with Recorder(model, ["single.1", "single.2"]) as recorder, torch.no_grad():
        velocity = model(*inputs[:4], timesteps, inputs.y)
    before, last = (recorder.sink.values[0, Site.parse(f"single.{block}")] for block in (1, 2))
    return before, last, velocity, model.conditioning(timesteps, inputs.y)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def explicit(model, inputs, before, vec, rows):
    """d of these [token, channel] of the first picture's velocity by what single block 1 put out: [rows, img, d]."""
    rotation = rotary_table(
        torch.cat([inputs.txt_ids, inputs.img_ids], dim=1), model.params.axes_dim, model.params.theta
    )
    txt = inputs.txt.shape[1]

    def velocity(img):
        x = torch.cat([before[:1, :txt], img[None]], dim=1)
        x = model.single_blocks[2].forward(x, vec[:1], rotation[:1])
        return model.read_out(x[:, txt:], vec[:1])[0][tuple(zip(*rows, strict=True))]

    return jacobian(velocity, before[0, txt:])


def last_layer(model, vec, token):
    return model.read_out(token[None, None], vec)[0, 0]


def test_a_forward_with_leaves_has_the_bits_of_one_without(model, inputs, recorded):
    assert torch.equal(linearise(model, SITES, inputs, T, 1.0).velocity, recorded[2])


def test_jacobians_and_receptive_fields_are_those_of_an_explicit_one(model, inputs, recorded):
    before, _, _, vec = recorded
    forward = linearise(model, [BEFORE], inputs, T, 1.0)
    tokens, channels = before.shape[1] - inputs.txt.shape[1], 5
    some = [(p, c) for p in range(tokens) for c in range(channels)]
    whole = explicit(model, inputs, before, vec, some).reshape(tokens, channels, tokens, -1)
    draws = [jacobians_of(forward, draw(seed))[BEFORE] for seed in range(8)]
    # Rotary positions are float32 in a network of float64 too.
    summed = draws[0]["summed"][0, :channels]
    assert torch.allclose(summed, whole.sum(0).mean(1), rtol=1e-4, atol=1e-6)
    # With signs at random the same-position one is right in the mean.
    diagonal = torch.stack([whole[p, :, p] for p in range(tokens)]).mean(0)
    same = torch.stack([one["same"][0, :channels] for one in draws])
    one, eight = ((value - diagonal).norm() / diagonal.norm() for value in (same[0], same.mean(0)))
    assert eight < 0.6 * one  # 0.35 is expected of draws without bias
    assert eight < 0.2
    of_token = explicit(model, inputs, before, vec, [(7, c) for c in range(64)])
    field = receptive_fields(forward, 7)[BEFORE][0]
    assert torch.allclose(field, of_token.square().sum((0, 2)).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # on a CPU: attention has no batched gradient there
def test_pulling_back_together_gives_the_same(model, inputs):
    forward = linearise(model, [BEFORE, LAST], inputs, T, 1.0)
    one, together = jacobians_of(forward, draw()), jacobians_of(forward, draw(), at_once=48)  # 48 and 16 of them
    for site in (BEFORE, LAST):
        for version in ("same", "summed"):
            assert torch.allclose(one[site][version], together[site][version], rtol=1e-10, atol=1e-12)


def test_at_the_last_block_both_are_the_last_layers_own_for_each_token(model, inputs, recorded):
    _, last, _, vec = recorded
    img = last[:, inputs.txt.shape[1] :]
    own = torch.stack(
        [
            torch.stack([jacobian(partial(last_layer, model, vec[picture : picture + 1]), h) for h in img[picture]])
            for picture in range(2)
        ]
    )
    forward = linearise(model, [LAST], inputs, T, 1.0)
    found = jacobians_of(forward, draw())[LAST]
    assert torch.allclose(found["same"], own.mean(1), rtol=1e-10, atol=1e-12)
    assert torch.allclose(found["summed"], own.mean(1), rtol=1e-10, atol=1e-12)
    # Token by token too: a patch is moved by its own token alone, by as much.
    field = receptive_fields(forward, 3)[LAST]
    assert torch.allclose(field[:, 3], own[:, 3].flatten(1).norm(dim=1), rtol=1e-10)
    assert (field.count_nonzero(dim=1) == 1).all()


def test_one_tokens_own_lens_is_exact_where_layernorm_is_blind_and_j_h_alone_is_not(model, inputs, recorded):
    _, last, velocity, vec = recorded
    token = last[:1, inputs.txt.shape[1] + 2][:, None]
    own = jacobian(partial(last_layer, model, vec[:1]), token[0, 0])
    lens = JacobianMap(own, own, token[0, 0], velocity[0, 2])
    # LayerNorm takes out mean and length: its epsilon, 1e-6 of the variance, is all that is left.
    moved = 1.3 * token + 0.7
    assert torch.allclose(lens.read(moved, "same"), model.read_out(moved, vec[:1]), rtol=0, atol=1e-5)
    assert (own @ token[0, 0]).norm() < 1e-5 * velocity[0, 2].norm()
    small = token + 1e-5 * torch.randn(token.shape, generator=draw(), dtype=torch.float64)
    left = (lens.read(small, "same") - model.read_out(small, vec[:1])).norm()
    assert left < 1e-4 * (model.read_out(small, vec[:1]) - velocity[:1, 2:3]).norm()


def test_over_all_tokens_the_lens_says_the_mean_velocity(model, inputs, recorded):
    _, last, velocity, _ = recorded
    tokens, velocities = Spread(), Spread()
    tokens.add(last[:, inputs.txt.shape[1] :])
    velocities.add(velocity)
    found = jacobians_of(linearise(model, [LAST], inputs, T, 1.0), draw())[LAST]["same"].mean(0)
    said = JacobianMap(found, found, tokens.mean, velocities.mean).read(last[:, inputs.txt.shape[1] :], "same")
    assert torch.allclose(said.mean((0, 1)), velocity.mean((0, 1)), rtol=1e-10)


def test_guidance_is_given_to_models_that_take_it(tiny_flux, tiny_inputs):
    made = tiny_inputs(guidance=3.0)
    found = linearise(tiny_flux(guidance=True), [LAST], Inputs(*made[:4], made.y), T, 3.0).velocity
    assert torch.equal(found.detach(), tiny_flux(guidance=True)(*made))


def test_a_token_that_there_is_not_is_refused(model, inputs):
    with pytest.raises(FluxIRError, match="has the tokens 0 to 11: got 12"):
        receptive_fields(linearise(model, [LAST], inputs, T, 1.0), 12)


def test_means_tell_how_far_they_may_be_off():
    values = torch.randn(400, 3, 5, generator=draw()) + 1
    mean = MeanJacobian()
    for part in values.split(7):
        mean.add(part)
    assert torch.allclose(mean.mean, values.double().mean(0))
    assert mean.relative_error == pytest.approx(1 / 20, rel=0.1)  # noise as large as the mean, 400 draws
    alone = MeanJacobian()
    alone.add(values[:1])
    assert alone.relative_error is None


def test_a_lens_comes_back_from_its_file_and_reads_only_its_own(tmp_path, tiny_flux):
    draws = draw()
    found = JacobianMap(*(torch.randn(*shape, generator=draws) for shape in ((64, 64), (64, 64), (64,), (64,))))
    settings = {"model": "flux-tiny", "weights": "abcd", "timesteps": [1.0, 0.0], "guidance": 1.0}
    lens = JacobianLens(settings, {(SITES[0], 0): JacobianMap(*(2 * part for part in found)), (LAST, 0): found})
    lens.save(tmp_path)
    again = load_jacobian_lens(tmp_path, "summed")
    assert again.settings == settings
    assert list(again.places) == [(SITES[0], 0), (LAST, 0)]
    img = torch.randn(1, 5, 64, generator=draws)
    said = again.velocity(tiny_flux(), Site.parse("single.2"), 0, img, torch.zeros(1, 64))
    assert torch.equal(said, replace(lens, version="summed").maps[LAST, 0].read(img, "summed"))
    again.check_weights("flux-tiny", "abcd", 64)
    with pytest.raises(FluxIRError, match=r"was fitted to flux-tiny \(weights abcd\): these are other weights of it"):
        again.check_weights("flux-tiny", "0000", 64)
    with pytest.raises(FluxIRError, match="reads tokens of 64 channels: those of flux-tiny have 192"):
        again.check_weights("flux-tiny", "abcd", 192)
    with pytest.raises(FluxIRError, match="there is no jacobian lens at"):
        load_jacobian_lens(tmp_path / "nothing")
