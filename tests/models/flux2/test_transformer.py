"""FLUX.2's transformer: the published names, and the invariants the recorder and the lens lean on."""

import dataclasses
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from jaxtyping import TypeCheckError

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.keymap import to_diffusers
from flux_ir.models.flux2.blocks import SwiGLU
from flux_ir.recording.hooks import module_of
from flux_ir.sites import all_sites

OUTSIDE_BLOCKS = {
    "img_in.weight",
    "txt_in.weight",
    "time_in.in_layer.weight",
    "time_in.out_layer.weight",
    "guidance_in.in_layer.weight",
    "guidance_in.out_layer.weight",
    "double_stream_modulation_img.lin.weight",
    "double_stream_modulation_txt.lin.weight",
    "single_stream_modulation.lin.weight",
    "final_layer.linear.weight",
    "final_layer.adaLN_modulation.1.weight",
}
DOUBLE_BLOCK = {
    f"{stream}_{layer}"
    for stream in ("img", "txt")
    for layer in (
        "attn.qkv.weight",
        "attn.norm.query_norm.scale",
        "attn.norm.key_norm.scale",
        "attn.proj.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    )
}
SINGLE_BLOCK = {"linear1.weight", "linear2.weight", "norm.query_norm.scale", "norm.key_norm.scale"}


def test_names_are_those_of_the_published_files(tiny_flux2):
    network = tiny_flux2(guidance=True)
    expected = OUTSIDE_BLOCKS | {f"double_blocks.{i}.{name}" for i in range(2) for name in DOUBLE_BLOCK}
    expected |= {f"single_blocks.{i}.{name}" for i in range(3) for name in SINGLE_BLOCK}
    assert set(network.state_dict()) == expected


def test_diffusers_converts_a_published_file_as_we_do(tiny_flux2):
    network = tiny_flux2(guidance=True)
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(network.state_dict()))
    ours = to_diffusers(network.state_dict(), network.params)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_networks_without_guidance_have_no_guidance_embedder(tiny_flux2):
    assert tiny_flux2().guidance_in is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [None, 4.0])
def test_read_out_of_the_last_block_is_the_velocity_bit_for_bit(
    tiny_flux2, tiny_flux2_inputs, tiny_references, dtype, guidance
):
    flux = tiny_flux2(guidance=guidance is not None, dtype=dtype)
    inputs = tiny_flux2_inputs(batch=2, guidance=guidance, dtype=dtype)
    last = []
    flux.single_blocks[-1].register_forward_hook(lambda _, __, out: last.append(out))

    velocity = flux(*inputs, *tiny_references(batch=2, dtype=dtype))

    vec = flux.conditioning(inputs.timesteps, inputs.y, inputs.guidance)
    txt_tokens, img_tokens = inputs.txt.shape[1], inputs.img.shape[1]
    assert torch.equal(flux.read_out(last[0][:, txt_tokens : txt_tokens + img_tokens], vec), velocity)
    assert velocity.dtype == dtype
    assert velocity.shape == inputs.img.shape


def test_every_site_is_the_output_of_a_module_that_runs(tiny_flux2, tiny_flux2_inputs, tiny_references):
    flux, called = tiny_flux2(), set()
    for name, module in flux.named_modules():
        module.register_forward_hook(lambda _, __, ___, name=name: called.add(name))
    flux(*tiny_flux2_inputs(), *tiny_references())
    sites = all_sites(flux.params.depth, flux.params.depth_single_blocks, cond=True)
    assert {module_of(site) for site in sites} <= called


def test_blocks_share_their_modulation(tiny_flux2, tiny_flux2_inputs):
    flux, given = tiny_flux2(), []
    for block in [*flux.double_blocks, *flux.single_blocks]:
        block.register_forward_pre_hook(lambda _, args: given.append(args))
    flux(*tiny_flux2_inputs())
    double, single = given[:2], given[2:]
    assert double[0][2] is double[1][2]
    assert double[0][3] is double[1][3]
    assert len({id(args[1]) for args in single}) == 1


def test_neurons_are_gated_by_the_first_half():
    gate, value = torch.tensor([0.0, 2.0]), torch.tensor([3.0, -5.0])
    expected = torch.nn.functional.silu(gate) * value
    assert torch.equal(SwiGLU()(torch.cat([gate, value])), expected)


def test_pictures_of_a_batch_do_not_see_each_other(tiny_flux2, tiny_flux2_inputs):
    flux, inputs = tiny_flux2(), tiny_flux2_inputs(batch=2)
    together = flux(*inputs)
    alone = [flux(*(None if part is None else part[i : i + 1] for part in inputs)) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stream", ["img", "txt"])
def test_order_of_tokens_is_told_by_their_positions_alone(tiny_flux2, tiny_flux2_inputs, stream):
    flux, inputs = tiny_flux2(), tiny_flux2_inputs()
    tokens, ids = getattr(inputs, stream), getattr(inputs, f"{stream}_ids")
    order = torch.arange(tokens.shape[1]).flip(0)
    shuffled = inputs._replace(**{stream: tokens[:, order]})
    moved = shuffled._replace(**{f"{stream}_ids": ids[:, order]})
    rows = order if stream == "img" else slice(None)
    torch.testing.assert_close(flux(*moved), flux(*inputs)[:, rows], rtol=0, atol=1e-5)
    assert not torch.allclose(flux(*shuffled), flux(*inputs)[:, rows], atol=1e-3)


@pytest.mark.parametrize("argument", ["img", "txt", "timesteps", "guidance"])
def test_every_input_reaches_the_velocity(tiny_flux2, tiny_flux2_inputs, argument):
    flux, inputs = tiny_flux2(guidance=True), tiny_flux2_inputs(guidance=4.0)
    changed = inputs._replace(**{argument: getattr(inputs, argument) * 0.5})
    assert (flux(*changed) - flux(*inputs)).abs().max() > 1e-3


def test_reference_pictures_reach_the_velocity_and_are_told_apart(tiny_flux2, tiny_flux2_inputs, tiny_references):
    flux, inputs = tiny_flux2(), tiny_flux2_inputs()
    cond, cond_ids = tiny_references()
    with_them = flux(*inputs, cond, cond_ids)
    assert (with_them - flux(*inputs)).abs().max() > 1e-3
    elsewhere = cond_ids.clone()
    elsewhere[..., 0] = 10
    assert (with_them - flux(*inputs, cond, elsewhere)).abs().max() > 1e-3
    with pytest.raises(FluxIRError, match="need their positions"):
        flux(*inputs, cond)


def test_distilled_models_refuse_to_run_without_guidance(tiny_flux2, tiny_flux2_inputs):
    with pytest.raises(FluxIRError, match=r"guidance-distilled.*got None.*hint: pass a value such as 4"):
        tiny_flux2(guidance=True)(*tiny_flux2_inputs())


def test_twin_has_the_same_weights_in_the_same_memory(tiny_flux2, tiny_flux2_inputs):
    flux = tiny_flux2()
    twin = flux.twin()
    assert twin.img_in.weight.data_ptr() == flux.img_in.weight.data_ptr()
    assert torch.equal(twin(*tiny_flux2_inputs()), flux(*tiny_flux2_inputs()))


def test_positions_need_all_four_axes(tiny_flux2, tiny_flux2_inputs):
    inputs = tiny_flux2_inputs()
    with pytest.raises((TypeCheckError, IndexError)):
        tiny_flux2()(*inputs._replace(img_ids=inputs.img_ids[..., :3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 66}, "hidden_size must be a multiple of num_heads: got 66 and 4"),
        ({"axes_dim": (8, 8, 8, 8)}, "axes_dim must be even and add up to the head width 16: got (8, 8, 8, 8)"),
    ],
)
def test_shapes_that_cannot_be_are_refused(tiny_flux2_params, change, message):
    with pytest.raises(FluxIRError, match=re.escape(message)):
        dataclasses.replace(tiny_flux2_params, **change)
