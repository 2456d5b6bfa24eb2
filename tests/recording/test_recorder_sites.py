"""Every site against a forward written out by hand."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import transformer_of
from flux_ir.models.registry import get_spec, model_names
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sites import Site
from tests.recording.listeners import IMG_TOKENS, TXT_TOKENS, every_site, hooks_on


def forward_by_hand(model, inputs):
    """Every site of the network from its weights alone: {site: value}, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    params = model.params
    heads, width = params.num_heads, params.hidden_size
    inputs = type(inputs)(*(None if value is None else value.double() for value in inputs))

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def silu(x):
        return x / (1 + torch.exp(-x))

    def embed(t):
        frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128).float().double()
        angles = 1000 * t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def embedder(name, x):
        return linear(f"{name}.out_layer", silu(linear(f"{name}.in_layer", x)))

    def split_heads(x):  # b n (heads d) -> b heads n d
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def rms(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[scale]

    positions = torch.cat([inputs.txt_ids, inputs.img_ids], 1)
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

    def joined_heads(x):  # b heads n d -> b n (heads d)
        return x.transpose(1, 2).flatten(2)

    def attend(q, k, v):
        logits = rope(q) @ rope(k).transpose(-1, -2) / (width // heads) ** 0.5
        return joined_heads(logits.softmax(-1) @ v)

    vec = embedder("time_in", embed(inputs.timesteps)) + embedder("vector_in", inputs.y)
    if params.guidance_embed:
        vec = vec + embedder("guidance_in", embed(inputs.guidance))
    x = {"img": linear("img_in", inputs.img), "txt": linear("txt_in", inputs.txt)}
    sites = {}

    for i in range(params.depth):
        block = f"double_blocks.{i}"
        mods, qkv = {}, {}
        for s in ("img", "txt"):
            mods[s] = linear(f"{block}.{s}_mod.lin", silu(vec))[:, None].chunk(6, -1)
            shift, scale = mods[s][:2]
            q, k, v = map(split_heads, linear(f"{block}.{s}_attn.qkv", norm(x[s]) * (1 + scale) + shift).chunk(3, -1))
            q = rms(q, f"{block}.{s}_attn.norm.query_norm.scale")
            k = rms(k, f"{block}.{s}_attn.norm.key_norm.scale")
            qkv[s] = q, k, v
        q, k, v = (torch.cat([of_txt, of_img], 2) for of_img, of_txt in zip(*qkv.values(), strict=True))
        joint = attend(q, k, v)
        for part, value in (("q", joined_heads(rope(q))), ("k", joined_heads(rope(k)))):
            sites[f"double.{i}.{part}"] = value
            sites[f"double.{i}.txt.{part}"] = value[:, :TXT_TOKENS]
            sites[f"double.{i}.img.{part}"] = value[:, TXT_TOKENS:]
        attended = {"txt": joint[:, :TXT_TOKENS], "img": joint[:, TXT_TOKENS:]}
        for s in ("img", "txt"):
            _, _, gate_1, shift, scale, gate_2 = mods[s]
            name = f"double.{i}.{s}"
            sites[f"{name}.attn"] = linear(f"{block}.{s}_attn.proj", attended[s])
            middle = x[s] + gate_1 * sites[f"{name}.attn"]
            sites[f"{name}.neurons"] = gelu(linear(f"{block}.{s}_mlp.0", norm(middle) * (1 + scale) + shift))
            sites[f"{name}.mlp"] = linear(f"{block}.{s}_mlp.2", sites[f"{name}.neurons"])
            sites[f"{name}.update"] = gate_1 * sites[f"{name}.attn"] + gate_2 * sites[f"{name}.mlp"]
            x[s] = sites[name] = x[s] + sites[f"{name}.update"]

    joined = torch.cat([x["txt"], x["img"]], 1)
    for i in range(params.depth_single_blocks):
        block, name = f"single_blocks.{i}", f"single.{i}"
        shift, scale, gate = linear(f"{block}.modulation.lin", silu(vec))[:, None].chunk(3, -1)
        hidden = linear(f"{block}.linear1", norm(joined) * (1 + scale) + shift)
        q, k, v = map(split_heads, hidden[..., : 3 * width].chunk(3, -1))
        q, k = rms(q, f"{block}.norm.query_norm.scale"), rms(k, f"{block}.norm.key_norm.scale")
        whole = {".neurons": gelu(hidden[..., 3 * width :]), ".attn": attend(q, k, v)}
        whole |= {".q": joined_heads(rope(q)), ".k": joined_heads(rope(k))}
        whole[".out"] = linear(f"{block}.linear2", torch.cat([whole[".attn"], whole[".neurons"]], -1))
        whole[".update"] = gate * whole[".out"]
        joined = whole[""] = joined + whole[".update"]
        for part, value in whole.items():
            sites[f"{name}{part}"] = value
            sites[f"{name}.txt{part}"] = value[:, :TXT_TOKENS]
            sites[f"{name}.img{part}"] = value[:, TXT_TOKENS:]
    return {Site.parse(name): value for name, value in sites.items()}


@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_site_is_what_the_equations_say(tiny_flux, tiny_inputs, batch, guidance):
    model, inputs = tiny_flux(guidance=guidance is not None), tiny_inputs(batch=batch, guidance=guidance)
    sink = MemorySink()
    with Recorder(model, every_site(model), sink):
        model(*inputs)
    expected = forward_by_hand(model, inputs)
    assert {site for _, site in sink.values} == set(expected) == set(every_site(model))
    for (_, site), value in sink.values.items():
        assert value.shape == expected[site].shape, str(site)
        torch.testing.assert_close(value.double(), expected[site], atol=1e-4, rtol=1e-4, msg=str(site))
    # no two sites of the same shape are so alike that a mix-up could pass
    flat = [value.double().flatten() for value in expected.values() if value.shape == (batch, IMG_TOKENS, 64)]
    assert min((a - b).abs().max() for i, a in enumerate(flat) for b in flat[:i]) > 1e-2


@pytest.mark.parametrize("name", model_names())
def test_every_site_has_its_module_in_every_model_of_the_registry(name):
    """On the meta device: the published networks without their weights."""
    params = get_spec(name).flux
    with torch.device("meta"):
        model = transformer_of(params)
    sites = every_site(model)
    assert len(sites) == 16 * params.depth + 21 * params.depth_single_blocks
    recorder = Recorder(model, sites, MemorySink())
    with pytest.raises(FluxIRError, match="saw no forward"), recorder:
        assert hooks_on(model) > len(sites)
    assert hooks_on(model) == 0
