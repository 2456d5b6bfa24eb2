"""`flux-ir weights`, on the model in the box and on what people have on their disks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flux_ir.commands.main import main
from flux_ir.models.checkpoints.lora.contents import blank_transformer
from flux_ir.models.registry import PACKAGED_MODELS, get_spec
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import bare_sae
from flux_ir.sae.files.folder import save_sae
from tests.models.checkpoints.lora.layouts import Factors, draw_factors, kohya

ASSETS = PACKAGED_MODELS["flux-tiny"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of two of flux-tiny's blocks."""
    network = blank_transformer(get_spec("flux-tiny"))
    blocks = ("double_blocks.1.", "single_blocks.6.")
    factors = {
        name: Factors(0.02 * f.up, f.down) for name, f in draw_factors(network).items() if name.startswith(blocks)
    }
    return kohya(factors, network, tmp_path_factory.mktemp("lora") / "lora.safetensors")


def told(capsys, *words):
    assert main(["weights", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_folder_is_told_file_by_file(capsys):
    page = told(capsys, ASSETS)
    assert "what             the transformer of flux-tiny" in page
    assert "what             the autoencoder of flux-tiny" in page
    assert "4 double, 8 single, 192 wide" in page
    assert "the T5 text encoder" in told(capsys, ASSETS / "t5")


def test_a_lora_is_told_with_the_change_of_each_block(capsys, lora, tmp_path):
    page = told(capsys, lora, "--output", tmp_path / "told.json")
    assert "what          a LoRA of flux-tiny" in page
    assert "layout        kohya, names of BFL" in page
    assert "alpha / rank  0.5" in page
    rows = {line.split()[0]: line for line in page.splitlines() if "%" in line}
    assert len(rows) == 17
    assert "0.000%" in rows["single.5"]
    assert rows["single.6"].rstrip().endswith("#")
    assert "#" not in rows["single.5"]
    stored = json.loads((tmp_path / "told.json").read_text())
    assert stored["model"] == "flux-tiny"
    assert [block for block, change in stored["changes"].items() if change] == ["double.1", "single.6"]
    assert all(name.startswith(("double_blocks.1.", "single_blocks.6.")) for name in stored["layers"])
    assert stored["files"][0]["networks"][0]["facts"]["layers"] == 13


def test_a_lora_of_text_encoders_has_a_row_for_each_of_their_blocks(capsys, tmp_path):
    names = (
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te2_encoder_block_2_layer_0_SelfAttention_q",
    )
    tensors = {f"{name}.lora_up.weight": torch.full((128, 1), 0.1) for name in names}
    tensors |= {f"{name}.lora_down.weight": torch.ones(1, 128) for name in names}
    save_file(tensors, tmp_path / "lora.safetensors")
    page = told(capsys, tmp_path / "lora.safetensors", "--output", tmp_path / "told.json")
    assert "layers        2: 1 of T5, 1 of CLIP" in page
    changes = json.loads((tmp_path / "told.json").read_text())["changes"]
    assert list(changes) == ["t5.0", "t5.1", "t5.2", "clip.0", "clip.1", "clip.2"]
    assert [block for block, change in changes.items() if change] == ["t5.2", "clip.1"]


def test_a_lora_whose_model_is_not_here_is_told_without_a_comparison(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for variable in ("FLUX_SCHNELL", "FLUX_DEV", "FLUX_KREA_DEV", "FLUX_KREA", "FLUX_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    ends = {"down": torch.zeros(1, 3072), "up": torch.zeros(3072, 1)}
    save_file(
        {f"lora_unet_double_blocks_18_img_attn_proj.lora_{end}.weight": value for end, value in ends.items()},
        tmp_path / "lora.safetensors",
    )
    assert main(["weights", str(tmp_path / "lora.safetensors")]) == 0
    said = capsys.readouterr()
    assert "a LoRA of flux-schnell or flux-dev or flux-dev-krea" in said.out
    assert "note: not compared: the weights of flux-schnell, flux-dev, flux-dev-krea" in said.err
    assert main(["weights", str(tmp_path / "lora.safetensors"), "--model", "flux-tiny"]) == 2
    assert "it fits flux-schnell or flux-dev or flux-dev-krea" in capsys.readouterr().err


def test_an_autoencoder_of_features_is_told_with_its_size(capsys, tmp_path):
    sae = bare_sae(SAEConfig("topk", d_in=8, d_sae=32, k=4))
    save_sae(sae, tmp_path / "sae", unit_decoder=False)
    page = told(capsys, tmp_path / "sae")
    assert "a sparse autoencoder (topk)" in page
    assert "32" in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "--file must name a file or a folder that exists"),
        (lambda path: path.mkdir(), "must hold weights: it has no .safetensors file"),
        (lambda path: path.write_bytes(b"PK\3\4"), "is a pickle"),
        (lambda path: path.write_bytes(b"<html>" * 9), "is not a safetensors file"),
    ],
)
def test_what_holds_no_weights_is_one_line(make, message, tmp_path, capsys):
    make(tmp_path / "thing")
    assert main(["weights", str(tmp_path / "thing")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 2


def test_a_model_is_given_for_loras_alone(capsys):
    assert main(["weights", str(ASSETS), "--model", "flux-tiny"]) == 2
    assert "--model is what a LoRA is compared with" in capsys.readouterr().err
