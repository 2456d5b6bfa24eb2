import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES, SAEConfig
from flux_ir.sae.architectures.losses import TrainingState
from flux_ir.sae.architectures.make import CLASSES, make_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseFeatures
from flux_ir.sae.kernels.products import PreActivations, Reconstruction

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_every_architecture_has_a_class():
    assert set(CLASSES) == set(ARCHITECTURES)


@every_architecture
def test_encode_and_decode_are_the_textbook_formulas_in_raw_space(architecture, random_sae, tokens):
    sae, x = random_sae(architecture), tokens()
    xn = (x - sae.norm_mean) * sae.norm_scale
    z = sae.features_of(xn)
    assert (z >= 0).all()
    assert 0 < (z > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(x), z / sae.norm_scale)
    x_hat = (z @ sae.W_dec + sae.b_dec) / sae.norm_scale + sae.norm_mean
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)


@every_architecture
def test_sparse_features_are_the_dense_ones_by_number(architecture, random_sae, tokens):
    sae, x = random_sae(architecture), tokens()
    found = sae.encode_sparse(x)
    assert found.indices.dtype == torch.int64
    torch.testing.assert_close(found.dense(), sae.encode(x))


@every_architecture
@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_shapes_follow_the_tokens(architecture, shape, dtype):
    sae = make_sae(SAEConfig(architecture, d_in=6, d_sae=9, k=2))
    x = torch.randn(*shape, 6).to(dtype)
    z = sae.encode(x)
    assert z.shape == (*shape, 9)
    assert z.dtype == torch.float32
    assert sae.decode(z).shape == sae(x).shape == x.shape
    assert sae.encode_sparse(x).d_sae == 9


@every_architecture
def test_folding_changes_neither_features_nor_reconstructions(architecture, random_sae, tokens):
    sae, x = random_sae(architecture), tokens()
    folded = sae.folded()
    assert type(folded) is type(sae)
    assert folded.norm_scale == 1
    assert not folded.norm_mean.any()
    assert torch.equal(folded.W_dec, sae.W_dec)
    assert torch.equal(folded.W_enc, sae.W_enc)
    assert torch.equal(folded.encode(x) > 0, sae.encode(x) > 0)
    scale = x.abs().max()
    torch.testing.assert_close(folded.encode(x) / scale, sae.encode(x) / scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded(x) / scale, sae(x) / scale, rtol=1e-5, atol=1e-6)


@every_architecture
def test_folding_leaves_the_original_alone(architecture, random_sae):
    sae = random_sae(architecture)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.folded()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name])


@every_architecture
def test_folding_twice_is_folding_once_bit_for_bit(architecture, random_sae):
    once = random_sae(architecture).folded()
    twice = once.folded()
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name])


def test_normalised_decoder_has_unit_rows_and_the_same_directions(random_sae):
    sae = random_sae("l1")
    before = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec *= torch.rand(len(before), 1) + 0.1
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(before)))
    torch.testing.assert_close(sae.W_dec.detach(), before)


def test_normalised_tokens_are_centred_and_about_as_long_as_the_square_root_of_their_width(random_sae, tokens):
    sae = random_sae("topk")
    xn = sae.normalise(tokens(500, seed=7))
    assert xn.mean(dim=0).abs().max() < 1e-4
    assert xn.norm(dim=1).mean().item() == pytest.approx(12**0.5, rel=1e-4)


def test_activations_of_another_width_are_refused(random_sae):
    with pytest.raises(FluxIRError, match=r"takes activations 12 wide: got \[3, 11\]"):
        random_sae("topk", site="single.6.img", model="flux-tiny").encode(torch.zeros(3, 11))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_normalisation_that_is_none_is_refused(random_sae, scale):
    with pytest.raises(FluxIRError, match="a finite mean and a scale above 0"):
        random_sae("topk").set_normalisation(torch.zeros(12), scale)
    with pytest.raises(FluxIRError, match="a finite mean"):
        random_sae("topk").set_normalisation(torch.full((12,), float("nan")), 1.0)


def test_padding_may_repeat_an_index():
    found = SparseFeatures(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1, 1, 0]]), 3)
    assert found.dense().tolist() == [[0, 2, 0]]


@every_architecture
def test_everything_but_products_stays_float32_when_products_are_rounded(architecture, random_sae, tokens):
    sae, x = random_sae(architecture), tokens()
    exact = sae.encode(x)
    sae.compute_dtype = torch.bfloat16
    state = TrainingState(0, 0, None, sae.config.k)
    sae.loss(sae.normalise(x), state).total.backward()
    for parameter in sae.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert sae.encode(x).dtype == torch.float32
    if architecture in ("l1", "gated"):  # the others may choose other features
        torch.testing.assert_close(sae.encode(x), exact, rtol=0.05, atol=0.05 * exact.max().item())


def test_bf16_copies_are_what_products_are_made_with(random_sae, tokens):
    sae, x = random_sae("l1"), tokens()
    sae.compute_dtype = torch.bfloat16
    rounded = sae.reconstruct(sae.features_of(sae.normalise(x)))
    sae.encoder_bf16, sae.decoder_bf16 = sae.encoder.detach().bfloat16(), sae.W_dec.detach().bfloat16()
    assert torch.equal(sae.reconstruct(sae.features_of(sae.normalise(x))), rounded)
    sae.decoder_bf16.zero_()
    assert torch.equal(sae.reconstruct(sae.features_of(sae.normalise(x))), sae.b_dec.expand(30, 12))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_the_products_are_exact(with_bias):
    draw = torch.Generator().manual_seed(0)
    x, encoder, b_enc, b_dec = (
        torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (7, 3), (7,), (3,))
    )
    bias = b_enc if with_bias else None

    def pre(x, encoder, b_enc, b_dec):
        return PreActivations.apply(x, encoder, b_enc if with_bias else None, b_dec, None, torch.float64)

    torch.testing.assert_close(
        pre(x, encoder, b_enc, b_dec), torch.nn.functional.linear(x - b_dec, encoder, bias), rtol=1e-12, atol=1e-12
    )
    if with_bias:
        torch.autograd.gradcheck(pre, (x, encoder, b_enc, b_dec))
    else:
        torch.autograd.gradcheck(lambda x, encoder, b_dec: pre(x, encoder, b_enc, b_dec), (x, encoder, b_dec))
    z = torch.randn(5, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z, decoder: Reconstruction.apply(z, decoder, None, torch.float64), (z, encoder))
