"""`train_sae.py` on small arrays: what it leaves, how it goes on, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_ir.capture.tokens import open_source
from flux_ir.commands.main import main as flux_ir
from flux_ir.commands.train_sae import main as train_sae
from flux_ir.sae.base import load_sae
from flux_ir.sae.config import ARCHITECTURES, HAS_K
from flux_ir.sae.splits import split_source

ROOT = Path(__file__).parents[2]
D = 12
QUICK = ("--expansion", "4", "--batch_tokens", "64", "--device", "cpu")


@pytest.fixture(scope="session")
def array(tmp_path_factory):
    """4,000 tokens that are sums of few of 30 directions, as a plain array."""
    draw = np.random.default_rng(0)
    strengths = draw.random((4000, 30)) * (draw.random((4000, 30)) < 0.1)
    path = tmp_path_factory.mktemp("arrays") / "tokens.npy"
    np.save(path, (strengths @ draw.normal(size=(30, D)) + 4).astype(np.float32))
    return path


@pytest.fixture
def train(tmp_path, capsys, array):
    """Trains with these words into a fresh folder, in this process; gives the code, stdout, stderr, and the folder."""

    def run(*words, captures=array):
        data = () if captures is None else ("--captures", str(captures))
        code = train_sae([*data, *QUICK, *words, "--output_dir", str(tmp_path / "saes")])
        told = capsys.readouterr()
        return code, told.out, told.err, tmp_path / "saes"

    return run


def contents(folder):
    """The bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(array, saes, *words, launcher=()):
    """The real command, in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train_sae.py"), "--captures", str(array), *QUICK]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [*command, *words, "--output_dir", str(saes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def finish(array, saes, *words):
    """The same to its end in this process, with one thread as there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_sae(["--captures", str(array), *QUICK, *words, "--output_dir", str(saes)]) == 0
    finally:
        torch.set_num_threads(threads)


def wait_for_checkpoint(process, saes):
    """Returns once the process has saved one."""
    while not list(saes.glob("*/.training/*/step_*[0-9]")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def refused(told):
    """The error line of a command that failed, and did so before it made a folder."""
    code, out, err, saes = told
    assert (code, out) == (2, "")
    assert not saes.exists()
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    return error.removeprefix("error: ")


def test_a_folder_of_each_autoencoder_is_left_and_a_table_told(train):
    code, out, err, saes = train("--k", "2,4", "--seed", "0,1", "--epochs", "2")
    assert code == 0, err
    names = [f"array_topk_k{k}_x4_s{seed}" for k in (2, 4) for seed in (0, 1)]
    assert sorted(path.name for path in (saes / "tokens").iterdir()) == names
    files = ["cfg.json", "curves.jsonl", "sae_weights.safetensors", "sparsity.safetensors", "training.json"]
    for name in names:
        assert sorted(path.name for path in (saes / "tokens" / name).iterdir()) == files
        assert name in out
    assert "held out by image" in err


def test_what_was_measured_is_in_the_folder_and_in_the_table(train):
    _, out, _, saes = train("--k", "4", "--epochs", "4")
    folder = saes / "tokens" / "array_topk_k4_x4_s0"
    about = json.loads((folder / "training.json").read_text())
    overall = about["result"]["overall"]
    assert about["options"]["k"] == [4]
    assert f"{overall['fvu']:.4f}" in out
    assert 0 < overall["fvu"] < 1
    assert overall["l0"] <= 4
    rows = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "loss", "fvu", "l0", "dead_share", "auxiliary", "learning_rate"} <= rows[0].keys()
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    assert rows[-1]["tokens"] == 64 * rows[-1]["step"]


def test_the_measured_fvu_is_that_of_the_file_on_the_held_out_rows(train, array):
    """FVU as defined: numerator and denominator summed over all held-out rows, in raw space."""
    _, _, _, saes = train("--k", "4")
    folder = saes / "tokens" / "array_topk_k4_x4_s0"
    from flux_ir.sae.held_out import subject_of

    sae, source = load_sae(folder), open_source(array)
    x = torch.cat([part.values.float() for part in subject_of(sae, source, held_out=0.5).tokens("held_out", 100)])
    assert 0 < len(x) < 2000
    with torch.no_grad():
        fvu = (x - sae(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
    stored = json.loads((folder / "training.json").read_text())["result"]["overall"]
    assert stored["tokens"] == len(x)
    assert stored["fvu"] == pytest.approx(fvu.item(), rel=1e-4)


def test_decoder_rows_have_length_one_in_the_file(train):
    _, _, _, saes = train("--k", "4", "--ema", "0.9")
    norms = load_sae(saes / "tokens" / "array_topk_k4_x4_s0").W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4 * D))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(train, architecture):
    k = ("--k", "4") if architecture in HAS_K else ()
    code, _, err, saes = train("--arch", architecture, *k, "--max_tokens", "2000")
    assert code == 0, err
    (folder,) = (saes / "tokens").iterdir()
    assert load_sae(folder).config.architecture == architecture


def test_every_setting_of_the_autoencoder_reaches_its_config(train):
    words = ("--k", "3", "--k_aux", "5", "--tied", "--decoder_init", "orthogonal", "--bias_init", "geometric_median")
    _, _, err, saes = train(*words, "--resample", "4", "--clip", "None", "--nonormalise", "--k_start", "9")
    config = load_sae(saes / "tokens" / "array_topk_k3_x4_s0").config
    assert (config.k, config.k_aux, config.tied) == (3, 5, True), err
    assert (config.decoder_init, config.bias_init) == ("orthogonal", "geometric_median")


def test_a_run_that_is_killed_and_gone_on_with_ends_with_the_same_bytes(array, tmp_path, capsys):
    """SIGKILL in the middle of the real command; a checkpoint every few steps."""
    words = ("--k", "4", "--epochs", "12", "--checkpoint_tokens", "640", "--pool_gb", "0.0001", "--ema", "0.99")
    process = start(array, tmp_path / "killed", *words)
    wait_for_checkpoint(process, tmp_path / "killed")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finish(array, tmp_path / "killed", *words)
    assert "going on after" in capsys.readouterr().err
    finish(array, tmp_path / "whole", *words)
    assert contents(tmp_path / "killed").keys() == contents(tmp_path / "whole").keys()
    for name, whole in contents(tmp_path / "whole").items():
        gone_on = contents(tmp_path / "killed")[name]
        if name.endswith("training.json"):  # it names its folder
            whole, gone_on = (text.replace(b"/killed", b"/whole") for text in (whole, gone_on))
        assert gone_on == whole, name


def test_ctrl_c_saves_and_tells_how_to_go_on(array, tmp_path):
    words = ("--k", "4", "--epochs", "200", "--checkpoint_tokens", "640")
    process = start(array, tmp_path, *words)
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert out == ""
    (newest,) = list(tmp_path.glob("*/.training/*"))
    told = int(err.split("stopped after ")[1].split(" tokens")[0].replace(",", ""))
    assert max(int(path.name.removeprefix("step_")) for path in newest.iterdir()) * 64 == told


def test_two_processes_end_with_the_weights_of_one(array, tmp_path):
    words = ("--k", "4", "--max_tokens", "1280", "--lr", "0.001")
    finish(array, tmp_path / "one", *words)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out, err = (process := start(array, tmp_path / "two", *words, launcher=launcher)).communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("measured on held-out tokens") == 1
    one, two = (load_sae(tmp_path / which / "tokens" / "array_topk_k4_x4_s0") for which in ("one", "two"))
    for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, msg=name)


def test_a_finished_run_is_not_trained_again(train):
    train("--k", "4")
    code, out, err, _ = train("--k", "4")
    assert code == 0
    assert "already trained" in err
    assert "array_topk_k4_x4_s0" in out


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(train):
    train("--k", "4")
    before = contents(train("--k", "4")[3])
    code, _, err, saes = train("--k", "4", "--lr", "0.1")
    assert code == 2
    assert "belongs to other settings: lr was None and is 0.1" in err
    assert "--name" in err
    assert contents(saes) == before


def test_a_finished_run_cannot_be_made_longer(train):
    train("--k", "4", "--max_tokens", "1280")
    code, _, err, _ = train("--k", "4", "--max_tokens", "2560")
    assert code == 2
    assert "tokens was 1280 and is 2560" in err
    assert "cannot be made longer" in err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--k", "49"), "k cannot be above the number of features: got k 49 of 48"),
        (("--site", "single.6"), "a plain array has no sites: got --site single.6"),
        (("--k", "4,8", "--k_start", "6"), "k comes down from --k_start, so it is at least --k 8: got 6"),
        (("--arch", "l1", "--k", "4"), "l1 is not given its k: got --k"),
        (("--target_l0", "4"), "topk does not steer its L0: got --target_l0"),
        (("--l1_coefficient", "4"), "topk has no L1 penalty: got --l1_coefficient"),
        (("--max_tokens", "100", "--epochs", "2"), "--max_tokens and --epochs both say when to stop: got both"),
        (("--max_tokens", "63"), "there must be a batch of 64 tokens in the data: an epoch has 3232, the run 63"),
        (("--name", "../elsewhere"), "--name is the name of one folder: got '../elsewhere'"),
        (("--name", ".."), "--name is the name of one folder: got '..'"),
        (("--stream", "txt"), "a plain array has no streams: got --stream txt"),
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


def test_a_run_that_succeeds_warns_of_nothing(train):
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code, _, err, _ = train("--k", "4", "--max_tokens", "640")
    finally:
        torch.set_warn_always(False)
    assert code == 0, err


def test_a_missing_logger_is_said_before_anything_is_read(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(train("--log", "wandb")) == "--log wandb needs the package wandb"


def test_the_verb_is_the_script(array, tmp_path, capsys):
    words = ["--captures", str(array), *QUICK, "--k", "4", "--max_tokens", "640"]
    assert flux_ir(["train-sae", *words, "--output_dir", str(tmp_path)]) == 0
    assert "array_topk_k4_x4_s0" in capsys.readouterr().out
