"""Other programs' own packages read what is written for them, and what they write is read here."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures import make_sae
from flux_ir.sae.config import ARCHITECTURES, SAEConfig
from flux_ir.sae.files import save_sae
from flux_ir.sae.interop.formats import FOREIGN_FORMATS, format_of, load_any, save_as

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


@pytest.mark.parametrize("name", FOREIGN_FORMATS)
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
    with pytest.raises(FluxIRError, match="must be a JSON object"):
        load_any(folder)
    (folder / "cfg.json").write_text(json.dumps({"k": 3}))
    with pytest.raises(FluxIRError, match="must have the field 'd_in'"):
        load_any(folder)
