import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES, SAEConfig
from flux_ir.sae.architectures.losses import TrainingState
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import (
    ACTIVATIONS_FILE,
    CONFIG_FILE,
    SPARSITY_FILE,
    WEIGHTS_FILE,
    load_sae,
    log_frequency_of,
    save_sae,
)
from tests.full_disk import file_size_limit

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def change_config(folder, change):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@every_architecture
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_comes_back_as_what_it_was(architecture, tied, random_sae, tokens, tmp_path):
    sae, x = random_sae(architecture, tied=tied, site="single.6.img", model="flux-tiny", steps=(0, 3)), tokens()
    sae.metadata = {"prompts_sha256": "abc", "metrics": {"fvu": 0.25}}
    sae.log_frequency = log_frequency_of(torch.linspace(0, 1, 40))
    again = load_sae(save_sae(sae, tmp_path / "a" / "sae"))
    assert type(again) is type(sae)
    assert again.config == sae.config
    assert again.metadata == sae.metadata
    assert torch.equal(again.log_frequency, sae.log_frequency)
    assert (again.encoder is again.W_dec) == tied
    assert torch.equal(again.encode(x) > 0, sae.encode(x) > 0)
    scale = x.abs().max()
    torch.testing.assert_close(again.encode(x) / scale, sae.encode(x) / scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again(x) / scale, sae(x) / scale, rtol=1e-5, atol=1e-6)


@every_architecture
def test_saving_loading_and_saving_gives_the_same_bytes(architecture, random_sae, tmp_path):
    sae = random_sae(architecture)
    sae.log_frequency = torch.zeros(40)
    first = contents(save_sae(sae, tmp_path / "one"))
    second = contents(save_sae(load_sae(tmp_path / "one"), tmp_path / "two"))
    assert first == second
    assert set(first) == {CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE}


@every_architecture
def test_the_file_holds_what_sae_lens_expects(architecture, random_sae, tmp_path):
    sae = random_sae(architecture, site="double.1.txt", model="flux-tiny")
    folder = save_sae(sae, tmp_path)
    config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    own = {
        "topk": {"b_enc"},
        "l1": {"b_enc"},
        "gated": {"b_gate", "b_mag", "r_mag"},
    }.get(architecture, {"b_enc", "threshold"})
    assert set(tensors) == {"W_enc", "W_dec", "b_dec"} | own
    assert tensors["W_enc"].shape == (12, 40)
    assert tensors["W_dec"].shape == (40, 12)
    assert all(tensors[name].shape == (40,) for name in own)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(40))
    assert config["metadata"]["hook_name"] == "double.1.txt"
    assert config["normalize_activations"] == "none"
    assert ("k" in config) == (architecture == "topk")


@every_architecture
def test_sae_lens_loads_the_folder_as_it_stands(architecture, random_sae, tokens, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = random_sae(architecture, site="single.6.img", model="flux-tiny"), tokens()
    sae.metadata = {"prompts_sha256": "abc"}
    save_sae(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    scale = x.abs().max()
    torch.testing.assert_close(theirs.encode(x) / scale, sae.encode(x) / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(sae.encode(x)) / scale, sae(x) / scale, rtol=1e-5, atol=1e-5)
    assert torch.equal(theirs.encode(x) > 0, sae.encode(x) > 0)
    assert theirs.cfg.metadata.flux_ir["training"] == {"prompts_sha256": "abc"}
    assert theirs.cfg.metadata.hook_name == "single.6.img"
    with pytest.warns(DeprecationWarning, match="load_from_disk"):
        older = sae_lens.SAE.load_from_pretrained(str(tmp_path))
    assert torch.equal(older.W_enc, theirs.W_enc)


@every_architecture
def test_what_sae_lens_saves_again_is_still_ours(architecture, random_sae, tokens, tmp_path):
    """Metadata that sae-lens does not know survives it."""
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = random_sae(architecture), tokens()
    save_sae(sae, tmp_path / "ours")
    sae_lens.SAE.load_from_disk(str(tmp_path / "ours")).save_model(str(tmp_path / "theirs"))
    again = load_sae(tmp_path / "theirs")
    assert type(again) is type(sae)
    assert torch.equal(again.encode(x), load_sae(tmp_path / "ours").encode(x))


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_what_sae_lens_made_is_read(architecture, tokens, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    fields = {"architecture": architecture, "d_in": 12, "d_sae": 40} | ({"k": 5} if architecture == "topk" else {})
    theirs, x = sae_lens.SAE.from_dict({**fields, "metadata": {"hook_name": "blocks.3"}}), tokens()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_model(str(tmp_path))
    ours = load_sae(tmp_path)
    assert ours.config.site == "blocks.3"
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-3)


def test_a_trained_threshold_is_in_the_file_of_batch_topk(tokens, tmp_path):
    sae = make_sae(SAEConfig("batch_topk", d_in=12, d_sae=40, k=4), sample=tokens(100))
    sae.loss(sae.normalise(tokens(64)), TrainingState(0, 64, None, 4))
    save_sae(sae, tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)["threshold"]
    assert stored.min() == stored.max() > 0
    torch.testing.assert_close(load_sae(tmp_path).threshold, sae.threshold / sae.norm_scale)


def test_a_folder_saved_over_keeps_nothing_of_what_was_there(random_sae, tmp_path):
    sae = random_sae("topk")
    sae.log_frequency = torch.zeros(40)
    save_sae(sae, tmp_path)
    other = random_sae("l1", seed=4)
    save_sae(other, tmp_path)
    assert set(contents(tmp_path)) == {CONFIG_FILE, WEIGHTS_FILE}
    assert load_sae(tmp_path).config.architecture == "l1"


def test_a_save_that_fails_leaves_no_half_of_a_folder(random_sae, tmp_path, monkeypatch):
    """The weights cannot be written: there is no config either, so nothing takes the folder for whole."""
    save_sae(random_sae("topk"), tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(FluxIRError, match="there is a folder of that name"):
        save_sae(random_sae("l1"), tmp_path)
    assert not (tmp_path / CONFIG_FILE).exists()
    with pytest.raises(FluxIRError, match="never saved whole"):
        load_sae(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(random_sae, tmp_path):
    sae = random_sae("topk")
    with torch.no_grad():
        sae.b_enc[2] = float("nan")
    with pytest.raises(FluxIRError, match="weights must be finite: b_enc is not"):
        save_sae(sae, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_decoder_that_is_not_normalised_is_only_saved_when_asked_for(random_sae, tmp_path):
    sae = random_sae("topk")
    with torch.no_grad():
        sae.W_dec[3] *= 1.5
    with pytest.raises(FluxIRError, match=r"must have length 1 in the file: one is off by 0\.5"):
        save_sae(sae, tmp_path)
    save_sae(sae, tmp_path, unit_decoder=False)
    assert torch.equal(load_sae(tmp_path).W_dec, sae.W_dec)


@pytest.mark.parametrize("extra", [{"fvu": float("nan")}, {"mean": torch.zeros(2)}])
def test_metadata_that_json_cannot_say_is_refused(extra, random_sae, tmp_path):
    sae = random_sae("topk")
    sae.metadata = extra
    with pytest.raises(FluxIRError, match="must be what JSON can say"):
        save_sae(sae, tmp_path)


def test_missing_files_are_named(random_sae, tmp_path):
    with pytest.raises(FluxIRError, match="there is no such folder"):
        load_sae(tmp_path / "nothing")
    with pytest.raises(FluxIRError, match=f"holds no {CONFIG_FILE}"):
        load_sae(tmp_path)
    save_sae(random_sae("topk"), tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(FluxIRError, match=f"holds no {WEIGHTS_FILE}"):
        load_sae(tmp_path)


def test_a_pickle_is_never_opened(random_sae, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    for name in ("sae.pt", WEIGHTS_FILE):
        folder = save_sae(random_sae("topk"), tmp_path / name)
        (folder / WEIGHTS_FILE).unlink()
        (folder / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(FluxIRError, match=r"pickle|safetensors"):
            load_sae(folder)
    with pytest.raises(FluxIRError, match="may be a pickle"):
        load_sae(tmp_path / "sae.pt" / "sae.pt")
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_architecture_is_refused(random_sae, tmp_path):
    save_sae(random_sae("topk"), tmp_path)
    change_config(tmp_path, lambda config: config["metadata"]["flux_ir"]["config"].update(architecture="topq"))
    with pytest.raises(FluxIRError, match=r"architecture must be one of .* got 'topq'"):
        load_sae(tmp_path)
    change_config(tmp_path, lambda config: config.update(architecture="transcoder", metadata={}))
    with pytest.raises(FluxIRError, match="'transcoder', which is not known here"):
        load_sae(tmp_path)
    change_config(tmp_path, lambda config: config.pop("architecture"))
    with pytest.raises(FluxIRError, match="it lacks architecture"):
        load_sae(tmp_path)


def test_weights_of_another_architecture_or_size_are_refused_by_tensor(random_sae, tmp_path):
    one, other = save_sae(random_sae("gated"), tmp_path / "one"), save_sae(random_sae("topk"), tmp_path / "other")
    (one / WEIGHTS_FILE).replace(other / WEIGHTS_FILE)
    with pytest.raises(FluxIRError, match="it lacks b_enc; it has b_gate too many"):
        load_sae(other)
    save_sae(random_sae("topk"), one)
    change_config(one, lambda config: config["metadata"]["flux_ir"]["config"].update(d_sae=41))
    with pytest.raises(FluxIRError, match=r"W_enc has the shape \[12, 40\], not \[12, 41\]"):
        load_sae(one)


def test_a_file_cut_short_is_refused(random_sae, tmp_path):
    save_sae(random_sae("topk"), tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[:-100])
    with pytest.raises(FluxIRError, match="is cut short"):
        load_sae(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"metadata": 3}'])
def test_a_broken_config_is_refused(text, random_sae, tmp_path):
    save_sae(random_sae("topk"), tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(FluxIRError, match=r"must be (JSON|a JSON object)"):
        load_sae(tmp_path)


def test_weights_that_were_tied_and_are_no_longer_are_refused(random_sae, tmp_path):
    save_sae(random_sae("topk", tied=True), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["W_enc"] = tensors["W_enc"] * 2
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(FluxIRError, match="must be the decoder transposed"):
        load_sae(tmp_path)


def test_several_thresholds_where_one_is_meant_are_refused(random_sae, tmp_path):
    save_sae(random_sae("batch_topk"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["threshold"][3] += 1
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(FluxIRError, match="all features of a batch_topk have one threshold"):
        load_sae(tmp_path)


def test_normalisation_that_was_not_folded_in_is_refused(random_sae, tmp_path):
    save_sae(random_sae("topk"), tmp_path)
    change_config(tmp_path, lambda config: config.update(normalize_activations="layer_norm", metadata={}))
    with pytest.raises(FluxIRError, match=r"it has \{'normalize_activations': 'layer_norm'\}"):
        load_sae(tmp_path)


def test_how_strongly_features_are_active_is_kept_in_a_file_of_its_own(random_sae, tmp_path):
    sae = random_sae("topk")
    sae.mean_active, sae.max_active = torch.rand(40), torch.rand(40) + 1
    stored = load_file(save_sae(sae, tmp_path) / ACTIVATIONS_FILE)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "mean_active": (torch.float32, (40,)),
        "max_active": (torch.float32, (40,)),
    }
    again = load_sae(tmp_path)
    assert torch.equal(again.mean_active, sae.mean_active)
    assert torch.equal(again.max_active, sae.max_active)


def test_a_disk_that_runs_full_leaves_the_autoencoder_that_was_there(random_sae, tmp_path):
    sae = random_sae("topk")
    sae.log_frequency = torch.zeros(40)
    before = contents(save_sae(sae, tmp_path))
    with file_size_limit(3000), pytest.raises(FluxIRError, match=f"cannot write .*{WEIGHTS_FILE}: File too large"):
        save_sae(random_sae("gated"), tmp_path)
    assert contents(tmp_path) == before
