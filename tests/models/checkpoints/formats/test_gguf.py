"""GGUF files of gguf's own writer: every type, the names of FLUX and T5, original shapes, and broken headers."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.formats.blocks import BLOCK_TYPES
from flux_ir.models.checkpoints.formats.gguf import read_gguf
from flux_ir.models.checkpoints.formats.weights import read_entries
from flux_ir.models.checkpoints.headers import read_tensor
from flux_ir.models.checkpoints.inspect import inspect
from flux_ir.models.checkpoints.load import load_flux
from flux_ir.models.checkpoints.locate import locate_transformer
from flux_ir.models.text import load_t5

NAME = "double_blocks.0.img_attn.qkv.weight"


def blocks_of(tensor, kind):
    """The blocks of a tensor, as `write_gguf` takes them, and in float64 what gguf says that they stand for."""
    blocks = quantize(tensor.numpy(), GGMLQuantizationType[kind])
    return (blocks, kind), torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind])).double()


@pytest.fixture
def quantised(state):
    """Arrays of a file with matrices in blocks, vectors in float32 or bfloat16, and in float64 what they stand for."""

    def make(kind, weights=None):
        arrays, expected = {}, {}
        for name, tensor in (weights or state).items():
            whole = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
            arrays[name], expected[name] = blocks_of(tensor, kind if whole else "BF16" if "bias" in name else "F32")
        return arrays, expected

    return make


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_gguf_quantised_is_what_gguf_reads(quantised, write_gguf, same, kind):
    arrays, expected = quantised(kind)
    assert same(write_gguf(arrays), expected)


@pytest.mark.parametrize("architecture", ["flux", "pig", None])
def test_files_are_known_by_their_names_and_not_by_what_they_say_they_are(
    quantised, write_gguf, same, monkeypatch, architecture
):
    if architecture is None:
        monkeypatch.setattr("gguf.GGUFWriter.add_architecture", lambda writer: None)
    arrays, expected = quantised("Q8_0")
    prefixed = {f"model.diffusion_model.{name}": array for name, array in arrays.items()}
    path = write_gguf(prefixed, architecture=architecture or "", name="some.safetensors")
    assert (b"general.architecture" in path.read_bytes()) == (architecture is not None)
    assert same(path, expected)


@pytest.mark.parametrize("kind", [kind for kind, block in BLOCK_TYPES.items() if block.weights == 256])
def test_blocks_of_256_that_lie_across_rows_have_the_shape_that_the_file_remembers(state, write_gguf, same, kind):
    draw = np.random.default_rng(0)
    arrays, expected, shapes = {}, {}, []
    for name, tensor in state.items():
        arrays[name], expected[name] = tensor.numpy(), tensor.double()
        if tensor.ndim == 2:
            blocks = draw.integers(0, 60, (tensor.numel() // 256, BLOCK_TYPES[kind].nbytes), dtype=np.uint8)
            arrays[name] = (blocks, kind)  # bytes below 60: no 16-bit float among them is infinite
            numbers = dequantize(blocks, GGMLQuantizationType[kind])
            expected[name] = torch.from_numpy(numbers).double().reshape(tensor.shape)
            shapes.append(("add_array", f"comfy.gguf.orig_shape.{name}", list(tensor.shape)))
    assert same(write_gguf(arrays, values=shapes), expected)


def test_an_entry_has_the_weight_s_shape_and_the_bytes_of_its_blocks(quantised, write_gguf, tiny_spec):
    arrays, _ = quantised("Q8_0")
    source = inspect(tiny_spec(), "transformer", write_gguf(arrays), "--checkpoint")
    assert (source.entries[NAME].shape, source.entries[NAME].nbytes) == ((192, 64), 192 * 64 // 32 * 34)
    assert source.stored_as == {"GGUF Q8_0": sum(1 for array in arrays.values() if array[1] == "Q8_0")}
    assert source.nbytes == sum(array[0].nbytes for array in arrays.values())


def test_values_of_all_kinds_in_the_header_are_passed_over(write_gguf):
    values = [
        ("add_uint8", "a", 1), ("add_int8", "b", -1), ("add_uint16", "c", 2), ("add_int16", "d", -2),
        ("add_uint32", "e", 3), ("add_int32", "f", -3), ("add_float32", "g", 0.5), ("add_uint64", "h", 4),
        ("add_int64", "i", -4), ("add_float64", "j", 0.25), ("add_bool", "k", True), ("add_string", "l", "l\u00e9"),
        ("add_array", "m", ["x", "yz"]), ("add_array", "n", [1, 2]), ("add_array", "o", [0.5]),
        ("add_array", "p", [[1, 2], [3]]),
    ]  # fmt: skip
    path = write_gguf({"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, values=values)
    assert torch.equal(read_tensor(read_gguf(path)["x"]), torch.arange(6.0).reshape(2, 3))


def test_an_alignment_of_its_own_is_kept_to(write_gguf):
    arrays = {"x": np.ones(3, np.float32), "y": np.full(5, 2, np.float16)}
    entries = read_gguf(write_gguf(arrays, values=[("add_custom_alignment", 128)]))
    assert [entry.offset % 128 for entry in entries.values()] == [0, 0]
    assert {name: read_tensor(entry).tolist() for name, entry in entries.items()} == {"x": [1] * 3, "y": [2] * 5}


def test_a_weight_is_read_in_parts(write_gguf):
    weights = np.random.default_rng(0).standard_normal((1100, 1024)).astype(np.float32)  # more than one part
    (blocks, kind), expected = blocks_of(torch.from_numpy(weights), "Q8_0")
    entry = read_gguf(write_gguf({"a": (blocks, kind)}))["a"]
    assert torch.equal(read_tensor(entry), expected.float())


# ---- T5, by llama.cpp's names

LLAMA = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}


def llama_name(name):
    stem = name.removesuffix(".weight")
    if stem.startswith("encoder.block."):
        _, _, number, layer = stem.split(".", 3)
        return f"enc.blk.{number}.{LLAMA[layer]}.weight"
    return f"{LLAMA[stem]}.weight"


@pytest.mark.parametrize("gated", [True, False])
def test_t5_of_llama_cpp_is_that_of_transformers(text_folders, tmp_path, quantised, write_gguf, gated):
    words = {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    config = T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **words)
    model = T5EncoderModel(config)
    model.save_pretrained(tmp_path / "t5")
    settings = json.loads((tmp_path / "t5" / "config.json").read_text())
    state = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    arrays, expected = quantised("Q8_0", state)
    save_file({name: tensor.float() for name, tensor in expected.items()}, tmp_path / "t5" / "model.safetensors")
    named = {llama_name(name): array for name, array in arrays.items()}
    named["dec.blk.0.attn_q.weight"] = np.zeros((4, 4), np.float32)  # of a whole T5, which nobody needs here
    path = write_gguf(named, architecture="t5")
    own, reference = (
        load_t5(place, text_folders.t5, 7, "cpu", torch.float32, config=settings)(["a red circle"])
        for place in (path, tmp_path / "t5")
    )
    assert torch.equal(own, reference)


# ---- Wrong files


def test_a_file_cut_anywhere_is_one_line(quantised, write_gguf, tmp_path):
    arrays, _ = quantised("Q8_0")
    whole = write_gguf(arrays, values=[("add_array", "words", ["a", "b"])]).read_bytes()
    path = tmp_path / "cut.gguf"
    for kept in (*range(4, 400, 7), *range(400, len(whole), len(whole) // 20)):
        path.write_bytes(whole[:kept])
        with pytest.raises(FluxIRError, match=r"cut\.gguf (is cut short: it has|is not a GGUF file that can be read)"):
            read_entries(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "versions 2 and 3 are known, and its version is 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "the byte order of another machine"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 60), "its header ends"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 99), "its header ends or has a value that no header has"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"a", 77), "'a' has 77 axes"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 33, 8, 0), "a has 33 weights, which are no whole"),
    ],
)
def test_headers_that_no_writer_writes_are_one_line(tmp_path, start, message):
    path = tmp_path / "broken.gguf"
    path.write_bytes(start)
    with pytest.raises(FluxIRError, match=r"broken\.gguf is not a GGUF file that can be read") as error:
        read_entries(path)
    assert message in error.value.message


@pytest.mark.parametrize(("kind", "number"), [("IQ2_XXS", 16), ("NVFP4", 40), ("number 4", 4), ("number 99", 99)])
def test_a_type_that_cannot_be_read_is_named(tmp_path, kind, number):
    path = tmp_path / "some.gguf"
    path.write_bytes(struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 256, number, 0))
    with pytest.raises(FluxIRError, match=f"of the GGUF type {kind}, which cannot be read: first a") as error:
        read_entries(path)
    assert error.value.hint.startswith("take the same model as Q4_K_M, or another of these: Q4_0")


def test_a_shape_that_does_not_fit_the_blocks_is_refused(write_gguf):
    path = write_gguf({"a": np.zeros((4, 4), np.float32)}, values=[("add_array", "comfy.gguf.orig_shape.a", [3, 5])])
    with pytest.raises(FluxIRError, match=r"a of shape \(4, 4\) is said to have had the shape \[3, 5\]"):
        read_entries(path)


def test_a_part_of_a_split_file_is_called_one(write_gguf):
    path = write_gguf({"a": np.zeros(4, np.float32)}, values=[("add_uint16", "split.count", 3)])
    with pytest.raises(FluxIRError, match="is one of 3 parts of a split GGUF file") as error:
        read_entries(path)
    assert "llama-gguf-split --merge" in error.value.hint


def test_integers_are_not_taken_for_weights(quantised, write_gguf, tiny_spec):
    arrays, _ = quantised("Q8_0")
    arrays[NAME] = np.zeros((192, 64), np.int8)
    with pytest.raises(FluxIRError, match="of the GGUF type I8, which cannot be read: first double_blocks"):
        inspect(tiny_spec(), "transformer", write_gguf(arrays), "--checkpoint")


def test_a_file_that_broke_after_it_was_found_is_one_line(quantised, write_gguf, tiny_spec):
    path = write_gguf(quantised("Q8_0")[0])
    source = locate_transformer(tiny_spec(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FluxIRError, match=r"model\.gguf cannot be read"):
        load_flux(tiny_spec(), source, "cpu", torch.float32)


def test_a_folder_with_one_gguf_file_leads_to_it(quantised, write_gguf, tiny_spec, tmp_path):
    path = write_gguf(quantised("Q8_0")[0])
    (tmp_path / "folder").mkdir()
    shutil.move(path, tmp_path / "folder" / "flux1-schnell-Q8_0.gguf")
    heard = []
    source = locate_transformer(tiny_spec(), tmp_path / "folder", announce=heard.append)
    assert source.path.name == "flux1-schnell-Q8_0.gguf"
    count = source.stored_as["GGUF Q8_0"]
    assert heard[1] == (
        f"transformer: {count} of {len(source.entries)} weights are widened when loaded: {count} are GGUF Q8_0"
    )
