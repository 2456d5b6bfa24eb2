"""FLUX.2 recorded and changed at the same sites as FLUX.1, and every site against the equations written out by hand."""

import pytest
import torch

from flux_ir.models.architecture import Transformer
from flux_ir.recording.intervention import Intervention
from flux_ir.recording.recorder import Recorder
from flux_ir.sites import Site, all_sites
from tests.recording.listeners import hooks_on

TXT, IMG, COND = 7, 12, 11


def every_site(model, *, cond=False):
    return all_sites(model.params.depth, model.params.depth_single_blocks, cond=cond)


def forward_by_hand(model, inputs, cond, cond_ids):
    """Every site of the network from its weights alone: {site: value}, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    params = model.params
    heads, width = params.num_heads, params.hidden_size
    inputs = type(inputs)(*(None if value is None else value.double() for value in inputs))

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(x):
        return x / (1 + torch.exp(-x))

    def swiglu(x):
        half = x.shape[-1] // 2
        return silu(x[..., :half]) * x[..., half:]

    def embedder(name, t):
        frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128).float().double()
        angles = 1000 * t[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return linear(f"{name}.out_layer", silu(linear(f"{name}.in_layer", waves)))

    def split_heads(x):  # b n (heads d) -> b heads n d
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def joined_heads(x):
        return x.transpose(1, 2).flatten(2)

    def rms(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[scale]

    positions = torch.cat([inputs.txt_ids, inputs.img_ids, cond_ids.double()], 1)
    angles = torch.cat(
        [
            positions[..., axis, None] * params.theta ** (-torch.arange(0, dim, 2).double() / dim)
            for axis, dim in enumerate(params.axes_dim)
        ],
        -1,
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rope(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def attend(q, k, v):
        logits = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
        return joined_heads(logits.softmax(-1) @ v)

    streams = {"txt": slice(0, TXT), "img": slice(TXT, TXT + IMG), "cond": slice(TXT + IMG, TXT + IMG + COND)}
    sites = {}

    def keep(name, whole, part=""):
        """A value of all tokens in one sequence, and each stream's share of it."""
        sites[f"{name}{part}"] = whole[:, : TXT + IMG]
        for stream, rows in streams.items():
            sites[f"{name}.{stream}{part}"] = whole[:, rows]

    vec = embedder("time_in", inputs.timesteps)
    if params.guidance_embed:
        vec = vec + embedder("guidance_in", inputs.guidance)
    x = {
        "img": linear("img_in", torch.cat([inputs.img, cond.double()], 1)),
        "txt": linear("txt_in", inputs.txt),
    }
    mods = {s: linear(f"double_stream_modulation_{s}.lin", silu(vec))[:, None].chunk(6, -1) for s in x}

    for i in range(params.depth):
        block, qkv = f"double_blocks.{i}", {}
        for s in ("txt", "img"):
            shift, scale = mods[s][:2]
            q, k, v = map(split_heads, linear(f"{block}.{s}_attn.qkv", norm(x[s]) * (1 + scale) + shift).chunk(3, -1))
            q = rms(q, f"{block}.{s}_attn.norm.query_norm.scale")
            k = rms(k, f"{block}.{s}_attn.norm.key_norm.scale")
            qkv[s] = q, k, v
        q, k, v = (torch.cat(pair, 2) for pair in zip(*qkv.values(), strict=True))
        q, k = rope(q), rope(k)
        joint = attend(q, k, v)
        keep(f"double.{i}", joined_heads(q), ".q")
        keep(f"double.{i}", joined_heads(k), ".k")
        attended = {"txt": joint[:, :TXT], "img": joint[:, TXT:]}
        for s in ("img", "txt"):
            _, _, gate_1, shift, scale, gate_2 = mods[s]
            attn = linear(f"{block}.{s}_attn.proj", attended[s])
            middle = x[s] + gate_1 * attn
            neurons = swiglu(linear(f"{block}.{s}_mlp.0", norm(middle) * (1 + scale) + shift))
            mlp = linear(f"{block}.{s}_mlp.2", neurons)
            update = gate_1 * attn + gate_2 * mlp
            x[s] = x[s] + update
            named = {".attn": attn, ".neurons": neurons, ".mlp": mlp, ".update": update, "": x[s]}
            for part, value in named.items():
                sites[f"double.{i}.{s}{part}"] = value[:, :IMG] if s == "img" else value
                if s == "img":
                    sites[f"double.{i}.cond{part}"] = value[:, IMG:]

    joined = torch.cat([x["txt"], x["img"]], 1)
    shift, scale, gate = linear("single_stream_modulation.lin", silu(vec))[:, None].chunk(3, -1)
    for i in range(params.depth_single_blocks):
        block = f"single_blocks.{i}"
        hidden = linear(f"{block}.linear1", norm(joined) * (1 + scale) + shift)
        q, k, v = map(split_heads, hidden[..., : 3 * width].chunk(3, -1))
        q, k = rope(rms(q, f"{block}.norm.query_norm.scale")), rope(rms(k, f"{block}.norm.key_norm.scale"))
        attn, neurons = attend(q, k, v), swiglu(hidden[..., 3 * width :])
        out = linear(f"{block}.linear2", torch.cat([attn, neurons], -1))
        joined = joined + gate * out
        named = {".q": joined_heads(q), ".k": joined_heads(k), ".attn": attn, ".neurons": neurons, ".out": out}
        for part, value in (named | {".update": gate * out, "": joined}).items():
            keep(f"single.{i}", value, part)
    return {Site.parse(name): value for name, value in sites.items()}


def test_both_architectures_come_through_the_seam(tiny_flux, tiny_flux2):
    assert isinstance(tiny_flux(), Transformer)
    assert isinstance(tiny_flux2(), Transformer)


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_every_site_is_what_the_equations_say(tiny_flux2, tiny_flux2_inputs, tiny_references, guidance):
    model = tiny_flux2(guidance=guidance is not None)
    inputs, references = tiny_flux2_inputs(batch=2, guidance=guidance), tiny_references(batch=2)
    sites = every_site(model, cond=True)
    with Recorder(model, sites) as recorder:
        model(*inputs, *references)
    expected = forward_by_hand(model, inputs, *references)
    assert set(expected) == set(sites)
    for site in sites:
        value = recorder.sink.read(site, 0)
        assert value.shape == expected[site].shape, str(site)
        torch.testing.assert_close(value.double(), expected[site], atol=1e-4, rtol=1e-4, msg=str(site))


def test_recording_changes_no_bit_and_leaves_no_hook(tiny_flux2, tiny_flux2_inputs, tiny_references):
    model, inputs, references = tiny_flux2(), tiny_flux2_inputs(batch=2), tiny_references(batch=2)
    alone = model(*inputs, *references)
    with Recorder(model, every_site(model, cond=True)):
        assert torch.equal(model(*inputs, *references), alone)
    assert hooks_on(model) == 0


def test_edits_that_change_nothing_change_no_bit_and_others_do(tiny_flux2, tiny_flux2_inputs):
    model, inputs = tiny_flux2(), tiny_flux2_inputs()
    alone = model(*inputs)
    sites = every_site(model)
    with Intervention(model, dict.fromkeys(sites, lambda value, step: value)):
        assert torch.equal(model(*inputs), alone)
    for site in sites:
        if str(site).startswith(("double.0", "single.0")):
            with Intervention(model, {site: lambda value, step: 0 * value}):
                assert not torch.equal(model(*inputs), alone), str(site)
    assert hooks_on(model) == 0


def test_modulation_is_what_the_blocks_are_given(tiny_flux2, tiny_flux2_inputs):
    model, inputs, given = tiny_flux2(), tiny_flux2_inputs(), {}
    for name in ("double_blocks.1", "single_blocks.2"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: given.update({name: args}))
    model(*inputs)
    vec = model.conditioning(inputs.timesteps, inputs.y)
    expected = {
        "double.1.img": given["double_blocks.1"][2],
        "double.1.txt": given["double_blocks.1"][3],
        "single.2": given["single_blocks.2"][1],
    }
    for site, mods in expected.items():
        for ours, theirs in zip(model.modulation(Site.parse(site), vec), mods, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
