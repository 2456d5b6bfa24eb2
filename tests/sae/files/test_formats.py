"""Other programs' own packages read what is written for them, and what they write is read here."""

import importlib
import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import ARCHITECTURES, SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from flux_ir.sae.files.formats import ForeignFormat, format_of, load_any, sae_folders, save_as

D_IN, D_SAE, K = 12, 30, 4


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(40, D_IN, generator=generator) + 1


@pytest.fixture
def trained(tokens):
    """An autoencoder with normalisation, no two weights alike, and a threshold where there is one."""

    def make(architecture):
        config = SAEConfig(
            architecture=architecture, d_in=D_IN, d_sae=D_SAE, k=K, site="single.6.img", model="flux-tiny"
        )
        sae = make_sae(config, sample=tokens)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, value in sae.named_parameters():
                if name != "W_dec":
                    value.add_(0.1 * torch.rand(value.shape, generator=generator))
            if architecture in ("batch_topk", "matryoshka"):
                sae.threshold.fill_(0.4)
        return sae

    return make


@pytest.fixture
def sparsify(monkeypatch):
    """The package, with the decoder it has for machines without a GPU."""
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # read when it is imported
    return pytest.importorskip("sparsify")


def agree(ours, theirs, tokens):
    features = ours.encode(tokens)
    assert (features > 0).any()
    torch.testing.assert_close(theirs.encode(tokens), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(features), ours.decode(features), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "l1", "gated", "jumprelu", "matryoshka"])
def test_dictionary_learning_reads_ours(architecture, trained, tokens, tmp_path):
    utils = pytest.importorskip("dictionary_learning.utils")
    sae = trained(architecture)
    save_as(sae, "dictionary_learning", tmp_path / "sae")
    theirs, config = utils.load_dictionary(str(tmp_path / "sae"), device="cpu")
    agree(sae, theirs, tokens)
    assert config["trainer"]["submodule_name"] == "single.6.img"


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "l1", "gated", "jumprelu"])
def test_dictionary_learning_round_trip(architecture, trained, tokens, tmp_path):
    sae = trained(architecture)
    back = load_any(save_as(sae, "dictionary_learning", tmp_path / "sae"))
    assert back.config.architecture == architecture
    assert (back.config.site, back.config.model) == ("single.6.img", "flux-tiny")
    agree(sae, back, tokens)


@torch.no_grad()
def test_what_dictionary_learning_saves_is_read(tokens, tmp_path):
    module = pytest.importorskip("dictionary_learning.trainers.top_k")
    theirs = module.AutoEncoderTopK(D_IN, D_SAE, K)
    theirs.encoder.bias.copy_(torch.linspace(-1, 1, D_SAE))
    theirs.b_dec.copy_(torch.linspace(0, 1, D_IN))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    agree(load_any(tmp_path), theirs, tokens)


@torch.no_grad()
def test_sparsify_reads_ours(sparsify, trained, tokens, tmp_path):
    sae = trained("topk")
    save_as(sae, "sparsify", tmp_path / "single.6.img")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "single.6.img", device="cpu")
    found = theirs.encode(tokens)
    dense = torch.zeros(len(tokens), D_SAE).scatter(1, found.top_indices, found.top_acts)
    torch.testing.assert_close(dense, sae.encode(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(found.top_acts, found.top_indices), sae(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_sparsify_saves_is_read(sparsify, tokens, tmp_path):
    theirs = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K))
    theirs.encoder.bias.copy_(torch.linspace(-1, 1, D_SAE))
    theirs.b_dec.copy_(torch.linspace(0, 1, D_IN))
    theirs.save_to_disk(tmp_path / "double.1.img")
    ours = load_any(tmp_path / "double.1.img")
    assert (ours.config.site, ours.config.k) == ("double.1.img", K)
    found = theirs.encode(tokens)
    torch.testing.assert_close(ours(tokens), theirs.decode(found.top_acts, found.top_indices), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sparsify_round_trip(trained, tokens, tmp_path):
    sae = trained("topk")
    agree(sae, load_any(save_as(sae, "sparsify", tmp_path / "single.6.img")), tokens)


@torch.no_grad()
def test_hub_folders_of_flow_matching_are_read(tokens, tmp_path):
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "decoder.weight": (D_IN, D_SAE),
        "bias": (D_IN,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"features": D_IN, "pages": D_SAE, "k": K}))
    pre = ((tokens - weights["bias"]) @ weights["encoder.weight"].T + weights["encoder.bias"]).relu()
    values, indices = pre.topk(K, dim=1)
    z = torch.zeros(len(tokens), D_SAE).scatter(1, indices, values)
    ours = load_any(tmp_path)
    torch.testing.assert_close(ours.encode(tokens), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(tokens), z @ weights["decoder.weight"].T + weights["bias"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_own_folder_is_recognised(architecture, trained, tmp_path):
    save_sae(trained(architecture), tmp_path / "sae")
    assert format_of(tmp_path / "sae") == "sae_lens"
    assert load_any(tmp_path / "sae").config.architecture == architecture


@pytest.mark.parametrize("name", get_args(ForeignFormat))
def test_export_gives_the_same_bytes_again(name, trained, tmp_path):
    folders = [save_as(trained("topk"), name, tmp_path / part / "single.6.img") for part in ("a", "b")]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert all(not file.name.endswith(".partial") for file in folders[0].iterdir())


def test_an_architecture_the_other_program_lacks_is_refused(trained, tmp_path):
    with pytest.raises(FluxIRError, match="sparsify has no architecture gated: it has topk"):
        save_as(trained("gated"), "sparsify", tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_pickle_that_would_run_something_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"encoder.weight": Trap()}, tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    with pytest.raises(FluxIRError, match="must hold tensors and nothing else"):
        load_any(tmp_path)
    assert not (tmp_path / "ran").exists()


def theirs_of(name):
    """One of dictionary_learning's classes with weights of many lengths, and the config that goes with it."""
    dictionary = pytest.importorskip("dictionary_learning.dictionary")
    trainers = "dictionary_learning.trainers"
    made = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_SAE),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: importlib.import_module(f"{trainers}.top_k").AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: importlib.import_module(f"{trainers}.batch_top_k").BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: importlib.import_module(
            f"{trainers}.matryoshka_batch_top_k"
        ).MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [10, 20]),
    }[name]()
    generator = torch.Generator().manual_seed(2)
    for tensor in made.parameters():
        tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        made.threshold.fill_(0.6)
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "lr": 1e-3}
    return made, trainer | ({"k": K} if "TopK" in name else {})


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("AutoEncoder", "l1"),
        ("AutoEncoderNew", "l1"),
        ("GatedAutoEncoder", "gated"),
        ("JumpReluAutoEncoder", "jumprelu"),
        ("AutoEncoderTopK", "topk"),
        ("BatchTopKSAE", "batch_topk"),
        ("MatryoshkaBatchTopKSAE", "matryoshka"),
    ],
)
def test_each_class_of_dictionary_learning_computes_what_its_own_loader_gives(name, architecture, tokens, tmp_path):
    utils = pytest.importorskip("dictionary_learning.utils")
    made, trainer = theirs_of(name)
    torch.save(made.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    ours, (theirs, _) = load_any(tmp_path), utils.load_dictionary(str(tmp_path), device="cpu")
    assert ours.config.architecture == architecture
    assert ours.config.prefixes == ((10, 30) if architecture == "matryoshka" else ())
    agree(ours, theirs, tokens)
    torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_k_of_dictionary_learning_stands_in_its_config_or_its_weights(tokens, tmp_path):
    made, trainer = theirs_of("AutoEncoderTopK")
    weights = made.state_dict()

    def load(trainer, weights):
        torch.save(weights, tmp_path / "ae.pt")
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
        return load_any(tmp_path)

    without_k = {name: value for name, value in trainer.items() if name != "k"}
    agree(load(without_k, weights), made, tokens)
    first_version = {name: value for name, value in weights.items() if name not in ("k", "threshold")}
    agree(load(trainer, first_version), made, tokens)
    agree(load({"dict_class": "AutoEncoderTopK"}, weights), made, tokens)  # sizes are those of the weights
    with pytest.raises(FluxIRError, match=r"must have one k: k: 7, ae\.pt: 4"):
        load(trainer | {"k": 7}, weights)
    with pytest.raises(FluxIRError, match=r"must say its k, .*: neither k nor ae\.pt does"):
        load(without_k, first_version)


@torch.no_grad()
def test_settings_of_sparsify_that_are_about_training_change_nothing(sparsify, tokens, tmp_path):
    config = sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, multi_topk=True, normalize_decoder=False)
    theirs = sparsify.SparseCoder(D_IN, config)
    theirs.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    theirs.save_to_disk(tmp_path / "double.1.img")
    found = theirs.encode(tokens)
    expected = theirs.decode(found.top_acts, found.top_indices)
    torch.testing.assert_close(load_any(tmp_path / "double.1.img")(tokens), expected, atol=1e-5, rtol=1e-5)


def flow_matching_folder(folder):
    folder.mkdir(parents=True)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
    save_file(
        {name: torch.ones(shape) for name, shape in {**shapes, "bias": (D_IN,)}.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"features": D_IN, "pages": D_SAE, "k": K}))
    return folder


@pytest.fixture
def folders(trained, tmp_path):
    """A folder of each layout, with the names of its weights and its config."""
    sae = trained("topk")
    return {
        "sae_lens": (save_sae(sae, tmp_path / "a"), "sae_weights.safetensors", "cfg.json"),
        "sparsify": (save_as(sae, "sparsify", tmp_path / "b"), "sae.safetensors", "cfg.json"),
        "dictionary_learning": (save_as(sae, "dictionary_learning", tmp_path / "c"), "ae.pt", "config.json"),
        "flow_matching": (flow_matching_folder(tmp_path / "d"), "model.safetensors", "config.json"),
    }


LAYOUTS = ("sae_lens", "sparsify", "dictionary_learning", "flow_matching")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointers_and_cut_files_are_one_clear_line_in_every_layout(layout, folders):
    folder, weights, config = folders[layout]
    whole, described = (folder / weights).read_bytes(), (folder / config).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name, data, message in [
        (weights, pointer, f"{weights} is a Git LFS pointer"),
        (config, pointer, f"{config} is a Git LFS pointer"),
        (weights, whole[: len(whole) // 2], f"{weights} is cut short"),
        (weights, whole[:5], weights),
        (weights, b"", weights),
        (config, described[:20], f"{config} must be JSON"),
    ]:
        (folder / weights).write_bytes(whole)
        (folder / config).write_bytes(described)
        (folder / name).write_bytes(data)
        with pytest.raises(FluxIRError) as caught:
            load_any(folder)
        assert message in caught.value.message
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["sparsify", "flow_matching"])
def test_settings_that_are_on_and_not_known_are_refused_by_name(layout, folders):
    folder, _, config = folders[layout]
    stored = json.loads((folder / config).read_text())
    (folder / config).write_text(json.dumps(stored | {"signed": True, "new": False}))
    with pytest.raises(FluxIRError, match="has settings that are not known here: signed = True"):
        load_any(folder)
    (folder / config).write_text(json.dumps(stored | {"signed": False}))
    assert load_any(folder).config.k == K


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_not_finite_are_refused_in_every_layout(layout, folders):
    folder, weights, _ = folders[layout]
    pickled = layout == "dictionary_learning"
    tensors = torch.load(folder / weights) if pickled else load_file(folder / weights)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    torch.save(tensors, folder / weights) if pickled else save_file(tensors, folder / weights)
    with pytest.raises(FluxIRError, match=f"weights must be finite: {name} in "):
        load_any(folder)


def test_a_folder_with_two_autoencoders_is_refused(folders):
    (one, weights, _), (other, _, _) = folders["sparsify"], folders["sae_lens"]
    (one / weights).rename(other / weights)
    with pytest.raises(FluxIRError, match=r"must hold one autoencoder: it has sae_weights\.safetensors and sae\.safet"):
        load_any(other)


def test_a_file_of_torch_save_that_is_no_state_dict_is_refused(folders):
    folder, weights, _ = folders["dictionary_learning"]
    torch.save([torch.ones(2)], folder / weights)
    with pytest.raises(FluxIRError, match="must hold tensors and nothing else: it holds list"):
        load_any(folder)


def test_all_folders_below_a_path_are_found_whichever_program_saved_them(folders, tmp_path):
    assert sae_folders(tmp_path) == sorted(folder for folder, _, _ in folders.values())


def test_wrong_folders_are_one_clear_line_each(trained, tmp_path):
    with pytest.raises(FluxIRError, match="must hold an autoencoder"):
        load_any(tmp_path)
    folder = save_as(trained("topk"), "sparsify", tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    for change, message in [
        ({"transcode": True}, "plain TopK autoencoder: it has {'transcode': True}"),
        ({"activation": "groupmax"}, "it has {'activation': 'groupmax'}"),
        ({"num_latents": D_SAE + 1}, r"encoder.weight has the shape \[30, 12\], not \[31, 12\]"),
    ]:
        (folder / "cfg.json").write_text(json.dumps(config | change))
        with pytest.raises(FluxIRError, match=message):
            load_any(folder)
    (folder / "cfg.json").write_text("[")
    with pytest.raises(FluxIRError, match="must be JSON"):
        load_any(folder)
    (folder / "cfg.json").write_text(json.dumps({"k": 3}))
    with pytest.raises(FluxIRError, match="must have the field 'd_in'"):
        load_any(folder)
