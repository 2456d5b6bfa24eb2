"""The first command with quantised weights: flux-tiny in the layouts people download draws nearly its own picture."""

import json

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_ir.commands.capture import main
from tests.commands.run_folder import SPEC

WORDS = (
    *("--model", "flux-tiny", "--seed", "7", "--dtype", "float32", "--should_decode_intermediates", "False"),
    *("--prompt", "a large red circle left of a small blue square on a white background"),
)
TRANSFORMER, T5, CLIP = "transformer.safetensors", "t5/model.safetensors", "clip/model.safetensors"


def is_linear(name, tensor):
    inside = "block" in name or "layers" in name
    return tensor.ndim == 2 and name.endswith(".weight") and inside and "relative" not in name


def scaled_fp8(state):
    tensors = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if is_linear(name, tensor):
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
    return tensors


def nf4(state):
    tensors = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if is_linear(name, tensor):
            tensors[name], how = quantize_4bit(tensor.float(), quant_type="nf4", compress_statistics=True, blocksize=64)
            tensors |= {f"{name}.{part}": value for part, value in how.as_dict(packed=True).items()}
    return tensors


def write_gguf(state, path, kind="Q8_0"):
    writer = GGUFWriter(path, "flux")
    for name, tensor in state.items():
        one = GGMLQuantizationType[kind if is_linear(name, tensor) and tensor.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(name, quantize(tensor.float().numpy(), one), raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def shipped(part):
    """The weights of a part, with the names that published files have."""
    before = "text_model." if part == CLIP else ""
    return {before + name: tensor for name, tensor in load_file(SPEC.assets / part).items()}


def picture(folder):
    return np.asarray(Image.open(folder / "img_0.jpg"), np.float32)


def files_said(folder):
    (metadata,) = (folder / "intermediates").glob("metadata_*.json")
    return json.loads(metadata.read_text())["files"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    output = tmp_path_factory.mktemp("plain")
    assert main([*WORDS, "--output_dir", str(output)]) == 0
    return picture(next(output.iterdir()))


@pytest.mark.parametrize(
    ("made", "kind", "most"),
    [("scaled fp8", "float8_e4m3fn with scales", 4), ("gguf", "GGUF Q8_0", 2), ("nf4", "bitsandbytes NF4", 12)],
)
def test_a_quantised_transformer_draws_nearly_the_same_picture(tmp_path, run, capsys, plain, made, kind, most):
    state = shipped(TRANSFORMER)
    if made == "gguf":
        path = write_gguf(state, tmp_path / "flux.gguf")
    else:
        path = write({"scaled fp8": scaled_fp8, "nf4": nf4}[made](state), tmp_path / "flux.safetensors")
    folder = run(*WORDS, "--checkpoint", str(path))
    difference = np.abs(picture(folder) - plain).mean()
    assert 0 < difference < most
    count = sum(is_linear(name, tensor) for name, tensor in state.items())
    told = f"transformer: {count} of {len(state)} weights are widened when loaded: {count} are {kind}"
    assert told in capsys.readouterr().err
    assert files_said(folder)["transformer"]["stored_as"] == {kind: count}
    assert "stored_as" not in files_said(folder)["t5"]


def test_quantised_text_encoders_are_said_too(tmp_path, run, capsys, plain, monkeypatch):
    monkeypatch.setenv("FLUX_T5", str(write_gguf(shipped(T5), tmp_path / "t5xxl.gguf")))
    monkeypatch.setenv("FLUX_CLIP", str(write(scaled_fp8(shipped(CLIP)), tmp_path / "clip_l.safetensors")))
    folder = run(*WORDS)
    assert np.abs(picture(folder) - plain).mean() < 6
    said = files_said(folder)
    assert list(said["t5"]["stored_as"]) == ["GGUF Q8_0"]
    assert list(said["clip"]["stored_as"]) == ["float8_e4m3fn with scales"]
    told = capsys.readouterr().err
    assert "T5: " in told
    assert "weights are widened when loaded: " in told


def test_one_file_with_all_parts_in_different_formats(tmp_path, run, plain):
    parts = {
        "model.diffusion_model.": nf4(shipped(TRANSFORMER)),
        "vae.": shipped("ae.safetensors"),
        "text_encoders.t5xxl.transformer.": scaled_fp8(shipped(T5)),
        "text_encoders.clip_l.transformer.": shipped(CLIP),
    }
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    path = write(tensors | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "all.safetensors")
    folder = run(*WORDS, "--checkpoint", str(path))
    assert np.abs(picture(folder) - plain).mean() < 12
    said = files_said(folder)
    assert {part: list(one.get("stored_as", {})) for part, one in said.items()} == {
        "transformer": ["bitsandbytes NF4"],
        "autoencoder": [],
        "t5": ["float8_e4m3fn with scales"],
        "clip": [],
    }
    assert {one["path"] for one in said.values()} == {str(path)}


# ---- Wrong files: one line, exit code 2, nothing left


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def make_broken(kind, path):
    state = shipped(TRANSFORMER)
    name = next(name for name, tensor in state.items() if is_linear(name, tensor))
    match kind:
        case "truncated GGUF":
            cut(write_gguf(state, path))
        case "truncated":
            cut(write(nf4(state), path))
        case "half scaled":
            tensors = scaled_fp8(state)
            del tensors[name.replace(".weight", ".scale_weight")]
            write(tensors, path)
        case "wrong scale":
            write(scaled_fp8(state) | {name.replace(".weight", ".scale_weight"): torch.ones(3)}, path)
        case "unknown format":
            said = torch.tensor(list(b'{"format": "of tomorrow"}'), dtype=torch.uint8)
            write(scaled_fp8(state) | {name.replace(".weight", ".comfy_quant"): said}, path)
        case "nunchaku":
            write(state | {"transformer_blocks.0.qkv_proj.wscales": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated GGUF", "is cut short: it has"),
        ("truncated", "is cut short: it has"),
        ("half scaled", "1 of them lack their scales"),
        ("wrong scale", "their scales must be one number or one for each row"),
        ("unknown format", "is in ComfyUI's format of tomorrow"),
        ("nunchaku", "packed for the kernels of nunchaku (SVDQuant)"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys, kind, message):
    path = tmp_path / "weights"
    make_broken(kind, path)
    assert main([*WORDS, "--checkpoint", str(path), "--output_dir", str(tmp_path / "output")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith(f"error: {path}")
    assert message in lines[-2]
    assert lines[-1].startswith("hint: ")
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]
