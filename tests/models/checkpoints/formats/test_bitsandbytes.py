"""NF4 and FP4: what bitsandbytes wrote loads as bitsandbytes and a sum in float64 say, and half of it is refused."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.formats.weights import join_weights, read_entries
from flux_ir.models.checkpoints.headers import read_tensor
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.keymap import from_diffusers, to_diffusers
from flux_ir.models.text import load_t5

NAME = "double_blocks.0.img_attn.qkv.weight"


def by_hand(packed, parts):
    """In float64, what the codes of a weight stand for; a factor that is a code itself is rounded to float32 twice."""
    state = json.loads(bytes(next(part for key, part in parts.items() if "quant_state" in key).tolist()))
    codes = torch.stack((packed.flatten() // 16, packed.flatten() % 16), dim=1).flatten().long()
    factors = parts["absmax"].double()
    if "nested_absmax" in parts:
        largest = parts["nested_absmax"].double()[torch.arange(len(factors)) // state["nested_blocksize"]]
        products = parts["nested_quant_map"].double()[parts["absmax"].long()] * largest
        factors = (products.float().double() + torch.tensor(state["nested_offset"])).float().double()
    values = parts["quant_map"].double()[codes]
    blocks = torch.arange(len(values)) // state["blocksize"]
    count = torch.Size(state["shape"]).numel()
    return (values * factors[blocks])[:count].reshape(state["shape"])


@pytest.fixture
def quantised():
    """Tensors of a file whose matrices bitsandbytes quantised; in float64, by hand; as bitsandbytes reads them."""

    def make(weights, *, nested, kind="nf4", dtype=torch.float32):
        tensors, expected, oracle = {}, {}, {}
        for name, tensor in weights.items():
            tensors[name], expected[name], oracle[name] = tensor, tensor.double(), tensor
            if tensor.ndim == 2 and name.endswith(".weight"):
                packed, how = quantize_4bit(tensor.to(dtype), blocksize=64, quant_type=kind, compress_statistics=nested)
                parts = how.as_dict(packed=True)
                tensors[name] = packed
                # Of what is no whole blocks bitsandbytes makes numbers by a compiler, which takes a while.
                oracle[name] = dequantize_4bit(packed, how) if tensor.numel() % 64 == 0 else None
                tensors |= {f"{name}.{part}": value for part, value in parts.items()}
                expected[name] = by_hand(packed, parts)
        return tensors, expected, oracle

    return make


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_files_with_the_published_names(state, quantised, write, same, kind, nested, prefix):
    tensors, expected, oracle = quantised(state, nested=nested, kind=kind)
    path = write(tensors, prefix=prefix)
    assert same(path, expected)
    assert same(path, oracle)


@pytest.mark.parametrize("nested", [False, True])
def test_files_of_diffusers_and_shards(state, quantised, tiny_flux_params, tmp_path, save_sharded, same, nested):
    tensors, expected, _ = quantised(to_diffusers(state, tiny_flux_params), nested=nested)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    index = save_sharded(tensors, tmp_path, "diffusion_pytorch_model")
    assert same(index, from_diffusers(expected, shapes, tiny_flux_params))


def test_bfloat16_is_what_bitsandbytes_makes_of_it(state, quantised, write):
    tensors, _, oracle = quantised(state, nested=True, dtype=torch.bfloat16)
    weights = join_weights(read_entries(write(tensors)), "a", hint="b")
    assert oracle[NAME].dtype == torch.bfloat16
    assert torch.equal(read_tensor(weights[NAME]).to(torch.bfloat16), oracle[NAME])


@pytest.mark.parametrize("shape", [(3, 43), (5, 64), (1, 1), (600, 700)])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_that_are_no_whole_blocks(write, quantised, shape, nested):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors, expected, _ = quantised({"a.weight": weight}, nested=nested)
    weights = join_weights(read_entries(write(tensors)), "a", hint="b")
    assert list(weights) == ["a.weight"]
    assert torch.equal(read_tensor(weights["a.weight"]), expected["a.weight"].float())


def test_codes_that_are_stored_as_another_type(state, quantised, write, same):
    tensors, expected, _ = quantised(state, nested=False)
    tensors[NAME] = tensors[NAME].flatten().view(torch.bfloat16)  # bnb_4bit_quant_storage
    assert same(write(tensors), expected)


def test_an_entry_has_the_weight_s_shape_and_counts_all_its_parts(state, quantised, matrices, write, tiny_spec):
    tensors, _, _ = quantised(state, nested=True)
    source = inspect(tiny_spec(), "transformer", write(tensors), "--checkpoint")
    parts = [tensor for name, tensor in tensors.items() if name.startswith(NAME)]
    assert source.entries[NAME].shape == (192, 64)
    assert source.entries[NAME].nbytes == sum(tensor.numel() * tensor.element_size() for tensor in parts)
    assert source.stored_as == {"bitsandbytes NF4": len(matrices)}


# ---- Wrong files


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"absmax": None}, f"it lacks {NAME}.absmax"),
        ({"nested_quant_map": None, "quant_map": None}, f"it lacks {NAME}.quant_map, {NAME}.nested_quant_map"),
        ({"quant_state.bitsandbytes__nf4": None}, f"what describes them: {NAME}.quant_state.bitsandbytes__nf4"),
        ({"absmax": torch.zeros(7, dtype=torch.uint8)}, f"{NAME}.absmax must hold 192 numbers, and its shape is (7,)"),
        ({"quant_map": torch.zeros(15)}, f"{NAME}.quant_map must hold 16 numbers"),
        ({"": torch.zeros(7, 1, dtype=torch.uint8)}, f"{NAME} of shape (192, 64) has 7 bytes of codes"),
        ({"quant_state.bitsandbytes__nf4": b"{"}, "bitsandbytes__nf4 is no JSON"),
        ({"quant_state.bitsandbytes__nf4": b"[]"}, "bitsandbytes__nf4 is []"),
        ({"quant_state.bitsandbytes__nf4": b'{"shape": [192, 64]}'}, "describes its 4-bit weights wrongly"),
        ({"quant_state.bitsandbytes__nf4": b'{"shape": [192, 64], "blocksize": 0}'}, "describes its 4-bit weights"),
    ],
)
def test_what_is_missing_or_broken_is_named(state, quantised, write, tiny_spec, broken, message):
    tensors, _, _ = quantised(state, nested=True)
    for part, value in broken.items():
        name = f"{NAME}.{part}".rstrip(".")
        tensors[name] = torch.tensor(list(value), dtype=torch.uint8) if isinstance(value, bytes) else value
    path = write({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(FluxIRError) as error:
        inspect(tiny_spec(), "transformer", path, "--checkpoint")
    assert message in error.value.message
    assert str(path) in error.value.message


# ---- A text encoder, as transformers writes it


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_t5_folder_that_transformers_has_quantised(text_folders, tmp_path, double_quant):
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig, T5EncoderModel

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    theirs = T5EncoderModel.from_pretrained(text_folders.t5, quantization_config=how, device_map={"": "cpu"})
    theirs.save_pretrained(tmp_path / "t5")
    assert json.loads((tmp_path / "t5" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    expected = {}
    for name, module in theirs.named_modules():
        if (weight := getattr(module, "weight", None)) is not None:
            state = getattr(weight, "quant_state", None)
            expected[f"{name}.weight"] = weight.data if state is None else dequantize_4bit(weight.data, state)
    encoder = load_t5(tmp_path / "t5", text_folders.t5, 7, "cpu", torch.float32)
    found = encoder.model.state_dict()
    quantised = [name for name in found if name in expected and "SelfAttention.q" in name]
    assert quantised
    for name, weight in found.items():
        assert torch.equal(weight, expected[name].float()), name
    plain = load_t5(text_folders.t5, text_folders.t5, 7, "cpu", torch.float32)
    assert not torch.equal(encoder(["a red circle"]), plain(["a red circle"]))
