"""`flux-ir evaluate-sae` as it is typed: what it writes and prints, the same bytes again, and what it refuses."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ir.activations.source import open_source
from flux_ir.api.evaluate_sae import load_for
from flux_ir.commands.collect import main as collect
from flux_ir.commands.evaluate_sae import main as evaluate_sae
from flux_ir.commands.main import main as flux_ir
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.data.held_out import evaluation_data_of
from flux_ir.sae.data.splits import split_source
from flux_ir.sae.files.folder import load_sae, save_sae
from flux_ir.sae.files.formats import save_as
from flux_ir.sites import Site

SITE = Site.parse("single.6.img")
PROMPTS = [f"a {size} {colour} circle" for size in ("large", "small") for colour in ("red", "blue", "green", "yellow")]
WRITTEN = ("curves.png", "density.png", "fvu_per_step.png", "metrics.json")


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """Eight generations of flux-tiny: two steps of one site and its neurons."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--model", "flux-tiny", "--prompts", str(folder / "prompts.txt"), "--num_steps", "3"]
    words += ["--sites", "single.6,single.6.img.neurons", "--steps", "0,1", "--output_dir", str(folder / "captures")]
    assert collect(words) == 0
    return folder / "captures"


@pytest.fixture(scope="module")
def trained(captures, tmp_path_factory):
    """A sweep of two untrained autoencoders, saved as training does."""
    sweep = tmp_path_factory.mktemp("sweep")
    source = open_source(captures)
    values = torch.cat([source.read(i, SITE, step).floats().float() for i in range(8) for step in (0, 1)])
    for name, architecture, k in (("few", "topk", 4), ("many", "topk", 12)):
        config = SAEConfig(
            architecture, values.shape[1], 64, k=k, site=str(SITE), model="flux-tiny", steps=(0, 1), bias_init="mean"
        )
        sae = make_sae(config, sample=values)
        sae.metadata = {"split": asdict(split_source(source, 0.3)), "filters": {"stream": None, "steps": [0, 1]}}
        save_sae(sae, sweep / name)
        rows = [{"step": i, "tokens": 100 * i, "loss": 1 / (i + 1), "fvu": 0.5, "l0": k} for i in range(5)]
        (sweep / name / "curves.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return sweep


@pytest.fixture
def sweep(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "sweep")


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_sweep_gets_numbers_pictures_a_table_and_a_front(sweep, captures, capsys):
    words = ["--sae", str(sweep), "--captures", str(captures), "--baselines", "pca,random,itda"]
    assert flux_ir(["evaluate-sae", *words]) == 0
    printed = capsys.readouterr().out
    for name in ("few", "many"):
        assert set(WRITTEN) < {path.name for path in (sweep / name).iterdir()}
        found = numbers_of(sweep / name)
        assert list(found["baselines"]) == ["pca", "random", "itda"]
        assert found["splice"] is None
        assert name in printed
    assert "data points (ITDA)" in printed
    assert Image.open(sweep / "pareto.png").width > 500
    before = bytes_of(sweep)
    assert evaluate_sae(words) == 0
    assert bytes_of(sweep) == before


def test_the_numbers_are_those_of_the_held_out_images(sweep, captures):
    assert evaluate_sae(["--sae", str(sweep / "few"), "--captures", str(captures)]) == 0
    found, sae, source = numbers_of(sweep / "few"), load_sae(sweep / "few"), open_source(captures)
    data = evaluation_data_of(sae, source, held_out=0.9)
    held_out = [i for i, one in enumerate(source.generations) if data.split.has("held_out", one.id, one.prompt)]
    assert 0 < len(held_out) < 8
    for step in (None, 0, 1):
        steps = (0, 1) if step is None else (step,)
        x = torch.cat([source.read(i, SITE, s).floats().double() for i in held_out for s in steps])
        x_hat = sae(x.float()).double()
        expected = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        numbers = found["overall"] if step is None else found["per_step"][str(step)]
        assert numbers["fvu"] == pytest.approx(expected.item(), rel=1e-5)
        assert numbers["tokens"] == len(x)
        assert numbers["l0"] == pytest.approx((sae.encode(x.float()) > 0).sum(1).double().mean().item())
    assert found["per_stream"].keys() == {"img"}
    assert found["data"]["side"] == "held_out"
    assert found["baselines"]["pca"]["k"] == 4


def test_autoencoders_of_one_name_are_told_apart_by_their_folders(trained, captures, tmp_path, capsys):
    for run in ("a", "b"):
        shutil.copytree(trained / "few", tmp_path / run / "few")
    assert evaluate_sae(["--sae", str(tmp_path), "--captures", str(captures), "--baselines", "None"]) == 0
    printed = "".join(capsys.readouterr().out.split())
    for run in ("a", "b"):
        assert str(tmp_path / run / "few") in printed
        assert f"numbers,{tmp_path / run / 'few'}" in printed


def test_a_splice_recovers_between_nothing_and_everything(sweep, captures, capsys):
    words = ["--sae", str(sweep / "few"), "--captures", str(captures), "--splice", "--prompts", "2"]
    assert evaluate_sae(words) == 0
    printed = capsys.readouterr().out
    splice = numbers_of(sweep / "few")["splice"]
    assert splice["steps"] == [0, 1]
    rows = splice["replacements"]
    assert list(rows) == ["sae", "sae_with_error", "pca", "mean", "zero"]
    assert (rows["zero"]["recovered_from_zero"], rows["mean"]["recovered_from_mean"]) == (0, 0)
    assert rows["sae_with_error"]["recovered_from_zero"] > 0.999
    assert rows["sae"]["velocity_mse"] > rows["sae_with_error"]["velocity_mse"]
    assert rows["sae"]["velocity_mse_per_step"].keys() == {"0", "1"}
    assert rows["zero"]["image_psnr_db"] > 0
    assert "few: sae_with_error" in printed


def test_a_splice_at_steps_that_were_not_sampled_is_refused_before_anything_is_computed(sweep, captures, capsys):
    words = ["--sae", sweep / "few", "--captures", captures, "--splice", "--splice_steps", "1,99"]
    assert "a splice is at steps that were sampled, 0 to 2: got 99" in refused(capsys, *words)
    assert not (sweep / "few" / "metrics.json").exists()


def test_neurons_are_judged_on_what_they_all_write(sweep, captures):
    words = ["--sae", str(sweep / "few"), "--captures", str(captures), "--baselines", "neurons", "--max_tokens", "100"]
    assert evaluate_sae(words) == 0
    found = numbers_of(sweep / "few")["baselines"]["neurons"]
    assert found["overall"]["tokens"] == numbers_of(sweep / "few")["overall"]["tokens"] == 100
    assert found["overall"]["l0"] == 4
    assert 0 < found["overall"]["fvu"] < 1


def test_parts_of_blocks_are_spliced_too(sweep, captures):
    config = load_sae(sweep / "few").config
    wide = SAEConfig.from_dict(config.to_dict() | {"site": "single.6.img.neurons", "d_in": 768})
    neurons = make_sae(wide)
    save_sae(neurons, sweep / "few")
    assert evaluate_sae(["--sae", str(sweep / "few"), "--captures", str(captures), "--splice"]) == 0
    assert numbers_of(sweep / "few")["splice"]["replacements"]["zero"]["velocity_mse"] > 0


def refused(capsys, *words):
    assert evaluate_sae([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_is_one_line_and_a_hint(sweep, captures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    error = refused(capsys, "--sae", tmp_path / "empty", "--captures", captures)
    assert f"there is no autoencoder in {tmp_path / 'empty'}" in error
    assert "there is nothing at" in refused(capsys, "--sae", sweep, "--captures", tmp_path / "nowhere")
    config = load_sae(sweep / "few").config
    other = make_sae(SAEConfig.from_dict(config.to_dict() | {"site": "single.3.img"}))
    other.normalise_decoder()
    save_sae(other, tmp_path / "other")
    error = refused(capsys, "--sae", tmp_path / "other", "--captures", captures)
    assert "trained on single.3.img, which these captures do not have" in error
    assert "hint: the nearest are" in error


def test_an_array_can_be_judged_but_not_spliced_into(sweep, tmp_path, capsys):
    from safetensors.torch import save_file

    sae = load_sae(sweep / "few")
    save_file({"x": torch.randn(20, 6, sae.config.d_in)}, tmp_path / "array.safetensors")
    words = ["--sae", sweep / "few", "--captures", tmp_path / "array.safetensors"]
    config = SAEConfig.from_dict(sae.config.to_dict() | {"site": None, "steps": None, "model": None})
    array_sae = make_sae(config, sample=torch.randn(50, config.d_in))
    save_sae(array_sae, sweep / "few")
    assert evaluate_sae([str(word) for word in words]) == 0
    assert "does not say what was held out" in capsys.readouterr().err
    assert "from their prompt and seed: got" in refused(capsys, *words, "--splice")
    assert "a plain array has no neurons" in refused(capsys, *words, "--baselines", "neurons")


def test_an_autoencoder_without_a_site_is_measured_on_the_site_that_is_named(sweep, captures, tmp_path, capsys):
    ours = load_sae(sweep / "few")
    config = SAEConfig.from_dict(ours.config.to_dict() | {"site": None, "model": "FLUX from somewhere", "steps": None})
    ours.config, ours.metadata = config, {}
    for folder in (save_sae(ours, tmp_path / "ours"), save_as(ours, "dictionary_learning", tmp_path / "theirs")):
        words = ["--sae", str(folder), "--captures", str(captures), "--baselines", "None", "--held_out", "0.3"]
        error = refused(capsys, *words)
        assert f"{folder} names no site, and these captures have sites" in error
        assert "hint: say which it is of, such as --site single.6" in error
        assert "'blocks.3'" in refused(capsys, *words, "--site", "blocks.3")
        assert evaluate_sae([*words, "--site", "single.6.img"]) == 0
        assert numbers_of(folder)["data"]["site"] == "single.6.img"
    assert numbers_of(tmp_path / "ours")["overall"] == numbers_of(tmp_path / "theirs")["overall"]
    assert evaluate_sae(["--sae", str(sweep / "few"), "--captures", str(captures), "--baselines", "None"]) == 0
    assert numbers_of(tmp_path / "ours")["overall"]["fvu"] == numbers_of(sweep / "few")["overall"]["fvu"]


def test_another_site_than_that_of_the_training_is_noted(sweep, captures, tmp_path, capsys):
    ours = load_sae(sweep / "few")
    other = make_sae(SAEConfig.from_dict(ours.config.to_dict() | {"site": "single.3.img"}))
    save_sae(other, tmp_path / "other")
    words = ["--captures", str(captures), "--site", "single.6.img", "--max_tokens", "64", "--baselines", "None"]
    assert evaluate_sae(["--sae", str(tmp_path / "other"), *words]) == 0
    noted = " ".join(capsys.readouterr().err.split())
    assert "other was trained on single.3.img, and is used on single.6.img, as --site says" in noted
    source = open_source(captures)
    notes = []
    load_for(tmp_path / "other", source, "single.6.img", notes.append)
    load_for(sweep / "few", source, "single.6.img", notes.append)
    load_for(sweep / "few", source, None, notes.append)
    assert len(notes) == 1


def test_a_site_that_flux_does_not_have_is_named(sweep, captures, tmp_path, capsys):
    sae = load_sae(sweep / "few")
    folder = save_as(sae, "sparsify", tmp_path / "layers.5")
    error = refused(capsys, "--sae", folder, "--captures", captures)
    assert f"{folder} names the site 'layers.5', which FLUX does not have, and these captures have sites" in error
    assert evaluate_sae(["--sae", str(folder), "--captures", str(captures), "--site", "single.6.img"]) == 0


def test_a_plain_array_has_no_site_to_name(sweep, tmp_path, capsys):
    np.save(tmp_path / "array.npy", np.ones((20, 192), np.float32))
    error = refused(capsys, "--sae", sweep / "few", "--captures", tmp_path / "array.npy", "--site", "single.6")
    assert "these activations have no sites: got --site single.6" in error


def test_a_few_outliers_that_decide_the_fvu_are_told_apart(tmp_path, capsys):
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(4096, 8)).astype(np.float32) + 2
    rows[draw.choice(4096, 40, replace=False)] *= 300
    np.save(tmp_path / "sinks.npy", rows)
    sae = make_sae(SAEConfig("topk", 8, 32, k=2), sample=torch.tensor(rows))
    save_sae(sae, tmp_path / "sae")
    assert (
        evaluate_sae(["--sae", str(tmp_path / "sae"), "--captures", str(tmp_path / "sinks.npy"), "--held_out", "0"])
        == 0
    )
    found, printed = numbers_of(tmp_path / "sae"), capsys.readouterr().out
    long = np.linalg.norm(rows, axis=1) > 10 * np.median(np.linalg.norm(rows, axis=1))
    x = torch.tensor(rows[~long])
    with torch.no_grad():
        expected = ((x - sae(x)).double() ** 2).sum() / ((x.double() - x.double().mean(0)) ** 2).sum()
    assert found["outliers"]["tokens"] == long.sum() == 40
    assert found["outliers"]["without"]["overall"]["fvu"] == pytest.approx(expected.item(), rel=1e-5)
    assert printed.count("without 40 outliers") == 2  # of the autoencoder and of PCA
    assert (
        "note: sae: 40 of 4096 tokens are more than 10 times as long as the median and decide the FVU: it is" in printed
    )
