"""`train_sae(..., whiten=)` on flux-tiny: what it saves, that it goes on, and what may be wrong with the captures."""

import json

import pytest
import torch

import flux_ir
from flux_ir.api.training_data import TrainingData
from flux_ir.demo.captions import captions
from flux_ir.errors import FluxIRError

SMALL = {"site": "single.6.img", "arch": "batch_topk", "k": 4, "expansion": 4, "batch_tokens": 64, "device": "cpu"}
LONG = {"max_tokens": 6400, "lr": 0.003}


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """Twelve prompts with two noises each, and the same prompts with one."""
    folder = tmp_path_factory.mktemp("captures")
    how = {"model": "flux-tiny", "steps": [1], "num_steps": 2, "device": "cpu"}
    for name, repeats in (("twice", 2), ("once", 1)):
        list(flux_ir.collect(captions(12, seed=5), "single.6", folder / name, repeats=repeats, **how))
    return folder


@pytest.fixture(scope="module")
def whole(captures, tmp_path_factory):
    """The first of two autoencoders of an uninterrupted training, its folder."""
    return trained(captures, tmp_path_factory.mktemp("saes"))


def trained(captures, output_dir, **changes):
    words = {**SMALL, **LONG, "seed": (0, 1), "whiten": captures / "twice", "output_dir": output_dir, **changes}
    return list(flux_ir.train_sae(captures / "once", **words))[-1].finished[0].folder


def test_what_is_saved_takes_raw_tokens(whole, captures):
    sae, source = flux_ir.load_sae(whole), flux_ir.open_source(captures / "once")
    tokens = torch.cat([source.read(i, "single.6.img", 1).floats() for i in range(12)]).float()
    error = (sae(tokens) - tokens).square().sum() / (tokens - tokens.mean(dim=0)).square().sum()
    assert error < 0.9
    assert len(sae.threshold.unique()) > 1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))


def test_a_run_that_is_left_and_gone_on_with_ends_with_the_same_bytes(whole, captures, tmp_path, monkeypatch):
    """The whitening of all autoencoders of a site comes from the checkpoint: nothing is measured again."""
    words = {**SMALL, **LONG, "seed": (0, 1), "whiten": captures / "twice", "output_dir": tmp_path}
    rows = flux_ir.train_sae(captures / "once", **words)
    assert next(row.tokens for row in rows if row.tokens >= 640) < 6400
    rows.close()
    monkeypatch.setattr(TrainingData, "measure", None)
    again = trained(captures, tmp_path)
    for name in ("sae_weights.safetensors", "cfg.json", "curves.jsonl"):
        for seed in (0, 1):
            there, here = (path.with_name(path.name.removesuffix("0") + str(seed)) for path in (again, whole))
            assert (there / name).read_bytes() == (here / name).read_bytes()


def test_it_is_measured_like_any_other(whole, captures):
    (found,) = flux_ir.evaluate_sae(whole, captures / "once", baselines=None)
    told = json.loads((whole / "training.json").read_text())["result"]["overall"]["fvu"]
    assert found.evaluation.overall.fvu == pytest.approx(told, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"whiten": "once"}, "of 10 prompts on the training side none has two"),
        ({"tied": True}, "got --whiten and --tied"),
        ({"arch": "topk"}, "got --whiten and --arch topk"),
        ({"normalise": False}, "got --normalise False"),
        ({"whiten": "nowhere"}, "there is nothing at"),
    ],
)
def test_what_cannot_whiten_is_refused_before_anything_is_trained(captures, tmp_path, changes, says):
    whiten = captures / changes.pop("whiten", "twice")
    with pytest.raises(FluxIRError, match=says):
        trained(captures, tmp_path, whiten=whiten, **changes)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_whitened_is_not_gone_on_with_without(whole, captures):
    with pytest.raises(FluxIRError, match=r"data\.whitened_by was"):
        trained(captures, whole.parents[1], whiten=None)
