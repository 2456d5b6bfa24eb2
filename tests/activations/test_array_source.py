"""Plain arrays as a source: NumPy's and safetensors', one or a folder of them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_ir.activations.array_source import ROWS_PER_PIECE
from flux_ir.activations.tokens import open_source


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("images", [None, 3])
def test_npy_arrays_are_sources(tmp_path, dtype, images):
    shape = (600, 16) if images is None else (images, 20, 16)
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    source = open_source(tmp_path / "x.npy")
    assert (list(source.sites), list(source.steps), source.model, source.d(None)) == ([], [0], None, 16)
    blocks = [source.read(i, None, 0) for i in range(len(source.generations))]
    assert source.tokens(None) == (20 if images else ROWS_PER_PIECE)
    assert [len(block.values) for block in blocks] == ([20] * 3 if images else [256, 256, 88])
    expected = torch.from_numpy(array.astype(np.float16 if dtype == np.float16 else np.float32)).reshape(-1, 16)
    assert torch.equal(torch.cat([block.floats() for block in blocks]), expected)
    assert len({block.generation for block in blocks}) == len(blocks)
    assert blocks[-1].positions.tolist() == (list(range(20)) if images else list(range(512, 600)))
    assert blocks[0].site is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors_arrays_are_sources(tmp_path, dtype):
    array = torch.randn(2, 9, 16).to(dtype)
    save_file({"anything": array}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert torch.equal(torch.stack([source.read(i, None, 0).floats() for i in range(2)]), array)
    assert source.read(0, None, 0).values.dtype == dtype


def test_a_folder_of_arrays_is_read_in_the_order_of_names(tmp_path):
    for number, name in enumerate("ba"):
        np.save(tmp_path / f"{name}.npy", np.full((300, 4), number, np.float32))
    source = open_source(tmp_path)
    assert [one.id for one in source.generations] == ["a.0", "a.1", "b.0", "b.1"]
    assert source.read(2, None, 0).values.unique().tolist() == [0.0]
