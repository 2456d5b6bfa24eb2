"""Baselines against what they are by definition, and in the order they must come in."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sae.evaluation.baselines import (
    ITDA,
    PCA,
    BaselineConfig,
    Covariance,
    Neurons,
    RandomDictionary,
    gradient_pursuit,
)
from flux_ir.sites import Site

D = 24


@pytest.fixture(scope="module")
def tokens():
    """Sparse mixtures of 60 directions in 24 dimensions, around a mean."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, D, generator=draw), dim=1)
    codes = torch.rand(600, 60, generator=draw) * (torch.rand(600, 60, generator=draw) < 0.05)
    return codes @ directions + 5 + 0.01 * torch.randn(600, D, generator=draw)


@pytest.fixture(scope="module")
def covariance(tokens):
    covariance = Covariance(D)
    for part in tokens.split(37):
        covariance.add(part)
    return covariance


def fvu(reconstructed, x):
    return ((reconstructed - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


# ---- PCA


def test_the_covariance_does_not_depend_on_the_batches(tokens, covariance):
    assert covariance.count == 600
    torch.testing.assert_close(covariance.mean, tokens.double().mean(0))
    torch.testing.assert_close(covariance.products / 599, torch.cov(tokens.double().T), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, D])
def test_pca_reconstructs_as_the_truncated_svd_does(tokens, covariance, rank):
    centred = tokens.double() - tokens.double().mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    expected = u[:, :rank] * s[:rank] @ v[:rank] + tokens.double().mean(0)
    pca = PCA.of(covariance, rank)
    torch.testing.assert_close(pca(tokens).double(), expected, rtol=1e-5, atol=1e-5)
    unexplained = ((s[rank:] ** 2).sum() / (s**2).sum()).item()
    assert fvu(pca(tokens), tokens).item() == pytest.approx(unexplained, rel=1e-3, abs=1e-9)
    torch.testing.assert_close(pca.W_dec @ pca.W_dec.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_the_sign_of_a_component_is_fixed(covariance):
    rows = PCA.of(covariance, 7).W_dec
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_pca_has_no_more_components_than_dimensions(covariance):
    with pytest.raises(FluxIRError, match=f"has at most {D} components: got rank {D + 1}"):
        PCA.of(covariance, D + 1)


def test_pca_of_nothing_is_refused():
    with pytest.raises(FluxIRError, match="needs at least one token"):
        PCA.of(Covariance(4), 2)


# ---- Pursuit, random directions, data points


def test_pursuit_finds_the_atoms_a_token_is_made_of():
    atoms = torch.eye(6)
    codes = gradient_pursuit(torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0, -2.0]]), atoms, k=4)
    torch.testing.assert_close(codes, torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0]]), rtol=0, atol=0.05)


def test_pursuit_chooses_at_most_k_atoms_and_errors_fall_with_k(tokens):
    atoms = torch.nn.functional.normalize(torch.randn(80, D, generator=torch.Generator().manual_seed(1)), dim=1)
    x = tokens - tokens.mean(0)
    errors = []
    for k in (1, 2, 4, 8, 16):
        codes = gradient_pursuit(x, atoms, k)
        assert (codes >= 0).all()
        assert ((codes > 0).sum(1) <= k).all()
        errors.append(((x - codes @ atoms) ** 2).sum().item())
    assert errors == sorted(errors, reverse=True)


def test_pursuit_does_not_depend_on_how_many_rows_are_worked_on_at_once(tokens, monkeypatch):
    atoms = torch.nn.functional.normalize(tokens[:50] - 5, dim=1)
    whole = gradient_pursuit(tokens - 5, atoms, 4)
    monkeypatch.setattr("flux_ir.sae.evaluation.baselines.CODES_AT_ONCE", 7 * 50)
    torch.testing.assert_close(gradient_pursuit(tokens - 5, atoms, 4), whole)


@pytest.mark.parametrize("size", [2.0**-46, 2.0**40])
def test_codes_and_data_points_are_the_same_whatever_the_unit_of_the_activations(tokens, size):
    x, mean = tokens[:60], tokens.mean(0)
    plain, scaled = (ITDA.fit(unit * x, unit * mean, 20, 3) for unit in (1.0, size))
    assert torch.equal(scaled.atom_tokens, plain.atom_tokens)
    torch.testing.assert_close(scaled.encode(size * x) / size, plain.encode(x))


def test_data_points_reconstruct_the_data_they_are(tokens):
    mean = tokens.mean(0)
    itda = ITDA.fit(tokens[:40], mean, d_sae=40, k=1)
    assert itda.config.d_sae == 40
    assert sorted(itda.atom_tokens.tolist()) == list(range(40))
    torch.testing.assert_close(itda(tokens[:40]), tokens[:40], rtol=1e-5, atol=1e-5)


def test_a_token_that_others_explain_becomes_no_atom(tokens):
    repeated = torch.cat([tokens[:10]] * 5)
    itda = ITDA.fit(repeated, tokens.mean(0), d_sae=30, k=1)
    assert itda.config.d_sae == 10
    assert sorted(itda.atom_tokens.tolist()) == list(range(10))


def test_a_dictionary_of_data_points_needs_k_of_them(tokens):
    with pytest.raises(FluxIRError, match=r"at least k = 3 tokens that differ: found 1 among 4"):
        ITDA.fit(tokens[:1].repeat(4, 1), tokens.mean(0), d_sae=8, k=3)


def test_what_knows_the_data_is_better_than_what_does_not(tokens):
    """With many more atoms than PCA has components, and on mixtures that are sparse, as they are here."""
    train, held_out = tokens[:500], tokens[500:]
    covariance = Covariance(D)
    covariance.add(train)
    mean = covariance.mean.float()
    draw = torch.Generator().manual_seed(3)
    by_name = {
        "itda": ITDA.fit(train, mean, d_sae=200, k=4),
        "pca": PCA.of(covariance, 4),
        "random": RandomDictionary.draw(mean, 200, 4, draw),
    }
    errors = {name: fvu(baseline(held_out), held_out).item() for name, baseline in by_name.items()}
    assert errors["itda"] < errors["random"] < 1
    assert errors["itda"] < errors["pca"] < 1


def test_random_directions_are_unit_rows_and_the_same_for_the_same_seed():
    mean = torch.zeros(D)
    first, again = (RandomDictionary.draw(mean, 50, 3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.W_dec, again.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(50))


def test_features_keep_the_axes_of_the_tokens(tokens, covariance):
    mean, batch = covariance.mean.float(), tokens[:20].reshape(4, 5, D)
    draw = torch.Generator().manual_seed(0)
    for baseline in (PCA.of(covariance, 3), RandomDictionary.draw(mean, 9, 3, draw), ITDA.fit(tokens, mean, 9, 3)):
        features = baseline.encode(batch)
        assert features.shape == (4, 5, baseline.config.d_sae)
        assert baseline.decode(features).shape == (4, 5, D)
        torch.testing.assert_close(baseline(batch).flatten(0, 1), baseline(tokens[:20]))


def test_k_above_the_dictionary_is_refused():
    with pytest.raises(FluxIRError, match="between 1 and its 4 features per token: got k = 5"):
        BaselineConfig("random", 8, 4, 5)


# ---- Neurons


@pytest.fixture
def recorded(tiny_flux, tiny_inputs):
    """A transformer, and some of its sites at one step: {name: value}."""
    model, sink = tiny_flux(), MemorySink()
    names = ("double.1.txt.neurons", "double.1.txt.mlp", "single.2.neurons", "single.2.out", "single.2.img.neurons")
    with Recorder(model, [Site.parse(name) for name in names], sink), torch.no_grad():
        model(*tiny_inputs(batch=2))
    return model, {str(site): value for (_, site), value in sink.values.items()}


def test_all_neurons_of_a_double_block_give_its_feed_forward_branch(recorded):
    model, values = recorded
    x, mlp = values["double.1.txt.neurons"], values["double.1.txt.mlp"]
    neurons = Neurons.of(model, Site.parse("double.1.txt.neurons"), k=x.shape[-1], rest=x.mean((0, 1)))
    torch.testing.assert_close(neurons.target(x), mlp)
    torch.testing.assert_close(neurons(x), mlp, rtol=1e-4, atol=1e-5)


def test_the_neurons_of_a_single_block_have_the_last_columns_of_its_second_linear(recorded):
    model, values = recorded
    x = values["single.2.neurons"]
    neurons = Neurons.of(model, Site.parse("single.2.img.neurons"), k=5)
    linear = model.single_blocks[2].linear2
    attended = torch.zeros(*x.shape[:-1], model.params.hidden_size)
    torch.testing.assert_close(neurons.target(x), linear(torch.cat([attended, x], -1)))


def test_the_k_neurons_that_write_the_most_are_kept(recorded):
    model, values = recorded
    x = values["single.2.img.neurons"]
    neurons = Neurons.of(model, Site.parse("single.2.img.neurons"), k=3)
    writes = x[0, 0, :, None] * model.single_blocks[2].linear2.weight[:, model.params.hidden_size :].T
    expected = writes.norm(dim=1).topk(3).indices.sort().values
    features = neurons.encode(x)
    assert torch.equal(features[0, 0].nonzero().flatten(), expected)
    assert ((features != 0).sum(-1) == 3).all()
    torch.testing.assert_close(neurons(x)[0, 0], writes[expected].sum(0) + neurons.bias)


def test_neurons_that_rest_at_their_mean_explain_more(recorded):
    model, values = recorded
    x, site = values["single.2.neurons"].flatten(0, 1), Site.parse("single.2.neurons")
    at_zero, at_mean = Neurons.of(model, site, 8), Neurons.of(model, site, 8, rest=x.mean(0))
    target = at_zero.target(x)
    assert fvu(at_mean(x), target) < fvu(at_zero(x), target)


def test_other_sites_have_no_neurons(tiny_flux):
    with pytest.raises(FluxIRError, match=r"ends in .neurons: got double.1.img.mlp"):
        Neurons.of(tiny_flux(), Site.parse("double.1.img.mlp"), 3)
