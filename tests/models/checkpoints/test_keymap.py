"""Our names and diffusers' names: nothing lost, nothing doubled, no bit changed."""

from dataclasses import replace

import pytest
import torch

from flux_ir.models.checkpoints.inspect import blank_network
from flux_ir.models.checkpoints.keymap import diffusers_parts, from_diffusers, to_diffusers
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import get_spec


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "part", "tensors"),
    [("flux-dev", "transformer", 1160), ("flux-schnell", "transformer", 1156), ("flux-dev", "autoencoder", 244)],
)
def test_full_size_networks_have_the_published_number_of_diffusers_names(model, part, tensors):
    network = blank_network(get_spec(model), part)
    stored = [name for parts in diffusers_parts(network.state_dict(), network.params).values() for name in parts.names]
    assert len(stored) == len(set(stored)) == tensors


@pytest.mark.parametrize("guidance", [False, True])
def test_transformer_survives_the_round_trip_bitwise(tiny_flux, guidance):
    flux = tiny_flux(guidance=guidance)
    state = flux.state_dict()
    back = from_diffusers(to_diffusers(state, flux.params), shapes(flux), flux.params)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_autoencoder_survives_the_round_trip_bitwise(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    state = autoencoder.state_dict()
    back = from_diffusers(to_diffusers(state, autoencoder.params), shapes(autoencoder), autoencoder.params)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_fused_rows_are_queries_keys_values_and_feed_forward_in_this_order(tiny_flux):
    flux = tiny_flux()
    state, stored = flux.state_dict(), to_diffusers(flux.state_dict(), flux.params)
    parts = [stored[f"single_transformer_blocks.1.{layer}.bias"] for layer in ("attn.to_q", "attn.to_k", "attn.to_v")]
    parts.append(stored["single_transformer_blocks.1.proj_mlp.bias"])
    assert torch.equal(torch.cat(parts), state["single_blocks.1.linear1.bias"])
    added = [stored[f"transformer_blocks.0.attn.add_{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(torch.cat(added), state["double_blocks.0.txt_attn.qkv.weight"])


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_last_modulation_has_its_halves_swapped(tiny_flux, leaf):
    flux = tiny_flux()
    shift, scale = flux.state_dict()[f"final_layer.adaLN_modulation.1.{leaf}"].chunk(2)
    stored = to_diffusers(flux.state_dict(), flux.params)[f"norm_out.linear.{leaf}"]
    assert torch.equal(stored, torch.cat([scale, shift]))


def test_decoder_levels_are_counted_from_the_other_end(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    state, stored = autoencoder.state_dict(), to_diffusers(autoencoder.state_dict(), autoencoder.params)
    assert torch.equal(stored["decoder.up_blocks.0.resnets.1.conv1.weight"], state["decoder.up.3.block.1.conv1.weight"])
    assert torch.equal(
        stored["encoder.down_blocks.0.downsamplers.0.conv.bias"], state["encoder.down.0.downsample.conv.bias"]
    )
    assert stored["decoder.mid_block.attentions.0.to_q.weight"].ndim == 2


def test_network_without_attention_biases_has_none_under_diffusers_names(tiny_flux_params):
    flux = Flux(replace(tiny_flux_params, qkv_bias=False))
    stored = to_diffusers(flux.state_dict(), flux.params)
    assert "transformer_blocks.0.attn.to_q.bias" not in stored
    assert "single_transformer_blocks.0.attn.to_q.bias" in stored
