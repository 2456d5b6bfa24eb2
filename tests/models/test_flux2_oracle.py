"""FLUX.2's networks against diffusers' on the same random weights: the same outputs both ways, the same names."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

from flux_ir.models.checkpoints.keymap import diffusers_parts, from_diffusers, to_diffusers
from flux_ir.models.flux2.autoencoder import Flux2AutoEncoder, Flux2AutoEncoderParams
from flux_ir.models.flux2.transformer import Flux2, Flux2Params
from flux_ir.sampling.latents import pack

KLEIN_4B = Flux2Params(128, 7680, 3072, 24, 5, 20, guidance_embed=False)
DEV = Flux2Params(128, 15360, 6144, 48, 8, 48, guidance_embed=True)
AUTOENCODER = Flux2AutoEncoderParams(256, 3, 128, 3, (1, 2, 4, 4), 2, 32)


def their_transformer(params):
    return Flux2Transformer2DModel(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.head_dim,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        mlp_ratio=params.mlp_ratio,
        axes_dims_rope=params.axes_dim,
        rope_theta=params.theta,
        guidance_embeds=params.guidance_embed,
    ).eval()


def their_velocity(theirs, inputs, cond=None, cond_ids=None):
    """Times go in as flow times: the factor 1000 is applied inside, as it is in ours."""
    img, img_ids = inputs.img, inputs.img_ids
    if cond is not None:
        img, img_ids = torch.cat([img, cond], dim=1), torch.cat([img_ids, cond_ids], dim=1)
    velocity = theirs(
        hidden_states=img,
        encoder_hidden_states=inputs.txt,
        timestep=inputs.timesteps,
        img_ids=img_ids,
        txt_ids=inputs.txt_ids,
        guidance=inputs.guidance,
        return_dict=False,
    )[0]
    return velocity[:, : inputs.img.shape[1]]


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture(params=[None, 4.0], ids=["klein", "dev"])
def guidance(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["alone", "with references"])
def references(request, tiny_references):
    return tiny_references(batch=2) if request.param else (None, None)


@torch.no_grad()
def test_our_transformer_agrees_once_converted(tiny_flux2, tiny_flux2_inputs, guidance, references):
    flux = tiny_flux2(guidance=guidance is not None)
    theirs = their_transformer(flux.params)
    theirs.load_state_dict(to_diffusers(flux.state_dict(), flux.params), strict=True)
    inputs = tiny_flux2_inputs(batch=2, guidance=guidance)
    velocity = flux(*inputs, *references)
    assert velocity.shape == inputs.img.shape
    torch.testing.assert_close(velocity, their_velocity(theirs, inputs, *references), rtol=0, atol=1e-5)


@torch.no_grad()
def test_their_transformer_agrees_once_converted(tiny_flux2, tiny_flux2_inputs, guidance, references):
    params = tiny_flux2(guidance=guidance is not None).params
    torch.manual_seed(0)
    theirs = their_transformer(params)
    flux = Flux2(params).eval()
    state = from_diffusers(theirs.state_dict(), shapes(flux), params)
    flux.load_state_dict(state, strict=True)
    inputs = tiny_flux2_inputs(batch=2, guidance=guidance)
    expected = their_velocity(theirs, inputs, *references)
    torch.testing.assert_close(flux(*inputs, *references), expected, rtol=0, atol=1e-5)
    back = to_diffusers(state, params)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@torch.no_grad()
def test_every_block_agrees(tiny_flux2, tiny_flux2_inputs):
    flux, seen = tiny_flux2(), {}
    theirs = their_transformer(flux.params)
    theirs.load_state_dict(to_diffusers(flux.state_dict(), flux.params), strict=True)
    for ours, other in zip(
        [*flux.double_blocks, *flux.single_blocks],
        [*theirs.transformer_blocks, *theirs.single_transformer_blocks],
        strict=True,
    ):
        ours.register_forward_hook(lambda block, _, out: seen.update({block: out}))
        # Theirs put out text first.
        other.register_forward_hook(lambda _, __, out, ours=ours: seen.update({("theirs", ours): out}))
    inputs = tiny_flux2_inputs(batch=2)
    flux(*inputs)
    their_velocity(theirs, inputs)
    for block in flux.double_blocks:
        img, txt = seen[block]
        torch.testing.assert_close((txt, img), seen["theirs", block], rtol=0, atol=1e-5)
    for block in flux.single_blocks:
        torch.testing.assert_close(seen[block], seen["theirs", block], rtol=0, atol=1e-5)


@pytest.mark.parametrize("params", [KLEIN_4B, DEV], ids=["klein-4b", "dev"])
def test_full_size_names_and_shapes_are_theirs(params):
    with torch.device("meta"):
        ours, theirs = shapes(Flux2(params)), shapes(their_transformer(params))
    stored = {
        name: shape
        for our_name, parts in diffusers_parts(ours, params).items()
        for name, shape in zip(parts.names, parts.shapes(ours[our_name]), strict=True)
    }
    assert stored == theirs


def their_autoencoder(params):
    levels = len(params.ch_mult)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(params.ch * mult for mult in params.ch_mult),
        layers_per_block=params.num_res_blocks,
        latent_channels=params.z_channels,
        norm_num_groups=params.norm_groups,
    ).eval()


@pytest.fixture
def picture():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def their_statistics(theirs):
    """As the pipeline reads them: mean and standard deviation, [1, channels, 1, 1]."""
    mean, variance = theirs.bn.running_mean, theirs.bn.running_var
    return mean.view(1, -1, 1, 1), torch.sqrt(variance.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)


def assert_same_autoencoder(ours, theirs, picture):
    """Also the order of a token's numbers: the pipeline normalises 2 x 2 patches, and packs them afterwards."""
    mean, std = their_statistics(theirs)
    patches = Flux2KleinPipeline._patchify_latents(theirs.encode(picture).latent_dist.mode())
    z = ours.encode(picture)
    expected = Flux2KleinPipeline._pack_latents((patches - mean) / std)
    torch.testing.assert_close(pack(z), expected, rtol=0, atol=1e-5)
    own_units = Flux2KleinPipeline._unpatchify_latents(Flux2KleinPipeline._patchify_latents(z) * std + mean)
    torch.testing.assert_close(ours.decode(z), theirs.decode(own_units).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_our_autoencoder_agrees_once_converted(tiny_flux2_autoencoder, picture):
    ours = tiny_flux2_autoencoder()
    theirs = their_autoencoder(ours.params)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.params), strict=True)
    assert_same_autoencoder(ours, theirs, picture)


@torch.no_grad()
def test_their_autoencoder_agrees_once_converted(tiny_flux2_autoencoder, picture):
    params = tiny_flux2_autoencoder().params
    torch.manual_seed(0)
    theirs = their_autoencoder(params)
    theirs.bn.running_mean.normal_()
    theirs.bn.running_var.uniform_(0.5, 1.5)
    ours = Flux2AutoEncoder(params).eval()
    state = from_diffusers(theirs.state_dict(), shapes(ours), params)
    ours.load_state_dict(state, strict=True)
    assert_same_autoencoder(ours, theirs, picture)
    back = to_diffusers(state, params)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_full_size_autoencoder_has_their_names_and_shapes():
    with torch.device("meta"):
        ours, theirs = shapes(Flux2AutoEncoder(AUTOENCODER)), shapes(their_autoencoder(AUTOENCODER))
    stored = {
        name: shape
        for our_name, parts in diffusers_parts(ours, AUTOENCODER).items()
        for name, shape in zip(parts.names, parts.shapes(ours[our_name]), strict=True)
    }
    assert stored == theirs
