"""What `train_sae.py` refuses: words that do not fit together, and data that cannot be trained on."""

import numpy as np
import pytest
from safetensors.torch import load_file

from flux_ir.activations.source import open_source
from flux_ir.commands.train_sae import main as train_sae
from flux_ir.sae.data.splits import split_source
from tests.commands.small_training import D


def refused(told):
    """The error line of a command that failed, and did so before it made a folder."""
    code, out, err, saes = told
    assert (code, out) == (2, "")
    assert not saes.exists()
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    return error.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--k", "49"), "k cannot be above the number of features: got k 49 of 48"),
        (("--site", "single.6"), "these activations have no sites: got --site single.6"),
        (("--k", "4,8", "--k_start", "6"), "k comes down from --k_start, so it is at least --k 8: got 6"),
        (("--arch", "l1", "--k", "4"), "l1 is not given its k: got --k"),
        (("--prefixes", "4"), "topk has no nested dictionaries: got --prefixes"),
        (("--target_l0", "4"), "topk does not steer its L0: got --target_l0"),
        (("--l1_coefficient", "4"), "topk has no L1 penalty: got --l1_coefficient"),
        (("--max_tokens", "100", "--epochs", "2"), "--max_tokens and --epochs both say when to stop: got both"),
        (("--max_tokens", "63"), "there must be a batch of 64 tokens in the data: an epoch has 3584, the run 63"),
        (("--name", "../elsewhere"), "--name is the name of one folder: got '../elsewhere'"),
        (("--name", ".."), "--name is the name of one folder: got '..'"),
        (("--stream", "txt"), "these activations have no streams: got --stream txt"),
        (("--steps", "3"), "the steps to train on must be among those captured: got [3]"),
        (
            ("--prompts", "x.txt"),
            "--captures reads what is stored, --model with --prompts makes it on the way: got both",
        ),
        (("--lr", "0"), "--lr must be above 0: got 0.0"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(train, words, error):
    assert refused(train(*words)) == error


def test_an_expansion_that_is_not_positive_is_refused(tmp_path, array, capsys):
    assert train_sae(["--captures", str(array), "--expansion", "0", "--output_dir", str(tmp_path / "saes")]) == 2
    assert capsys.readouterr().err.startswith("error: --expansion must be at least 1: got 0")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "there must be data to train on: --captures, or --model with --prompts"),
        (("--model", "flux-tiny"), "there must be data to train on: --captures, or --model with --prompts"),
        (("--model", "flux-tiny", "--prompts", "p.txt"), "live data need a --site to record"),
        (("--model", "flux-tiny", "--prompts", "p.txt", "--epochs", "2"), "live data come once: got --epochs"),
    ],
)
def test_data_must_be_named_once(train, words, error):
    assert refused(train(*words, captures=None)) == error


def test_an_empty_folder_is_refused(train, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(train(captures=tmp_path / "empty")) == f"{tmp_path / 'empty'} holds no activations"


def test_arrays_of_different_widths_are_refused(train, tmp_path):
    for name, width in (("a", 6), ("b", 7)):
        np.save(tmp_path / f"{name}.npy", np.ones((300, width), np.float32))
    assert "b.npy" in refused(train(captures=tmp_path))


def test_nan_in_the_data_is_refused(train, tmp_path):
    rows = np.random.default_rng(0).normal(size=(2000, D)).astype(np.float32)
    rows[700, 3] = np.nan
    np.save(tmp_path / "broken.npy", rows)
    assert refused(train(captures=tmp_path / "broken.npy")).startswith("activations must be finite numbers: 1 of 256")


def test_nan_in_the_held_out_data_is_found_before_training(train, tmp_path):
    rows = np.random.default_rng(0).normal(size=(2000, D)).astype(np.float32)
    np.save(tmp_path / "broken.npy", rows)
    source = open_source(tmp_path / "broken.npy")
    split = split_source(source, 0.1)
    held_out = [split.has("held_out", one.id, one.prompt) for one in source.generations].index(True)
    rows[held_out * 256 + 5, 0] = np.inf
    np.save(tmp_path / "broken.npy", rows)
    assert "1 of 256 tokens" in refused(train("--epochs", "50", captures=tmp_path / "broken.npy"))


def test_a_loss_that_is_no_number_any_more_stops_the_run(train, tmp_path):
    rows = np.random.default_rng(0).normal(size=(2000, D)).astype(np.float32) * 1e30
    np.save(tmp_path / "huge.npy", rows)
    code, _, err, _ = train("--nonormalise", captures=tmp_path / "huge.npy")
    assert code == 2
    assert "lower --lr" in err or "finite" in err


def test_a_missing_logger_is_said_before_anything_is_read(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(train("--log", "wandb")) == "--log wandb needs the package wandb"


def test_a_run_that_diverges_keeps_its_good_checkpoints_and_says_what_to_do(train, tmp_path):
    words = ("--k", "4", "--epochs", "50", "--lr", "1e36", "--clip", "None", "--checkpoint_tokens", "64")
    for _ in range(2):
        code, out, err, saes = train(*words)
        assert (code, out) == (2, "")
        assert "error: the training diverged: after " in err
        assert "hint: pass a lower --lr with another --name" in err
        for weights in saes.glob("*/.training/*/*/*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_autoencoders_that_do_not_fit_into_memory_are_refused_before_any_is_made(tmp_path, array, capsys):
    words = ["--captures", str(array), "--expansion", "2,100000000", "--k", "4", "--batch_tokens", "64"]
    assert train_sae([*words, "--device", "cpu", "--output_dir", str(tmp_path / "saes")]) == 2
    assert capsys.readouterr().err.startswith(
        "error: it does not fit: 2 autoencoders of up to 1200000000 features for activations 12 wide take 480 GB of "
        "memory on cpu (weights, gradients and the optimiser's moments), and "
    )
    assert not (tmp_path / "saes").exists()


@pytest.mark.parametrize(
    ("size", "words", "error"),
    [
        (
            1e-40,
            (),
            "activations must be of a size that float32 holds in full: to normalise these, they would be multi",
        ),
        (1e-40, ("--nonormalise",), "tokens must be finite and 0.0001 to 1e+15 long, as training sees them: these are"),
        (1e-7, ("--nonormalise",), "tokens must be finite and 0.0001 to 1e+15 long, as training sees them: these are"),
        (1e30, ("--nonormalise",), "tokens must be finite and 0.0001 to 1e+15 long, as training sees them: these are"),
    ],
)
def test_activations_whose_squares_float32_cannot_hold_are_refused(train, tmp_path, size, words, error):
    rows = size * np.random.default_rng(0).normal(size=(2000, D))
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    assert error in refused(train(*words, captures=tmp_path / "rows.npy"))
