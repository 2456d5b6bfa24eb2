"""LoRAs: one delta gives one network in every layout, and no file is read in part without a word."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.load import Weights, load_flux, stream_flux
from flux_ir.models.checkpoints.lora.read import read_lora, read_loras
from flux_ir.models.registry import get_spec
from tests.models.checkpoints.lora.layouts import (
    LAYOUTS,
    RANK,
    SCALE,
    Factors,
    diffusers_names,
    draw_factors,
    kohya,
    scaled,
    write,
)


def merged(base, *paths, strength=None, dtype=torch.float32):
    loras = read_loras(base.spec, paths, strength)
    return load_flux(base.spec, base.source, "cpu", dtype, loras=loras).state_dict()


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def expected(base, factors, scale=SCALE):
    """In float64: every weight with its change."""
    state = {name: tensor.double() for name, tensor in base.flux.state_dict().items()}
    for name, (up, down) in factors.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + scale * (up.double() @ down.double())
    return state


def close(state, reference):
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.double(), reference[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_delta_gives_the_same_bits_in_every_layout(base, layout, dtype):
    factors = draw_factors(base.flux, attention_only=True)
    reference = merged(base, kohya(factors, base.flux, base.path("reference")), dtype=dtype)
    path = LAYOUTS[layout](factors, base.flux, base.path("lora"))
    assert same_bits(merged(base, path, dtype=dtype), reference)
    assert not same_bits(reference, {name: one.to(dtype) for name, one in base.flux.state_dict().items()})


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "xlabs"])
def test_every_linear_layer_can_be_changed_in_every_layout_that_has_names_for_it(base, layout):
    factors = draw_factors(base.flux)
    path = LAYOUTS[layout](factors, base.flux, base.path("lora"))
    state = merged(base, path)
    assert same_bits(state, merged(base, kohya(factors, base.flux, base.path("reference"))))
    close(state, expected(base, factors))


def test_a_lora_says_which_layout_it_has(base):
    factors = draw_factors(base.flux, attention_only=True)
    layouts = {
        name: read_lora(make(factors, base.flux, base.path(name)), base.spec).layout for name, make in LAYOUTS.items()
    }
    assert layouts["kohya"] == "kohya, names of BFL"
    assert layouts["kohya_with_diffusers_names"] == "kohya, names of diffusers"
    assert layouts["diffusers"] == layouts["peft_folder"] == layouts["cut_short"] == "PEFT, names of diffusers"
    assert layouts["comfyui"] == layouts["no_prefix"] == "ComfyUI, names of BFL"
    assert layouts["xlabs"] == "XLabs"


def test_queries_and_keys_of_their_own_low_rank_are_added_to_their_rows(base):
    hidden = base.flux.params.hidden_size
    parts = {
        "single_transformer_blocks.1.attn.to_k": Factors(torch.randn(hidden, 3), torch.randn(3, hidden)),
        "single_transformer_blocks.1.proj_mlp": Factors(torch.randn(4 * hidden, 2), torch.randn(2, hidden)),
    }
    state = merged(base, write(parts, base.path("lora"), prefix="transformer."))
    weight, before = (of["single_blocks.1.linear1.weight"] for of in (state, base.flux.state_dict()))
    k, mlp = (up @ down for up, down in parts.values())
    torch.testing.assert_close(weight - before, torch.cat([0 * k, k, 0 * k, mlp]), atol=1e-5, rtol=1e-5)
    assert torch.equal(weight[:hidden], before[:hidden])
    assert torch.equal(weight[2 * hidden : 3 * hidden], before[2 * hidden : 3 * hidden])


def test_strength_scales_the_change_and_zero_changes_no_bit(base):
    factors = draw_factors(base.flux)
    path = kohya(factors, base.flux, base.path("lora"))
    assert same_bits(merged(base, path, strength=0), base.flux.state_dict())
    close(merged(base, path, strength=-1.5), expected(base, factors, scale=-1.5 * SCALE))


def test_several_are_summed_in_float32_and_rounded_once(base):
    first, second = draw_factors(base.flux), draw_factors(base.flux, seed=4)
    paths = [kohya(f, base.flux, base.path(name)) for f, name in ((first, "first"), (second, "second"))]
    both = merged(base, *paths, strength=[0.5, 2.0])
    reference = expected(base, first, scale=0.5 * SCALE)
    for name, (up, down) in second.items():
        reference[f"{name}.weight"] += 2 * SCALE * (up.double() @ down.double())
    close(both, reference)
    rounded = merged(base, *paths, strength=[0.5, 2.0], dtype=torch.bfloat16)
    assert same_bits(rounded, {name: one.to(torch.bfloat16) for name, one in both.items()})


def test_weights_are_merged_wherever_they_are_read_into(base):
    loras = read_loras(base.spec, kohya(draw_factors(base.flux), base.flux, base.path("lora")))
    weights, name = Weights(base.flux, base.source, loras), "double_blocks.0.img_attn.qkv.weight"
    target = torch.empty(base.flux.state_dict()[name].shape)
    weights.read_into(target, name)
    assert torch.equal(target, load_flux(base.spec, base.source, "cpu", torch.float32, loras=loras).state_dict()[name])


def test_streamed_blocks_are_those_of_the_loaded_network(base, tiny_inputs):
    loras = read_loras(base.spec, kohya(draw_factors(base.flux), base.flux, base.path("lora")))
    loaded = load_flux(base.spec, base.source, "cpu", torch.float32, loras=loras)
    streamed = stream_flux(base.spec, base.source, "cpu", torch.float32, loras=loras)
    with torch.no_grad():
        assert torch.equal(streamed(*tiny_inputs()), loaded(*tiny_inputs()))


# ---- What files say of their scale


def test_settings_of_single_layers_come_before_those_of_all(base):
    factors = {
        "double_blocks.0.img_attn.proj": Factors(torch.randn(64, 4), torch.randn(4, 64)),
        "double_blocks.1.img_attn.proj": Factors(torch.randn(64, 2), torch.randn(2, 64)),
    }
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {"transformer_blocks.1.attn.to_out.0": 2},
                "alpha_pattern": {r"transformer_blocks\.1\..*": 6}}  # fmt: skip
    path = write(diffusers_names(factors, base.flux), base.path("lora"), prefix="transformer.",
                 metadata={"lora_adapter_metadata": json.dumps(settings)})  # fmt: skip
    scales = {layer.target.weight: layer.scale for layer in read_lora(path, base.spec).all_layers}
    assert scales == {"double_blocks.0.img_attn.proj.weight": 2.0, "double_blocks.1.img_attn.proj.weight": 3.0}
    settings["use_rslora"] = True
    path = write(diffusers_names(factors, base.flux), base.path("lora"), prefix="transformer.",
                 metadata={"lora_adapter_metadata": json.dumps(settings)})  # fmt: skip
    assert {layer.scale for layer in read_lora(path, base.spec).all_layers} == {4.0, 6 / math.sqrt(2)}


def test_settings_of_another_rank_than_the_tensors_are_refused(base):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8})}
    named = diffusers_names(draw_factors(base.flux), base.flux)
    path = write(named, base.path("lora"), prefix="transformer.", metadata=metadata)
    with pytest.raises(FluxIRError, match="has rank 4, and the file's own settings say 8"):
        read_lora(path, base.spec)


# ---- Norms of its own, and other products


def one_layer(base, tensors, name="double_blocks.1.img_attn.qkv"):
    path = base.path("lora")
    save_file({f"lora_unet_{name.replace('.', '_')}.{leaf}": tensor for leaf, tensor in tensors.items()}, path)
    before = base.flux.state_dict()[f"{name}.weight"].double()
    return path, before, f"{name}.weight"


@pytest.mark.parametrize("axis", ["rows", "a vector of rows", "columns"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_brings_the_changed_weight_to_its_norms(base, axis, strength):
    up, down = 0.1 * torch.randn(192, 4), torch.randn(4, 64)
    norms = {"rows": torch.rand(192, 1), "a vector of rows": torch.rand(192), "columns": torch.rand(1, 64)}[axis]
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0), "dora_scale": norms}
    path, before, name = one_layer(base, tensors)
    changed = before + 0.5 * (up.double() @ down.double())
    lengths = changed.norm(dim=0 if axis == "columns" else 1, keepdim=True)
    whole = norms.double().reshape(lengths.shape) * changed / lengths
    result = merged(base, path, strength=strength)[name]
    torch.testing.assert_close(result.double(), before + strength * (whole - before), atol=1e-6, rtol=1e-6)
    assert read_lora(path, base.spec).method == "DoRA"


def test_dora_of_a_split_layer_has_the_norms_of_its_rows(base):
    up, down, norms = 0.1 * torch.randn(64, 4), torch.randn(4, 64), torch.rand(64)
    layer = "base_model.model.transformer_blocks.0.attn.to_k"
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": norms}
    save_file({f"{layer}.{leaf}": tensor for leaf, tensor in tensors.items()}, base.path("lora"))
    weight = merged(base, base.path("lora"))["double_blocks.0.img_attn.qkv.weight"]
    torch.testing.assert_close(weight[64:128].norm(dim=1), norms)


def test_two_doras_are_each_computed_from_the_weight_as_it_was(base):
    tensors = {
        "lora_up.weight": torch.randn(192, 2),
        "lora_down.weight": torch.randn(2, 64),
        "dora_scale": torch.rand(192, 1),
    }
    path, before, name = one_layer(base, tensors)
    alone = merged(base, path)[name].double()
    other = kohya(draw_factors(base.flux), base.flux, base.path("other"))
    change = merged(base, other)[name].double() - before
    torch.testing.assert_close(merged(base, other, path)[name].double(), alone + change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factored", [(), ("w1",), ("w2",), ("w1", "w2")])
def test_lokr_is_a_kronecker_product(base, factored):
    shapes, tensors, factors = {"w1": (6, 4), "w2": (32, 16)}, {"alpha": torch.tensor(1.5)}, []
    for w, (rows, columns) in shapes.items():
        if w in factored:
            a, b = torch.randn(rows, 3), torch.randn(3, columns)
            tensors |= {f"lokr_{w}_a": a, f"lokr_{w}_b": b}
            factors.append(a.double() @ b.double())
        else:
            tensors[f"lokr_{w}"] = torch.randn(rows, columns)
            factors.append(tensors[f"lokr_{w}"].double())
    path, before, name = one_layer(base, tensors)
    scale = 0.5 if factored else 1.0
    result = merged(base, path)[name]
    torch.testing.assert_close(result.double(), before + scale * torch.kron(*factors), atol=1e-5, rtol=1e-5)
    assert read_lora(path, base.spec).method == "LoKr"


def test_loha_is_the_elementwise_product_of_two_products(base):
    w = {f"hada_{n}_{s}": torch.randn(192, 2) if s == "a" else torch.randn(2, 64) for n in ("w1", "w2") for s in "ab"}
    path, before, name = one_layer(base, w | {"alpha": torch.tensor(1.0)})
    d = {leaf: tensor.double() for leaf, tensor in w.items()}
    whole = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"])
    torch.testing.assert_close(merged(base, path)[name].double(), before + 0.5 * whole, atol=1e-5, rtol=1e-5)


# ---- What is refused


def refused(base, path, *parts, **options):
    with pytest.raises(FluxIRError) as caught:
        read_loras(base.spec, path, **options)
    for part in parts:
        assert re.search(part, str(caught.value)), str(caught.value)


def test_a_file_that_fits_nothing_is_an_error(base):
    wrong = {f"blocks.{i}.attn.q": Factors(torch.randn(8, 2), torch.randn(2, 8)) for i in range(4)}
    path = write(wrong, base.path("lora"))
    refused(base, path, "none of the 8 tensors in .* fit a layer of flux-schnell", "8, blocks.0.attn.q.lora_A.weight")


def test_a_file_that_fits_in_part_is_an_error(base):
    some = draw_factors(base.flux)
    more = some | {"double_blocks.7.img_attn.proj": some["double_blocks.1.img_attn.proj"]}
    path = write(more, base.path("lora"), prefix="diffusion_model.")
    count = 2 * len(some)
    refused(base, path, f"only {count} of the {count + 2} tensors", "2, diffusion_model.double_blocks.7.img_attn.proj")


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "Stable Diffusion or SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "Stable Diffusion or SDXL"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", r"FLUX\.2"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"),
        ("diffusion_model.blocks.0.cross_attn.k", "Wan"),
    ],
)
def test_loras_of_other_families_are_named(base, layer, family):
    tensors = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2)}
    save_file({f"{layer}.{leaf}": one for leaf, one in tensors.items()}, base.path("lora"))
    refused(base, base.path("lora"), f"is a LoRA of {family}")


def test_a_lora_of_the_large_models_is_said_to_fit_them(base):
    factors = {"double_blocks.0.img_attn.proj": Factors(torch.zeros(3072, 1), torch.zeros(1, 3072))}
    path = write(factors, base.path("lora"), prefix="diffusion_model.")
    with pytest.raises(FluxIRError) as caught:
        read_lora(path, get_spec("flux-tiny"))
    assert "its change is [3072, 3072], and the rows of double_blocks.0.img_attn.proj.weight are [192, 192]" in str(
        caught.value
    )
    assert "it fits flux-schnell or flux-dev or flux-dev-krea" in caught.value.hint


def test_ranks_and_shapes_that_do_not_agree_are_told_with_both(base):
    layer = "double_blocks.0.img_attn.proj"
    path = write({layer: Factors(torch.randn(64, 3), torch.randn(4, 64))}, base.path("lora"))
    refused(base, path, r"the ranks of up \[64, 3\] and down \[4, 64\] differ", layer)
    path = write({layer: Factors(torch.randn(64, 3, 1, 1), torch.randn(3, 64))}, base.path("lora"))
    refused(base, path, "up must have two axes")


def test_a_layer_that_lacks_a_matrix_is_refused(base):
    save_file({"diffusion_model.img_in.lora_A.weight": torch.randn(2, 64)}, base.path("lora"))
    refused(base, base.path("lora"), "diffusion_model.img_in lacks up")


def test_control_loras_are_refused_by_name(base):
    tensors = {"img_in.lora_A.weight": torch.randn(2, 128), "img_in.lora_B.weight": torch.randn(64, 2)}
    save_file(tensors | {"img_in.lora_B.bias": torch.randn(64)}, base.path("lora"))
    refused(base, base.path("lora"), "BFL's control LoRAs", "from 64 to 128 channels")


@pytest.mark.parametrize(
    ("leaf", "what"),
    [
        ("lora_mid.weight", "Tucker"),
        ("lokr_t2", "Tucker"),
        ("hada_t1", "Tucker"),
        ("oft_blocks", "OFT"),
        ("lora_B.bias", "biases"),
        ("diff", "whole differences"),
        ("diff_b", "whole differences"),
        ("a1.weight", "GLoRA"),
    ],
)
def test_what_is_not_read_is_refused_by_name(base, leaf, what):
    factors = draw_factors(base.flux)
    tensors = load_file(write(factors, base.path("plain"), prefix="diffusion_model."))
    save_file(tensors | {f"diffusion_model.img_in.{leaf}": torch.zeros(2)}, base.path("lora"))
    refused(base, base.path("lora"), what, f"diffusion_model.img_in.{leaf}")


def test_two_layers_for_the_same_rows_are_refused(base):
    factors = draw_factors(base.flux)
    fused = load_file(write(factors, base.path("fused")))
    split = load_file(write(diffusers_names(factors, base.flux), base.path("split"), prefix="transformer."))
    save_file(fused | split, base.path("lora"))
    refused(base, base.path("lora"), "both change", "two LoRAs are in one file")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(base, value):
    factors = draw_factors(base.flux)
    factors["img_in"].up[3, 1] = value
    refused(base, kohya(factors, base.flux, base.path("lora")), "no numbers", "up of lora_unet_img_in")


def test_files_that_are_cut_short_or_something_else_are_one_line(base):
    path = kohya(draw_factors(base.flux), base.flux, base.path("lora"))
    path.write_bytes(path.read_bytes()[:-7])
    refused(base, path, "is cut short")
    path.write_bytes(b"PK\3\4 a pickle")
    refused(base, path, "is a pickle")
    refused(base, base.source.path, "is no LoRA", "--checkpoint")
    refused(base, base.path("gone"), "--lora must name a file or a folder that exists")
    refused(base, "", "--lora must name a file or a folder that exists: got ''")


def test_a_folder_must_lead_to_one_file(base, tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    refused(base, folder, "the folder .* has none")
    first = draw_factors(base.flux)
    kohya(first, base.flux, folder / "a.safetensors")
    assert read_lora(folder, base.spec).path == folder / "a.safetensors"
    kohya(scaled(first), base.flux, folder / "b.safetensors")
    refused(base, folder, r"has 2 that it may be \(a.safetensors, b.safetensors\)")
    kohya(first, base.flux, folder / "pytorch_lora_weights.safetensors")
    assert read_lora(folder, base.spec).path.name == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("strength", [math.nan, math.inf, True])
def test_a_strength_must_be_a_finite_number(base, strength):
    path = kohya(draw_factors(base.flux), base.flux, base.path("lora"))
    with pytest.raises(FluxIRError, match="--lora_strength must be a finite number"):
        read_lora(path, base.spec, strength=strength)


def test_strengths_must_be_one_or_one_for_each_and_files_must_differ(base):
    paths = [kohya(draw_factors(base.flux, seed=seed), base.flux, base.path(f"lora{seed}")) for seed in (1, 2, 3)]
    refused(base, paths, "got 2 for 3", strengths=[1.0, 2.0])
    refused(base, (), "got no --lora", strengths=1.0)
    refused(base, [paths[0], paths[0]], "the same file twice")
    assert [lora.strength for lora in read_loras(base.spec, paths, 2)] == [2.0] * 3


def test_what_a_result_says_of_a_lora_is_its_content(base):
    path = kohya(draw_factors(base.flux), base.flux, base.path("lora"))
    renamed = path.rename(base.path("renamed"))
    lora = read_lora(renamed, base.spec, strength=0.5)
    assert lora.to_json() == {"path": str(renamed), "sha256": lora.sha256, "strength": 0.5}
    assert len(lora.sha256) == 64
    layers = len(lora.all_layers)
    assert str(lora) == f"LoRA of rank {RANK}, {layers} layers (kohya, names of BFL), strength 0.5"
