"""Which tokens an autoencoder is judged on: those its own folder says were held out, of its site, steps and stream."""

from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from flux_ir.activations.source import open_source
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.held_out import evaluation_data_of
from flux_ir.sae.data.splits import Split, split_source
from flux_ir.sae.evaluation.baselines import BaselineFits, neurons_of

IMAGES, TOKENS, D = 20, 6, 12


@pytest.fixture
def source(tmp_path):
    """An array of 20 images, whose tokens are numbered."""
    values = torch.randn(IMAGES, TOKENS, D, generator=torch.Generator().manual_seed(0))
    values[..., 0] = torch.arange(IMAGES * TOKENS).reshape(IMAGES, TOKENS).float()
    save_file({"x": values}, tmp_path / "array.safetensors")
    return open_source(tmp_path / "array.safetensors")


def numbers(data, side, **limits):
    return [int(n) for batch in data.tokens(side, 7, **limits) for n in batch.values[:, 0]]


def test_both_sides_together_are_everything_once(source, random_sae):
    sae = random_sae("topk")
    sae.metadata = {"split": asdict(split_source(source, 0.3))}
    data = evaluation_data_of(sae, source, held_out=0.5)
    held_out, training = numbers(data, "held_out"), numbers(data, "training")
    assert sorted(held_out + training) == list(range(IMAGES * TOKENS))
    assert {n // TOKENS for n in held_out}.isdisjoint({n // TOKENS for n in training})
    assert numbers(data, "held_out") == held_out  # in the same order


def test_the_stored_split_comes_before_the_one_asked_for(source, random_sae):
    sae = random_sae("topk")
    sae.metadata = {"split": {"by": "image", "threshold": 0.25, "run_tokens": 1}}
    assert evaluation_data_of(sae, source, held_out=0.9).split == Split("image", 0.25)
    sae.metadata = {"held_out": 0.3}
    assert evaluation_data_of(sae, source, held_out=0.9).split == split_source(source, 0.3)
    sae.metadata = {}
    assert evaluation_data_of(sae, source, held_out=0.4).split == split_source(source, 0.4)


def test_a_limit_cuts_the_same_order_short(source, random_sae):
    data = evaluation_data_of(random_sae("topk"), source, held_out=0.3)
    assert numbers(data, "training", max_tokens=10) == numbers(data, "training")[:10]


def test_with_nothing_held_out_it_is_judged_on_what_it_was_trained_on(source, random_sae):
    sae = random_sae("topk")
    sae.metadata = {"split": {"by": "image", "threshold": 0.0, "run_tokens": 1}}
    data = evaluation_data_of(sae, source, held_out=0.3)
    assert data.side == "training"
    assert len(numbers(data, data.side)) == IMAGES * TOKENS


def test_other_widths_and_steps_are_refused(source, random_sae):
    with pytest.raises(FluxIRError, match="takes activations 9 wide: the array is 12 wide"):
        evaluation_data_of(random_sae("topk", d_in=9), source, held_out=0.1)
    with pytest.raises(FluxIRError, match=r"trained on the steps 3, 4, of which the captures have none"):
        evaluation_data_of(random_sae("topk", steps=(3, 4)), source, held_out=0.1)


def test_baselines_are_made_from_training_tokens_alone(source, random_sae):
    sae = random_sae("topk")
    data = evaluation_data_of(sae, source, held_out=0.3)
    fits = BaselineFits(data, fit_tokens=10_000, batch_tokens=13, device=torch.device("cpu"))
    training = torch.cat([batch.values for batch in data.tokens("training", 50)]).double()
    assert fits.covariance.count == len(training)
    torch.testing.assert_close(fits.covariance.mean, training.mean(0))
    assert fits.pca(100).config.k == D
    itda = fits.itda(8, 2)
    directions = torch.nn.functional.normalize(training.float() - fits.mean, dim=1)
    assert ((itda.W_dec @ directions.T).max(1).values > 1 - 1e-5).all()
    assert torch.equal(fits.random(9, 2).b_dec, fits.mean)


def test_an_array_has_no_neurons(source, random_sae):
    with pytest.raises(FluxIRError, match="a plain array has no neurons"):
        neurons_of(evaluation_data_of(random_sae("topk"), source, held_out=0.1))
