"""What a file of weights is, from its header alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints import variants
from flux_ir.models.checkpoints.describe import describe_file
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import get_spec


def stub(tmp_path, *names, shape=(2, 4), dtype=torch.float32):
    save_file({name: torch.zeros(shape, dtype=dtype) for name in names}, tmp_path / "file.safetensors")
    return tmp_path / "file.safetensors"


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_the_networks_of_a_known_model_are_told_with_its_name(tmp_path, save, layout):
    spec = get_spec("flux-tiny")
    for part, network in (("transformer", Flux(spec.flux)), ("autoencoder", AutoEncoder(spec.autoencoder))):
        state = network.state_dict() if layout == "bfl" else to_diffusers(network.state_dict(), network.params)
        (told,) = describe_file(save(state, tmp_path / f"{part}.safetensors"))
        assert told.kind == f"the {part} of flux-tiny"
        assert told.models == ("flux-tiny",)
        assert told.layout == layout
        assert told.tensors == len(state)
        assert told.parameters == sum(tensor.numel() for tensor in state.values())
        assert told.nbytes == 4 * told.parameters
        assert told.dtypes == {"F32": len(state)}


def test_a_flux_that_is_no_known_model_is_told_with_its_sizes(tmp_path, tiny_flux, save):
    (told,) = describe_file(save(tiny_flux(guidance=True), tmp_path / "flux.safetensors"))
    assert told.kind == "a FLUX transformer of no model known here"
    assert told.facts["blocks"] == "2 double, 3 single, 64 wide"
    assert told.facts["guidance"] == "distilled, as in the dev family"


@pytest.mark.parametrize(("channels", "variant"), [(128, variants.CONTROL), (384, variants.FILL)])
def test_variants_are_told_by_the_name_they_are_refused_with(tmp_path, tiny_flux, save, channels, variant):
    state = dict(tiny_flux().state_dict())
    state["img_in.weight"] = torch.zeros(64, channels)
    (told,) = describe_file(save(state, tmp_path / "flux.safetensors"))
    assert told.facts["latent channels"] == f"{channels}, as those of {variant.name}"
    assert told.facts["not run here"] == f"use {variant.instead}"


def test_the_networks_of_a_file_with_several_are_told_one_by_one(tmp_path, tiny_flux, tiny_autoencoder, text_folders):
    parts = {
        "model.diffusion_model.": tiny_flux().state_dict(),
        "vae.": tiny_autoencoder().state_dict(),
        "text_encoders.t5xxl.transformer.": load_file(text_folders.t5 / "model.safetensors"),
        "text_encoders.clip_l.transformer.": load_file(text_folders.clip / "model.safetensors"),
    }
    whole = {prefix + name: t.contiguous() for prefix, state in parts.items() for name, t in state.items()}
    save_file(whole, tmp_path / "all.safetensors")
    told = {network.prefix: network for network in describe_file(tmp_path / "all.safetensors")}
    assert told.keys() == parts.keys()
    kinds = [told[prefix].kind for prefix in parts]
    assert kinds[0].startswith("a FLUX transformer")
    assert "autoencoder of" in kinds[1]
    assert kinds[2:] == ["the T5 text encoder", "the text encoder of CLIP"]
    assert told["text_encoders.t5xxl.transformer."].facts["shape"] == "2 layers, 40 wide, 12 tokens known"
    assert sum(network.tensors for network in told.values()) == len(whole)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "the transformer of Stable Diffusion 3"),
        ("double_stream_modulation_img.lin.weight", r"the transformer of FLUX.2"),
        ("redux_up.weight", variants.REDUX.name),
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "the picture encoder of CLIP or SigLIP"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ("W_dec", "a sparse autoencoder"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight", "a LoRA of Stable Diffusion 3"),
        ("who.knows", "something that is not known here (who.knows)"),
    ],
)
def test_what_is_no_flux_is_told_too(tmp_path, name, kind):
    (told,) = describe_file(stub(tmp_path, name))
    assert told.kind == kind
    assert told.models == ()


def test_quantised_weights_are_told_by_their_format(tmp_path):
    scaled = {"a.weight": torch.zeros(2, 4, dtype=torch.float8_e4m3fn), "a.scale_weight": torch.ones(())}
    save_file(scaled, tmp_path / "file.safetensors")
    (told,) = describe_file(tmp_path / "file.safetensors")
    assert "(1)" in told.quantised
    assert told.parameters == 8
    (told,) = describe_file(stub(tmp_path, "a.qweight", "a.wscales"))
    assert "not readable: it " in told.quantised


def test_an_adapter_that_fits_no_model_says_why(tmp_path):
    (told,) = describe_file(stub(tmp_path, "blocks.0.q.lora_A.weight", "blocks.0.q.lora_B.weight"))
    assert told.kind == "an adapter of no model known here"
    assert "none of the 2 tensors" in str(told.facts["because"])


def test_a_file_without_tensors_is_an_error(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FluxIRError, match="holds no tensors"):
        describe_file(tmp_path / "empty.safetensors")
