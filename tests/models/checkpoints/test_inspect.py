"""A file that does not fit its model is one clear line, told from its header alone."""

import json
from dataclasses import replace

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.formats.refused import READABLE
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.registry import MODELS


@pytest.fixture
def flux_state(tiny_flux):
    return dict(tiny_flux().state_dict())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_published_names_are_recognised_with_and_without_prefix(tmp_path, tiny_spec, tiny_flux, save, prefix):
    path = save(tiny_flux(), tmp_path / "flux.safetensors", prefix=prefix)
    source = inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert (source.layout, source.origin) == ("bfl", "--checkpoint")
    assert source.entries.keys() == tiny_flux().state_dict().keys()
    assert source.nbytes == sum(tensor.nbytes for tensor in tiny_flux().state_dict().values())


def test_diffusers_names_are_recognised(tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save):
    for part, network in (("transformer", tiny_flux()), ("autoencoder", tiny_autoencoder())):
        path = save(to_diffusers(network.state_dict(), network.params), tmp_path / f"{part}.safetensors")
        assert inspect(tiny_spec(), part, path, "--checkpoint").layout == "diffusers"


def test_both_networks_are_found_in_a_file_that_holds_everything(
    tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save
):
    everything = {f"model.diffusion_model.{name}": tensor for name, tensor in tiny_flux().state_dict().items()}
    everything |= {f"vae.{name}": tensor for name, tensor in tiny_autoencoder().state_dict().items()}
    everything["text_encoders.t5xxl.shared.weight"] = torch.zeros(2)
    path = save(everything, tmp_path / "all.safetensors")
    for part, network in (("transformer", tiny_flux()), ("autoencoder", tiny_autoencoder())):
        assert inspect(tiny_spec(), part, path, "--checkpoint").entries.keys() == network.state_dict().keys()


@pytest.mark.parametrize("convert", [False, True])
def test_guidance_distilled_weights_are_refused_for_schnell(tmp_path, tiny_spec, tiny_flux, save, convert):
    flux = tiny_flux(guidance=True)
    state = to_diffusers(flux.state_dict(), flux.params) if convert else flux
    path = save(state, tmp_path / "flux.safetensors")
    with pytest.raises(FluxIRError, match="is not flux-schnell: it has guidance_in") as error:
        inspect(tiny_spec(), "transformer", path, "FLUX_SCHNELL")
    assert str(path) in error.value.message
    assert "FLUX_SCHNELL" in error.value.message
    assert error.value.hint == "set FLUX_SCHNELL to the weights of flux-schnell, or unset it"


def test_weights_without_guidance_are_refused_for_dev(tmp_path, tiny_spec, tiny_flux, save):
    path = save(tiny_flux(), tmp_path / "flux.safetensors")
    with pytest.raises(FluxIRError, match="is not flux-dev: it lacks guidance_in") as error:
        inspect(tiny_spec(guidance=True), "transformer", path, "--checkpoint")
    assert error.value.hint == "pass the weights of flux-dev with --checkpoint"


def test_error_names_the_models_that_the_file_looks_like(tmp_path, save):
    # The family shows in two tensors, so nothing of full size is needed.
    state = {
        "img_in.weight": torch.zeros(3072, 64, dtype=torch.float8_e4m3fn),
        "guidance_in.in_layer.weight": torch.zeros(1),
    }
    path = save(state, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(FluxIRError, match="looks like flux-dev or flux-dev-krea") as error:
        inspect(MODELS["flux-schnell"], "transformer", path, "--checkpoint")
    assert error.value.hint.startswith("--model flux-dev or --model flux-dev-krea or ")


def test_variants_with_other_inputs_are_told_by_their_channels(tmp_path, tiny_spec, flux_state, save):
    flux_state["img_in.weight"] = torch.zeros(64, 384)
    path = save(flux_state, tmp_path / "fill.safetensors")
    with pytest.raises(FluxIRError, match=r"is FLUX\.1 Fill, .* \(384 latent channels, not 64\)") as error:
        inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert "--init_image" in error.value.hint


def test_weights_of_another_size_are_refused(tmp_path, tiny_spec, flux_state, save):
    spec = tiny_spec()
    wider = replace(spec, flux=replace(spec.flux, hidden_size=128, axes_dim=(8, 12, 12)))
    path = save(flux_state, tmp_path / "flux.safetensors")
    with pytest.raises(FluxIRError, match="its hidden size is 64, not 128"):
        inspect(wider, "transformer", path, "--checkpoint")


def test_autoencoder_given_as_transformer_and_the_other_way_round(
    tmp_path, tiny_spec, tiny_flux, tiny_autoencoder, save
):
    flux, ae = save(tiny_flux(), tmp_path / "f.safetensors"), save(tiny_autoencoder(), tmp_path / "a.safetensors")
    with pytest.raises(FluxIRError, match="must hold the transformer of flux-schnell: it holds a FLUX autoencoder"):
        inspect(tiny_spec(), "transformer", ae, "--checkpoint")
    with pytest.raises(FluxIRError, match="must hold the autoencoder of flux-schnell: it holds a FLUX transformer"):
        inspect(tiny_spec(), "autoencoder", flux, "--ae_checkpoint")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("text_model.final_layer_norm.bias", "a text encoder"),
        ("encoder.block.0.layer.0.layer_norm.weight", "a text encoder"),
        ("double_blocks.0.processor.qkv_lora1.up.weight", "a LoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1", "a LoRA|a LoKr"),
        ("lycoris_double_blocks_0_img_attn_qkv.lokr_w1", "a LoKr, which is not a whole network"),
        ("lycoris_double_blocks_0_img_attn_qkv.hada_w1_a", "a LoHa"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "the transformer of Stable Diffusion 3"),
        ("model.diffusion_model.input_blocks.0.0.weight", "the transformer of Stable Diffusion or SDXL"),
        ("double_stream_modulation_img.lin.weight", r"the transformer of FLUX\.2"),
        ("conv1.weight", r"1 tensors of something else \(conv1\.weight\)"),
    ],
)
def test_other_networks_are_called_what_they_are(tmp_path, tiny_spec, save, name, what):
    path = save({name: torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FluxIRError, match=f"it holds {what}"):
        inspect(tiny_spec(), "transformer", path, "--checkpoint")


def test_missing_and_unexpected_tensors_are_counted_and_listed(tmp_path, tiny_spec, flux_state, save):
    for layer in ("linear1", "linear2"):
        for leaf in ("weight", "bias"):
            del flux_state[f"single_blocks.2.{layer}.{leaf}"]
    flux_state["double_blocks.2.img_mod.lin.bias"] = torch.zeros(3)
    path = save(flux_state, tmp_path / "flux.safetensors")
    with pytest.raises(FluxIRError) as error:
        inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert "it lacks 4 (single_blocks.2.linear1.weight, single_blocks.2.linear1.bias, " in error.value.message
    assert ", ...)" in error.value.message
    assert "it has 1 (double_blocks.2.img_mod.lin.bias) too many" in error.value.message


def test_wrong_shape_is_shown_beside_the_right_one(tmp_path, tiny_spec, flux_state, save):
    flux_state["txt_in.weight"] = torch.zeros(64, 41)
    flux_state["txt_in.bias"] = torch.zeros(65)
    path = save(flux_state, tmp_path / "flux.safetensors")
    with pytest.raises(
        FluxIRError, match=r"txt_in\.weight must have the shape \(64, 40\) and has \(64, 41\); 1 more differ"
    ):
        inspect(tiny_spec(), "transformer", path, "--checkpoint")


def test_shape_of_one_part_of_a_fused_tensor_is_checked(tmp_path, tiny_spec, tiny_flux, save):
    flux = tiny_flux()
    state = to_diffusers(flux.state_dict(), flux.params)
    state["single_transformer_blocks.0.proj_mlp.weight"] = torch.zeros(255, 64)
    path = save(state, tmp_path / "flux.safetensors")
    with pytest.raises(FluxIRError, match=r"proj_mlp\.weight must have the shape \(256, 64\) and has \(255, 64\)"):
        inspect(tiny_spec(), "transformer", path, "--checkpoint")


@pytest.mark.parametrize(
    ("key", "value"), [("scaling_factor", 1.5305), ("shift_factor", 0.0609), ("norm_num_groups", 32)]
)
def test_autoencoder_of_another_family_is_told_by_its_factors(tmp_path, tiny_spec, tiny_autoencoder, save, key, value):
    ae = tiny_autoencoder()
    path = save(to_diffusers(ae.state_dict(), ae.params), tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspect(tiny_spec(), "autoencoder", path, "--ae_checkpoint")
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(FluxIRError, match=f"is not the autoencoder of flux-schnell: its {key} is {value}, not"):
        inspect(tiny_spec(), "autoencoder", path, "--ae_checkpoint")


def test_damaged_file_in_the_cache_is_said_to_be_fetched_again(tmp_path, tiny_spec, flux_state, save):
    del flux_state["txt_in.bias"]
    path = save(flux_state, tmp_path / "flux.safetensors")
    with pytest.raises(FluxIRError) as error:
        inspect(tiny_spec(), "transformer", path, "the hub's cache")
    assert error.value.hint == "delete the file and let it be fetched again"


def test_the_autoencoder_in_another_models_file_never_passes(tmp_path, tiny_spec, tiny_autoencoder, save):
    state = {f"first_stage_model.{name}": tensor for name, tensor in tiny_autoencoder().state_dict().items()}
    state["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"] = torch.zeros(4, 4)
    path = save(state, tmp_path / "sd3.safetensors")
    with pytest.raises(
        FluxIRError, match="must hold the autoencoder of flux-schnell: it holds that of Stable Diffusion 3"
    ):
        inspect(tiny_spec(), "autoencoder", path, "--ae_checkpoint")


def test_autoencoders_with_other_latents_are_called_so(tmp_path, tiny_spec, tiny_autoencoder, save):
    state = dict(tiny_autoencoder().state_dict()) | {"decoder.conv_in.weight": torch.zeros(64, 4, 3, 3)}
    path = save(state | {"quant_conv.weight": torch.zeros(8, 8, 1, 1)}, tmp_path / "sdxl_vae.safetensors")
    with pytest.raises(
        FluxIRError, match=r"its latents have 4 channels, not 16 .as those of Stable Diffusion and SDXL"
    ):
        inspect(tiny_spec(), "autoencoder", path, "--ae_checkpoint")


def test_chroma_is_not_called_flux(tmp_path, tiny_spec, flux_state, save):
    flux_state["distilled_guidance_layer.in_proj.weight"] = torch.zeros(4, 4)
    path = save(flux_state, tmp_path / "chroma.safetensors")
    with pytest.raises(FluxIRError, match=r"it holds that of Chroma, which was made of FLUX.1") as error:
        inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert error.value.hint == "pass the weights of flux-schnell with --checkpoint"


def test_quantised_weights_are_called_so_before_their_shapes_are_looked_at(tmp_path, tiny_spec, flux_state, save):
    flux_state["img_in.weight"] = torch.zeros(64 * 32, 1, dtype=torch.uint8)
    path = save(flux_state, tmp_path / "nf4.safetensors")
    with pytest.raises(
        FluxIRError, match=r"holds quantised weights, .* 1 tensors of type U8, first img_in.weight"
    ) as error:
        inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert error.value.hint == f"pass the weights of flux-schnell with --checkpoint, in {READABLE}"
