"""Our networks against diffusers' on the same random weights: the same outputs, and its folders load as they are."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.inspect import blank_network
from flux_ir.models.checkpoints.keymap import diffusers_parts, from_diffusers, to_diffusers
from flux_ir.models.checkpoints.load import load_autoencoder, load_flux
from flux_ir.models.checkpoints.locate import locate_autoencoder, locate_transformer
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import MODELS


def their_transformer(params):
    return FluxTransformer2DModel(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.head_dim,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed,
        axes_dims_rope=params.axes_dim,
    ).eval()


def their_autoencoder(params):
    levels = len(params.ch_mult)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(params.ch * mult for mult in params.ch_mult),
        layers_per_block=params.num_res_blocks,
        latent_channels=params.z_channels,
        norm_num_groups=params.norm_groups,
        scaling_factor=params.scale_factor,
        shift_factor=params.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def their_velocity(theirs, inputs):
    """Times go in as flow times: the factor 1000 is applied inside, as it is in ours."""
    return theirs(
        hidden_states=inputs.img,
        encoder_hidden_states=inputs.txt,
        pooled_projections=inputs.y,
        timestep=inputs.timesteps,
        img_ids=inputs.img_ids[0],
        txt_ids=inputs.txt_ids[0],
        guidance=inputs.guidance,
        return_dict=False,
    )[0]


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("guidance", [None, 2.5])
@torch.no_grad()
def test_our_transformer_agrees_once_converted(tiny_flux, tiny_inputs, guidance):
    flux = tiny_flux(guidance=guidance is not None)
    theirs = their_transformer(flux.params)
    theirs.load_state_dict(to_diffusers(flux.state_dict(), flux.params), strict=True)
    inputs = tiny_inputs(batch=2, guidance=guidance)
    torch.testing.assert_close(flux(*inputs), their_velocity(theirs, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [None, 2.5])
@torch.no_grad()
def test_their_transformer_agrees_once_converted(tiny_flux, tiny_inputs, guidance):
    params = tiny_flux(guidance=guidance is not None).params
    torch.manual_seed(0)
    theirs = their_transformer(params)
    flux = Flux(params).eval()
    state = from_diffusers(theirs.state_dict(), shapes(flux), params)
    flux.load_state_dict(state, strict=True)
    inputs = tiny_inputs(batch=2, guidance=guidance)
    torch.testing.assert_close(flux(*inputs), their_velocity(theirs, inputs), rtol=0, atol=1e-5)
    back = to_diffusers(state, params)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.fixture
def picture():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_same_autoencoder(ours, theirs, picture):
    scale, shift = ours.params.scale_factor, ours.params.shift_factor
    z = ours.encode(picture)
    torch.testing.assert_close(z, scale * (theirs.encode(picture).latent_dist.mean - shift), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z / scale + shift).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_our_autoencoder_agrees_once_converted(tiny_autoencoder, picture):
    ours = tiny_autoencoder()
    theirs = their_autoencoder(ours.params)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.params), strict=True)
    assert_same_autoencoder(ours, theirs, picture)


@torch.no_grad()
def test_their_autoencoder_agrees_once_converted(tiny_autoencoder, picture):
    params = tiny_autoencoder().params
    torch.manual_seed(0)
    theirs = their_autoencoder(params)
    ours = AutoEncoder(params).eval()
    state = from_diffusers(theirs.state_dict(), shapes(ours), params)
    ours.load_state_dict(state, strict=True)
    assert_same_autoencoder(ours, theirs, picture)
    back = to_diffusers(state, params)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("model", ["flux-schnell", "flux-dev"])
@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_full_size_names_and_shapes_are_theirs(model, part):
    ours = blank_network(MODELS[model], part)
    with torch.device("meta"):
        theirs = (their_transformer if part == "transformer" else their_autoencoder)(ours.params)
    our_shapes = shapes(ours)
    stored = {
        name: shape
        for our_name, parts in diffusers_parts(our_shapes, ours.params).items()
        for name, shape in zip(parts.names, parts.shapes(our_shapes[our_name]), strict=True)
    }
    assert stored == shapes(theirs)


@pytest.mark.parametrize("shard_size", ["1GB", "400KB"])
@torch.no_grad()
def test_folder_that_diffusers_saved_is_loaded(tmp_path, tiny_spec, tiny_inputs, tiny_autoencoder, picture, shard_size):
    spec = tiny_spec()
    torch.manual_seed(0)
    transformer, autoencoder = their_transformer(spec.flux), their_autoencoder(spec.autoencoder)
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    autoencoder.save_pretrained(tmp_path / "vae", max_shard_size=shard_size)
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == (shard_size == "400KB")
    flux = load_flux(spec, locate_transformer(spec, tmp_path), "cpu", torch.float32)
    torch.testing.assert_close(flux(*tiny_inputs()), their_velocity(transformer, tiny_inputs()), rtol=0, atol=1e-5)
    ours = load_autoencoder(spec, locate_autoencoder(spec, checkpoint=tmp_path), "cpu")
    assert_same_autoencoder(ours, autoencoder, picture)


def test_configuration_that_diffusers_saved_is_read(tmp_path, tiny_spec):
    spec = tiny_spec()
    their_autoencoder(spec.autoencoder).save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))
    with pytest.raises(FluxIRError, match=r"its scaling_factor is 0\.18215, not 0\.3611"):
        locate_autoencoder(spec, tmp_path)
