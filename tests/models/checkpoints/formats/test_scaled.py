"""float8 and int8 with scales: every layout loads as the product in float64 says, and half of one is refused."""

import json

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.keymap import from_diffusers, to_diffusers

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
LAYER = "double_blocks.0.img_attn.qkv"


def quantise(weight, dtype, *, rows):
    """Codes and scales of a matrix, and in float64 what they stand for."""
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    largest = weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().max()
    scale = largest / most
    codes = (weight / scale).round().to(dtype) if dtype == torch.int8 else (weight / scale).to(dtype)
    return codes, scale, codes.double() * scale.double()


@pytest.fixture
def quantised(state, matrices):
    """Tensors of a file whose linear layers have scales, and in float64 what they stand for."""

    def make(leaf, dtype=torch.float8_e4m3fn, *, rows=False, weights=None):
        tensors, expected = {}, {}
        for name, tensor in (weights or state).items():
            tensors[name], expected[name] = tensor, tensor.double()
            if tensor.ndim == 2 and name.endswith(".weight"):
                layer = name.removesuffix(".weight")
                tensors[name], tensors[f"{layer}.{leaf}"], expected[name] = quantise(tensor, dtype, rows=rows)
        return tensors, expected

    return make


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_s_older_files(quantised, write, same, rows, prefix):
    tensors, expected = quantised("scale_weight", rows=rows)
    tensors |= {f"{LAYER}.scale_input": torch.ones(()), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    assert same(write(tensors, prefix=prefix), expected)


def test_a_mark_that_stands_before_the_prefix(quantised, write, same):
    tensors, expected = quantised("scale_weight")
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    assert same(write(prefixed | {"scaled_fp8": torch.zeros(0)}), expected)


def test_scales_of_files_of_diffusers_and_of_shards(quantised, state, tiny_flux_params, tmp_path, save_sharded, same):
    tensors, expected = quantised("weight_scale", weights=to_diffusers(state, tiny_flux_params))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    ours = from_diffusers(expected, shapes, tiny_flux_params)
    assert same(save_sharded(tensors, tmp_path, "diffusion_pytorch_model"), ours)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("word", FORMATS)
@pytest.mark.parametrize("said", ["beside", "header", "header without prefix", "header of words"])
def test_comfyui_s_newer_files(quantised, matrices, write, same, rows, word, said):
    tensors, expected = quantised("weight_scale", FORMATS[word], rows=rows)
    layers = [name.removesuffix(".weight") for name in matrices]
    tensors[f"{LAYER}.input_scale"] = torch.ones(())
    metadata, prefix = None, "model.diffusion_model."
    if said == "beside":
        tensors |= {f"{layer}.comfy_quant": text({"format": word}) for layer in layers}
    else:
        before = prefix if said == "header" else ""
        value = word if said == "header of words" else {"format": word, "full_precision_matrix_mult": True}
        described = {"format_version": "1.0", "layers": {before + layer: value for layer in layers}}
        metadata = {"_quantization_metadata": json.dumps(described)}
    assert same(write(tensors, metadata=metadata, prefix=prefix), expected)


def test_float8_that_a_file_calls_bytes(quantised, matrices, write, same):
    tensors, expected = quantised("weight_scale")
    for name in matrices:
        tensors[name] = tensors[name].view(torch.uint8)
        tensors[name.removesuffix("weight") + "comfy_quant"] = text({"format": "float8_e4m3fn"})
    assert same(write(tensors), expected)


def test_int8_of_bitsandbytes(state, matrices, write, same):
    tensors, expected = dict(state), {name: tensor.double() for name, tensor in state.items()}
    for name in matrices:
        codes, scale, _ = quantise(state[name], torch.int8, rows=True)
        absmax = (scale[:, 0] * 127).contiguous()
        tensors |= {name: codes, name.replace("weight", "SCB"): absmax}
        tensors[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
        # bitsandbytes rounds after each of its two products.
        expected[name] = (codes.double() * absmax.double()[:, None]).float().double() * 7.874015718698502e-3
    assert same(write(tensors), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quanto_s_layers_of_8_bits(state, matrices, write, same, dtype):
    tensors, expected = dict(state), {name: tensor.double() for name, tensor in state.items()}
    for name in matrices:
        codes, scale, expected[name] = quantise(tensors.pop(name), dtype, rows=True)
        tensors |= {f"{name}._data": codes, f"{name}._scale": scale}
        tensors |= {name.replace("weight", leaf): torch.ones(()) for leaf in ("input_scale", "output_scale")}
    assert same(write(tensors), expected)


def test_an_entry_counts_its_scale_and_says_what_it_is(quantised, write, tiny_spec):
    tensors, _ = quantised("scale_weight", rows=True)
    source = inspect(tiny_spec(), "transformer", write(tensors), "--checkpoint")
    entry = source.entries[f"{LAYER}.weight"]
    assert (entry.shape, entry.nbytes) == ((192, 64), 192 * 64 + 4 * 192)
    assert source.stored_as == {"float8_e4m3fn with scales": len([n for n in tensors if n.endswith("scale_weight")])}


# ---- Wrong files: one line that says what is wrong


def refusal(spec, path):
    with pytest.raises(FluxIRError) as error:
        inspect(spec, "transformer", path, "--checkpoint")
    assert str(path) in error.value.message
    assert "\n" not in error.value.message
    assert "GGUF or bitsandbytes NF4" in error.value.hint
    return error.value.message


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "nvfp4"}, f"{LAYER} is in ComfyUI's format nvfp4"),
        ({"format": "mxfp8"}, f"{LAYER} is in ComfyUI's format mxfp8"),
        ({"format": "asym_w4a8_int8"}, f"{LAYER} is in ComfyUI's format asym_w4a8_int8"),
        ({"format": "of tomorrow"}, f"{LAYER} is in ComfyUI's format of tomorrow"),
        ({"format": "int8_tensorwise", "convrot": True}, f"those of {LAYER} are rotated (int8_tensorwise, convrot)"),
        ({"format": "int8_tensorwise"}, f"says that {LAYER} is int8_tensorwise, and it is F8_E4M3"),
        ({"group": 16}, f"must name the format of {LAYER}: it says {{'group': 16}}"),
        (
            ["float8_e4m3fn"],
            f"must say as a JSON object how it was quantised: {LAYER}.comfy_quant is ['float8_e4m3fn']",
        ),
    ],
)
def test_a_format_that_cannot_be_read_is_named(quantised, write, tiny_spec, said, message):
    tensors, _ = quantised("weight_scale")
    assert message in refusal(tiny_spec(), write(tensors | {f"{LAYER}.comfy_quant": text(said)}))


@pytest.mark.parametrize("marked", [False, True])
def test_scales_that_some_weights_lack_are_missed(quantised, write, tiny_spec, marked):
    tensors, _ = quantised("scale_weight")
    if marked:
        tensors["scaled_fp8"] = torch.zeros(2)
    del tensors[f"{LAYER}.scale_weight"]
    message = refusal(tiny_spec(), write(tensors))
    assert f"1 of them lack their scales: {LAYER}.weight has none, double_blocks.1.img_attn.qkv.weight has" in message


def test_scales_that_a_file_says_it_has_are_missed(quantised, write, tiny_spec):
    tensors, _ = quantised("scale_weight")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("scale_weight")}
    assert "says that its float8 weights have scales (scaled_fp8), and holds none: first" in refusal(
        tiny_spec(), write(tensors | {"scaled_fp8": torch.zeros(2)})
    )
    named = {f"{LAYER}.comfy_quant": text({"format": "float8_e4m3fn"})}
    assert f"lack their scales: first {LAYER}.weight" in refusal(tiny_spec(), write(tensors | named))


@pytest.mark.parametrize("shape", [(2, 2), (64,), (192, 2), (0,)])
def test_scales_of_another_shape_are_refused(quantised, write, tiny_spec, shape):
    tensors, _ = quantised("scale_weight")
    tensors[f"{LAYER}.scale_weight"] = torch.ones(shape)
    message = refusal(tiny_spec(), write(tensors))
    assert f"one number or one for each row: that of {LAYER}.weight (192, 64) is F32 {shape}" in message


def test_a_scale_that_is_no_float_is_refused(quantised, write, tiny_spec):
    tensors, _ = quantised("scale_weight")
    tensors[f"{LAYER}.scale_weight"] = torch.ones((), dtype=torch.int32)
    assert "is I32 ()" in refusal(tiny_spec(), write(tensors))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "must say in JSON how it was quantised: _quantization_metadata"),
        ('{"layers": ["a"]}', "must name its layers in a JSON object: those of _quantization_metadata are ['a']"),
        ('{"layers": {"a": {}}}', "must name the format of a: it says {}"),
    ],
)
def test_a_header_that_says_nothing_of_use_is_one_line(quantised, write, tiny_spec, said, message):
    tensors, _ = quantised("weight_scale")
    assert message in refusal(tiny_spec(), write(tensors, metadata={"_quantization_metadata": said}))


def test_quanto_s_codes_of_another_type_are_refused(state, write, tiny_spec):
    codes = {
        f"{LAYER}.weight._data": torch.zeros(192, 64, dtype=torch.uint8),
        f"{LAYER}.weight._scale": torch.ones(192, 1),
    }
    del state[f"{LAYER}.weight"]
    assert f"{LAYER}.weight._data is U8 with a scale" in refusal(tiny_spec(), write(state | codes))


def test_int8_that_does_not_say_how_it_was_made_is_refused(quantised, write, tiny_spec):
    tensors, _ = quantised("weight_scale", torch.int8)
    assert "nothing says of what format: " in refusal(tiny_spec(), write(tensors))
