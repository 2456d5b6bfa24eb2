"""A small transformer to be quantised, and how it comes back through the public way."""

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file

from flux_ir.models.checkpoints.load import load_flux
from flux_ir.models.checkpoints.locate import locate_transformer


@pytest.fixture
def state(tiny_flux):
    return {name: tensor.clone() for name, tensor in tiny_flux().state_dict().items()}


@pytest.fixture
def matrices(state):
    """The names of all weights of linear layers."""
    return [name for name, tensor in state.items() if tensor.ndim == 2]


@pytest.fixture
def loaded(tiny_spec):
    """The weights of a file as `locate_transformer` and `load_flux` give them, in float32."""

    def load(path):
        spec = tiny_spec()
        return load_flux(spec, locate_transformer(spec, path), "cpu", torch.float32).state_dict()

    return load


@pytest.fixture
def same(loaded):
    """Whether the weights of a file are these float64 numbers, rounded once to float32."""

    def check(path, expected):
        found = loaded(path)
        assert found.keys() == expected.keys()
        return [name for name in found if not torch.equal(found[name], expected[name].to(torch.float32))] == []

    return check


@pytest.fixture
def write(tmp_path):
    """Writes tensors as a safetensors file, with a header's metadata. Returns the path."""

    def save(tensors, *, metadata=None, prefix=""):
        path = tmp_path / "quantised.safetensors"
        save_file({prefix + name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
        return path

    return save


@pytest.fixture
def write_gguf(tmp_path):
    """Writes arrays, and arrays of blocks with the name of their type, as a GGUF file by gguf's own writer."""

    def save(arrays, *, architecture="flux", values=(), name="model.gguf"):
        path = tmp_path / name
        writer = GGUFWriter(path, architecture)
        for method, *arguments in values:
            getattr(writer, method)(*arguments)
        for key, array in arrays.items():
            blocks, kind = array if isinstance(array, tuple) else (array, None)
            writer.add_tensor(key, blocks, raw_dtype=None if kind is None else GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return save
