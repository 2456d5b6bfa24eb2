"""`train_sae.py` on small arrays: what it leaves and tells."""

import json
import warnings

import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.commands.main import main as flux_ir
from flux_ir.sae.architectures.config import ARCHITECTURES, HAS_K
from flux_ir.sae.files.folder import load_sae
from tests.commands.small_training import QUICK, D


def test_a_folder_of_each_autoencoder_is_left_and_a_table_told(train):
    code, out, err, saes = train("--k", "2,4", "--seed", "0,1", "--epochs", "2")
    assert code == 0, err
    names = [f"array_topk_k{k}_x4_s{seed}" for k in (2, 4) for seed in (0, 1)]
    assert sorted(path.name for path in (saes / "tokens").iterdir()) == names
    files = {"cfg.json", "curves.jsonl", "sae_weights.safetensors", "training.json"}
    files |= {"sparsity.safetensors", "feature_activations.safetensors"}
    for name in names:
        assert {path.name for path in (saes / "tokens" / name).iterdir()} == files
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
    from flux_ir.sae.data.held_out import evaluation_data_of

    sae, source = load_sae(folder), open_source(array)
    x = torch.cat(
        [part.values.float() for part in evaluation_data_of(sae, source, held_out=0.5).tokens("held_out", 100)]
    )
    assert 0 < len(x) < 2000
    with torch.no_grad():
        fvu = (x - sae(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
        z = sae.encode(x)
    stored = json.loads((folder / "training.json").read_text())["result"]["overall"]
    assert stored["tokens"] == len(x)
    assert stored["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    torch.testing.assert_close(sae.max_active, z.amax(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.mean_active, z.sum(0) / (z > 0).sum(0).clamp_min(1), rtol=1e-4, atol=1e-5)


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


def test_a_run_that_succeeds_warns_of_nothing(train):
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code, _, err, _ = train("--k", "4", "--max_tokens", "640")
    finally:
        torch.set_warn_always(False)
    assert code == 0, err


def test_the_verb_is_the_script(array, tmp_path, capsys):
    words = ["--captures", str(array), *QUICK, "--k", "4", "--max_tokens", "640"]
    assert flux_ir(["train-sae", *words, "--output_dir", str(tmp_path)]) == 0
    assert "array_topk_k4_x4_s0" in capsys.readouterr().out
