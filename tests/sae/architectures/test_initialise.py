import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES, SAEConfig
from flux_ir.sae.architectures.initialise import geometric_median, normalisation_of, orthogonal_rows, random_rows
from flux_ir.sae.architectures.make import make_sae

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_architecture
@pytest.mark.parametrize("decoder_init", ["random", "orthogonal"])
def test_decoders_start_with_unit_rows_and_encoders_as_their_transpose(architecture, decoder_init):
    sae = make_sae(SAEConfig(architecture, d_in=6, d_sae=20, k=2, decoder_init=decoder_init))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.encoder is not sae.W_dec


@given(rows=st.integers(1, 30), width=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_orthogonal_rows_are_orthogonal_in_each_block_as_wide_as_they(rows, width):
    found = orthogonal_rows(rows, width, torch.Generator().manual_seed(0))
    assert found.shape == (rows, width)
    for block in found.split(width):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)


def test_blocks_of_orthogonal_rows_differ_and_no_direction_is_preferred():
    draw = torch.Generator().manual_seed(0)
    blocks = torch.stack([orthogonal_rows(4, 2, draw) for _ in range(2000)])
    assert (blocks[:, :2] - blocks[:, 2:]).abs().amax(dim=(1, 2)).min() > 0
    assert blocks.mean(dim=0).abs().max() < 0.06
    assert random_rows(2000, 3, draw).mean(dim=0).abs().max() < 0.06


@pytest.mark.parametrize("encoder_init", ["random", "orthogonal"])
def test_an_encoder_may_start_on_its_own(encoder_init):
    sae = make_sae(SAEConfig("l1", d_in=6, d_sae=20, encoder_init=encoder_init))
    torch.testing.assert_close(sae.encoder.norm(dim=1), torch.ones(20))
    assert (sae.encoder - sae.W_dec).abs().max() > 0.1
    if encoder_init == "orthogonal":
        torch.testing.assert_close(sae.encoder[:6] @ sae.encoder[:6].T, torch.eye(6), atol=1e-5, rtol=0)


@every_architecture
def test_tied_weights_are_one_parameter_and_stay_one(architecture):
    sae = make_sae(SAEConfig(architecture, d_in=6, d_sae=20, k=2, tied=True))
    assert [name for name, _ in sae.named_parameters() if name in ("encoder", "W_dec")] == ["W_dec"]
    with torch.no_grad():
        sae.W_dec.mul_(2)
    sae.normalise_decoder()
    assert torch.equal(sae.W_enc.T, sae.W_dec)
    same = sae.double().folded()
    assert same.encoder is same.W_dec


@every_architecture
def test_the_seed_says_all(architecture):
    def weights(seed):
        return make_sae(SAEConfig(architecture, d_in=6, d_sae=20, k=2, seed=seed)).state_dict()

    torch.manual_seed(1)
    one = weights(3)
    torch.manual_seed(2)
    again, other = weights(3), weights(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["W_dec"], other["W_dec"])


def test_drawing_weights_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make_sae(SAEConfig("topk", d_in=6, d_sae=20, k=2, decoder_init="orthogonal", encoder_init="random"))
    assert torch.equal(torch.get_rng_state(), before)


def test_b_dec_starts_at_the_mean_or_the_geometric_median(tokens):
    x = tokens(200)
    x[:20] += 500
    mean = make_sae(SAEConfig("l1", d_in=12, d_sae=20), sample=x)
    median = make_sae(SAEConfig("l1", d_in=12, d_sae=20, bias_init="geometric_median"), sample=x)
    assert mean.b_dec.abs().max() < 1e-4
    raw_median = median.norm_mean + median.b_dec.detach() / median.norm_scale
    centre = x[20:].mean(dim=0)
    assert (raw_median - centre).norm() < 0.2 * (x.mean(dim=0) - centre).norm()
    torch.testing.assert_close(median.decode(torch.zeros(1, 20))[0], raw_median)


def test_given_statistics_stand_before_those_of_the_sample(tokens):
    x, given_mean = tokens(50), torch.arange(12.0)
    sae = make_sae(SAEConfig("l1", d_in=12, d_sae=20), sample=x, mean=given_mean, scale=0.5)
    assert torch.equal(sae.norm_mean, given_mean)
    assert sae.norm_scale == 0.5
    torch.testing.assert_close(sae.b_dec.detach(), (x.mean(dim=0) - given_mean) * 0.5)
    plain = make_sae(SAEConfig("l1", d_in=12, d_sae=20))
    assert not plain.norm_mean.any()
    assert plain.norm_scale == 1
    assert not plain.b_dec.any()


def test_normalised_tokens_have_length_root_d_on_average(tokens):
    x = tokens(100)
    mean, scale = normalisation_of(x.bfloat16())
    xn = (x.bfloat16().float() - mean) * scale
    assert xn.norm(dim=1).mean().item() == pytest.approx(math.sqrt(12), rel=1e-5)
    assert xn.mean(dim=0).abs().max() < 1e-4


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.ones(1, 3), torch.tensor([[1.0, float("nan")], [1.0, 2.0]])])
def test_tokens_that_cannot_be_normalised_are_refused(x):
    with pytest.raises(FluxIRError, match="tokens must be finite and differ"):
        normalisation_of(x)


def test_the_geometric_median_has_the_least_mean_distance():
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    points[:10] *= 50

    def distance(to):
        return (points - to).norm(dim=1).mean()

    found = geometric_median(points)
    for dimension in range(4):
        for step in (-0.02, 0.02):
            assert distance(found) < distance(found + step * torch.eye(4)[dimension])
    assert found.dtype == torch.float32


def test_the_geometric_median_of_points_on_a_line_is_their_median():
    found = geometric_median(torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]]), iterations=2000, tolerance=1e-9)
    assert found.item() == pytest.approx(2, abs=0.01)


def test_the_geometric_median_of_equal_points_is_that_point():
    torch.testing.assert_close(geometric_median(torch.full((7, 3), 2.5)), torch.full((3,), 2.5))
