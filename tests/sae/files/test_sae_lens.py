"""Folders of sae-lens with settings that ours do not have: its own package is the oracle, of every setting alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.sae.files.folder import CONFIG_FILE, WEIGHTS_FILE, load_sae, save_sae

D_IN, D_SAE, K = 12, 40, 5
OLD = {  # as version 5 wrote it
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "model_name": "toy",
    "hook_name": "blocks.0.hook_resid_post",
    "hook_layer": 0,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.11.0",
    "prepend_bos": True,
    "dataset_path": "none",
    "dataset_trust_remote_code": True,
    "context_size": 8,
    "normalize_activations": "none",
    "neuronpedia_id": None,
    "model_from_pretrained_kwargs": {},
    "seqpos_slice": [None],
}
NEW = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.12"}}


def weights_of(architecture):
    """Weights with every row of another length, so that every setting shows."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(biases, (D_SAE,))
    tensors = {name: 0.4 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(D_SAE, generator=draw) - 0.3  # some below 0
    return tensors


@pytest.fixture
def stored(tmp_path):
    """Writes a folder with this config; gives the folder."""

    def write(config, tensors=None, name="theirs"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        architecture = config.get("architecture", "standard")
        save_file(weights_of(architecture) if tensors is None else tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def agrees(tokens):
    """Whether ours computes what sae-lens computes of the same folder; gives ours."""
    sae_lens = pytest.importorskip("sae_lens")

    @torch.no_grad()
    def check(folder):
        theirs, ours, x = sae_lens.SAE.load_from_disk(str(folder)), load_sae(folder), tokens()
        z = theirs.encode(x)
        assert torch.equal(ours.encode(x) > 0, z > 0)
        size = x.abs().max()
        torch.testing.assert_close(ours.encode(x) / size, z / size, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x) / size, theirs(x) / size, rtol=1e-5, atol=1e-5)
        return ours

    return check


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "setting",
    [
        {"architecture": "topk", "k": K},
        {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        {"architecture": "standard"},
        {"architecture": "jumprelu"},
        {"architecture": "gated"},
    ],
)
def test_every_setting_of_version_6_computes_what_sae_lens_computes(setting, apply_b_dec_to_input, stored, agrees):
    ours = agrees(stored({**NEW, **setting, "apply_b_dec_to_input": apply_b_dec_to_input}))
    assert (ours.config.d_in, ours.config.d_sae) == (D_IN, D_SAE)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}, "topk"),
        ({"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}, "topk"),
        ({"activation_fn_str": None, "activation_fn": "topk", "activation_fn_kwargs": {"k": 7}}, "topk"),
        ({"architecture": "standard"}, "l1"),
        ({"architecture": "standard", "activation_fn_kwargs": {"k": 7}}, "l1"),  # relu has no k
        ({"architecture": "jumprelu", "apply_b_dec_to_input": False}, "jumprelu"),
        ({"architecture": "gated", "normalize_activations": None}, "gated"),
        ({"normalize_activations": False, "hook_name": None, "hook_point": "blocks.0.hook_mlp_out"}, "l1"),
        ({"use_ghost_grads": True, "l1_coefficient": 5, "lr": 3e-4, "expansion_factor": 32}, "l1"),
    ],
)
def test_older_configs_compute_what_sae_lens_computes(config, architecture, stored, agrees):
    older = {name: value for name, value in {**OLD, **config}.items() if value is not None or name not in config}
    if config.get("normalize_activations", "none") is None:
        older["normalize_activations"] = None
    ours = agrees(stored(older))
    assert ours.config.architecture == architecture
    assert ours.config.site == (config.get("hook_point") or "blocks.0.hook_resid_post")
    assert ours.config.model == "toy"


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_of_batch_topk_computes_what_its_export_computes(architecture, tokens, tmp_path):
    """sae-lens exports them as jumprelu; a checkpoint that training left holds the same function."""
    sae_lens = pytest.importorskip("sae_lens")
    fields = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "rescale_acts_by_decoder_norm": True}
    if architecture == "matryoshka_batchtopk":
        fields["matryoshka_widths"] = [10, D_SAE]
    training = sae_lens.TrainingSAE.from_dict({**fields, "architecture": architecture})
    with torch.no_grad():
        for name, tensor in weights_of(architecture).items():
            getattr(training, name).copy_(tensor)
        training.topk_threshold.fill_(0.7)
    training.save_model(str(tmp_path / "checkpoint"))
    training.save_inference_model(str(tmp_path / "export"))
    checkpoint, export, x = load_sae(tmp_path / "checkpoint"), load_sae(tmp_path / "export"), tokens()
    assert (checkpoint.config.k, export.config.architecture) == (K, "jumprelu")
    assert checkpoint.config.prefixes == (() if architecture == "batchtopk" else (10, D_SAE))
    torch.testing.assert_close(checkpoint.encode(x), export.encode(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(checkpoint(x), export(x), rtol=1e-5, atol=1e-4)


def test_heads_that_sae_lens_flattens_come_flat(stored, tokens):
    sae_lens = pytest.importorskip("sae_lens")
    metadata = {"hook_name": "blocks.0.attn.hook_z"}
    folder = stored({**NEW, "architecture": "standard", "reshape_activations": "hook_z", "metadata": metadata})
    ours, theirs, x = load_sae(folder), sae_lens.SAE.load_from_disk(str(folder)), tokens()
    torch.testing.assert_close(ours.encode(x), theirs.encode(x.reshape(-1, 3, 4)), rtol=1e-5, atol=1e-4)


def test_a_scaling_factor_is_applied_to_features_as_they_are_decoded(stored, tokens):
    factor = torch.linspace(0.5, 2, D_SAE)
    plain = load_sae(stored(OLD, name="plain"))
    tuned = load_sae(stored({**OLD, "finetuning_scaling_factor": True}, weights_of("") | {"scaling_factor": factor}))
    x = tokens()
    z = plain.encode(x)
    assert torch.equal(tuned.encode(x), z)
    torch.testing.assert_close(tuned(x), plain.decode(z * factor), rtol=1e-5, atol=1e-4)
    ones = stored(OLD, weights_of("") | {"scaling_factor": torch.ones(D_SAE)}, name="ones")
    assert torch.equal(load_sae(ones)(x), plain(x))
    with pytest.raises(FluxIRError, match="have a scaling factor, which its config says they have not"):
        load_sae(stored(OLD, weights_of("") | {"scaling_factor": factor}, name="unsaid"))


def test_a_k_that_stands_in_the_weights_is_asked(stored):
    config = {**NEW, "architecture": "topk"}
    k = {"k": torch.tensor(3, dtype=torch.int32)}
    assert load_sae(stored(config, weights_of("topk") | k)).config.k == 3
    with pytest.raises(FluxIRError, match="must have one k: k: 4, the weights: 3"):
        load_sae(stored({**config, "k": 4}, weights_of("topk") | k))
    with pytest.raises(FluxIRError, match="must say its k, the number of active features: neither k nor activation_fn"):
        load_sae(stored(config))


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ({"normalize_activations": "layer_norm"}, "{'normalize_activations': 'layer_norm'}", "depends on each token"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'", "depends on each token"),
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average", "fold_activation_norm_scaling"),
        ({"normalize_activations": True}, "'expected_average_only_in'", "fold_activation_norm_scaling_factor(factor)"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening'", "fold_activation_whitening"),
        ({"activation_fn_str": "tanh-relu"}, "{'activation_fn': 'tanh-relu'}", "with sae-lens"),
        ({"activation_fn_kwargs": {"slope": 0.1}}, "{'activation_fn_kwargs': {'slope': 0.1}}", "with sae-lens"),
        ({"rescale_acts_by_decoder_norm": True}, "{'rescale_acts_by_decoder_norm': True}", "with sae-lens"),
        ({"reshape_activations": "heads"}, "{'reshape_activations': 'heads'}", "with sae-lens"),
        ({"post_encoder_norm": True}, "settings that are not known here: post_encoder_norm = True", "take them out"),
        ({"temperature": 0.5, "x": [0, 2]}, "not known here: temperature = 0.5, x = [0, 2]", "take them out"),
        ({"architecture": "abstopk"}, "'abstopk', which is not known here", "known are topk, standard, jumprelu"),
        ({"d_sae": "40"}, "d_sae in {folder}/cfg.json must be a whole number above 0: it is '40'", "check"),
        ({"d_in": 13}, "W_enc has the shape [12, 40], not [13, 40]", "different autoencoders"),
    ],
)
def test_what_weights_cannot_say_is_refused_by_name(setting, message, hint, stored):
    folder = stored({**OLD, **setting}, weights_of("standard"))
    with pytest.raises(FluxIRError) as caught:
        load_sae(folder)
    assert message.replace("{folder}", str(folder)) in caught.value.message
    assert hint in caught.value.hint


def test_settings_that_are_off_and_metadata_survive_being_read_and_saved(stored, tmp_path):
    metadata = {"sae_lens_version": "6.1.0", "neuronpedia_id": "x/1", "mine": {"a": [1]}, "hook_name": "single.3.img"}
    off = {"new_setting": False, "another": None, "third": "none", "fourth": 0, "fifth": []}
    sae = load_sae(stored({**NEW, "architecture": "standard", **off, "metadata": metadata}))
    for name in ("once", "twice"):
        save_sae(sae, tmp_path / name, unit_decoder=False)
        written = json.loads((tmp_path / name / CONFIG_FILE).read_text())["metadata"]
        assert (written["neuronpedia_id"], written["mine"]) == ("x/1", {"a": [1]})
        assert (written["hook_name"], written["sae_lens_version"]) == ("single.3.img", "6.0.0")
        sae = load_sae(tmp_path / name)
        assert sae.config.site == "single.3.img"
    once, twice = ((tmp_path / name / CONFIG_FILE).read_bytes() for name in ("once", "twice"))
    assert once == twice


def test_what_somebody_wrote_into_our_metadata_survives(random_sae, tmp_path):
    path = save_sae(random_sae("topk"), tmp_path / "sae") / CONFIG_FILE
    config = json.loads(path.read_text())
    config["metadata"] |= {"note": "the one that works"}
    path.write_text(json.dumps(config))
    again = json.loads((save_sae(load_sae(tmp_path / "sae"), tmp_path / "again") / CONFIG_FILE).read_text())
    assert again["metadata"]["note"] == "the one that works"


@pytest.mark.parametrize(("name", "value"), [("k", 9), ("apply_b_dec_to_input", False), ("architecture", "standard")])
def test_a_folder_of_ours_that_says_two_things_is_refused(name, value, random_sae, tmp_path):
    """sae-lens would read the one, and we the other."""
    path = save_sae(random_sae("topk"), tmp_path) / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(FluxIRError, match=f"says two things: {name} {value!r} and "):
        load_sae(tmp_path)


def test_weights_of_older_types_are_read_and_codes_are_not(stored):
    exact = weights_of("standard")
    half = load_sae(stored(OLD, {name: tensor.bfloat16() for name, tensor in exact.items()}, name="half"))
    assert torch.equal(half.W_dec, exact["W_dec"].bfloat16().float())
    coded = exact | {"W_dec": exact["W_dec"].to(torch.float8_e4m3fn)}
    with pytest.raises(FluxIRError, match="must hold plain weights: W_dec = 'F8_E4M3'"):
        load_sae(stored(OLD, coded, name="coded"))


def test_weights_that_are_not_finite_are_refused(stored, random_sae, tmp_path):
    exact = weights_of("standard")
    exact["b_enc"][3] = float("inf")
    with pytest.raises(FluxIRError, match="weights must be finite: b_enc in"):
        load_sae(stored(OLD, exact))
    save_sae(random_sae("topk"), tmp_path / "ours")
    broken = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    broken["W_enc"][0, 0] = float("nan")
    save_file(broken, tmp_path / "ours" / WEIGHTS_FILE)
    with pytest.raises(FluxIRError, match="weights must be finite: W_enc in"):
        load_sae(tmp_path / "ours")
