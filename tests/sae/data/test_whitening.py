"""Whitening by what noise does: what it measures, and that nothing of it is left in what is saved."""

import pytest
import torch

from flux_ir.activations.blocks import Generation, TokenBlock
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.data.filters import Filters
from flux_ir.sae.data.splits import Split
from flux_ir.sae.data.whitening import repeated, undecided_covariance, whitening_of
from flux_ir.sae.files.dictionary_learning import load_dictionary_learning, save_dictionary_learning
from flux_ir.sae.files.folder import load_sae, save_sae
from flux_ir.sites import Site

D, TOKENS, REPEATS = 12, 9, 3
ALL = Split("prompt", 0.0)
SITE = Site.parse("double.0.img")


class Noisy:
    """Generations whose tokens are what the prompt says at each position and step, and noise of a known covariance."""

    sites, steps, model = [SITE], (0, 3), "random"

    def __init__(self, prompts=40, repeats=REPEATS, same_positions=True, spread=5):
        draw = torch.Generator().manual_seed(0)
        self.mixing = torch.randn(D, D, generator=draw) * torch.logspace(0, -0.5, D)
        means = spread * torch.randn(prompts, 1, len(self.steps), TOKENS, D, generator=draw)
        noise = torch.randn(prompts, repeats, len(self.steps), TOKENS, D, generator=draw) @ self.mixing
        self.values = (means + noise).flatten(0, 1)
        self.generations = [Generation(f"{i:04x}", f"prompt {i // repeats}", None) for i in range(len(self.values))]
        self.same_positions = same_positions

    @property
    def runs(self):
        return [range(len(self.generations))]

    @property
    def identity(self):
        return "noisy"

    def d(self, site):
        return D

    def tokens(self, site):
        return TOKENS

    def read_run(self, images, site, step, tokens=None, memory=None):
        raise NotImplementedError

    def read(self, index, site, step):
        one, positions = self.generations[index], torch.arange(TOKENS) + (0 if self.same_positions else index)
        values = self.values[index, self.steps.index(step)]
        return TokenBlock(values, None, site, step, one.id, one.prompt, positions.int(), 0, None)


def test_the_covariance_is_that_of_noise_and_of_the_means_of_positions():
    """Around the mean of prompt, step and position; and of these means over prompts, without their error."""
    source = Noisy()
    found = undecided_covariance(source, SITE, filters=Filters(), split=ALL)
    groups = source.values.double().view(40, REPEATS, -1, D)
    apart = (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 2)
    noise = apart.T @ apart / (40 * (REPEATS - 1) * len(source.steps) * TOKENS)
    prompts = groups.mean(dim=1)
    positions = prompts.mean(dim=0)
    error = (prompts - positions).flatten(0, 1)
    error = error.T @ error / (39 * positions.shape[0]) / 40
    variances, axes = torch.linalg.eigh(positions.T.cov(correction=0) - error)
    torch.testing.assert_close(found, noise + axes @ variances.clamp_min(0).diag() @ axes.T)


def test_what_positions_do_is_found_among_what_prompts_do():
    source, draw = Noisy(prompts=400), torch.Generator().manual_seed(1)
    without = undecided_covariance(source, SITE, filters=Filters(), split=ALL)
    moves = 3 * torch.randn(len(source.steps), TOKENS, D, generator=draw)
    source.values += moves
    found = undecided_covariance(source, SITE, filters=Filters(), split=ALL) - without
    expected = moves.flatten(0, 1).T.cov(correction=0).double()
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_what_noise_does_has_the_same_size_in_every_direction_afterwards():
    source = Noisy(prompts=400, spread=0.5)
    whitening = whitening_of(torch.ones(D), undecided_covariance(source, SITE, filters=Filters(), split=ALL))
    noise = source.mixing.T.double() @ source.mixing.double()
    matrix = whitening.matrix.double()
    variances = torch.linalg.eigvalsh(matrix @ noise @ matrix)
    assert variances.min() > 0.5  # the floor holds the smallest direction down a little
    assert variances.max() < 1.2
    torch.testing.assert_close(whitening.matrix @ whitening.inverse, torch.eye(D), atol=1e-4, rtol=0)
    assert whitening(torch.ones(2, D)).abs().max() == 0


def test_held_out_prompts_other_steps_and_lone_generations_do_not_count():
    source, split = Noisy(), Split("prompt", 0.5)
    kept = [index for one in repeated(source, split) for index in one]
    assert 0 < len(kept) < len(source.generations)
    source.values[[index for index in range(len(source.values)) if index not in kept]] = torch.nan
    source.values[:, 1] = torch.nan
    assert torch.isfinite(undecided_covariance(source, SITE, filters=Filters(steps=[0]), split=split)).all()


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka", "l1", "jumprelu", "gated"])
def test_a_folded_autoencoder_computes_on_raw_tokens_what_it_computed_on_whitened_ones(
    architecture, random_sae, tokens, tmp_path
):
    noise = Noisy().mixing.T @ Noisy().mixing
    whitening = whitening_of(tokens(200).mean(dim=0), noise)
    sae = random_sae(architecture, whitened=True)
    x = tokens(50)
    inside = sae.encode(whitening(x))
    raw = whitening.fold(sae)
    features = raw.encode(x)
    assert (inside > 0).any()
    assert torch.equal(features > 0, inside > 0)
    expected = whitening.mean + sae.decode(inside) @ whitening.inverse
    torch.testing.assert_close(raw.decode(features), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(len(raw.W_dec)))
    save_sae(raw, tmp_path / "ours")
    loaded = load_sae(tmp_path / "ours")
    torch.testing.assert_close(loaded.encode(x), features)
    save_sae(loaded, tmp_path / "again")
    for file in (tmp_path / "ours").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka"])
def test_other_programs_read_its_thresholds_as_those_of_a_jumprelu(architecture, random_sae, tokens, tmp_path):
    whitening = whitening_of(tokens(200).mean(dim=0), Noisy().mixing.T @ Noisy().mixing)
    raw = whitening.fold(random_sae(architecture, whitened=True))
    assert len(raw.threshold.unique()) > 1
    theirs = load_dictionary_learning(save_dictionary_learning(raw, tmp_path))
    assert theirs.config.architecture == "jumprelu"
    torch.testing.assert_close(theirs.encode(tokens(50)), raw.encode(tokens(50)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words", [{"architecture": "topk"}, {"architecture": "batch_topk", "tied": True}])
def test_lengths_of_their_own_are_refused_where_there_cannot_be_any(words):
    with pytest.raises(FluxIRError, match="whitening gives every feature a length of its own"):
        SAEConfig(**words, d_in=D, d_sae=40, k=4, whitened=True)


def test_generations_that_cannot_be_compared_are_refused():
    with pytest.raises(FluxIRError, match="of 40 prompts on the training side none has two"):
        undecided_covariance(Noisy(repeats=1), SITE, filters=Filters(), split=ALL)
    with pytest.raises(FluxIRError, match="kept tokens of different positions"):
        undecided_covariance(Noisy(same_positions=False), SITE, filters=Filters(), split=ALL)
    equal = Noisy()
    equal.values[:] = 1
    with pytest.raises(FluxIRError, match="generations of one prompt must differ"):
        undecided_covariance(equal, SITE, filters=Filters(), split=ALL)
