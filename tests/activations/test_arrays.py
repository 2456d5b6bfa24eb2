"""Plain arrays as a source: NumPy's and safetensors', one or a folder of them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_ir.activations.arrays import ROWS_PER_PIECE
from flux_ir.activations.source import open_source
from flux_ir.activations.spans import Memory


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_safetensors_arrays_are_sources(tmp_path, dtype):
    array = torch.randn(2, 9, 16).to(dtype)
    save_file({"anything": array}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert torch.equal(torch.stack([source.read(i, None, 0).values for i in range(2)]), array.to(kept))
    assert source.read_run(range(2), None, 0, range(2, 5), Memory()).values.dtype == kept


def test_a_folder_of_arrays_is_read_in_the_order_of_names(tmp_path):
    for number, name in enumerate("ba"):
        np.save(tmp_path / f"{name}.npy", np.full((300, 4), number, np.float32))
    source = open_source(tmp_path)
    assert [one.path.name for one in source.generations] == ["a.npy", "a.npy", "b.npy", "b.npy"]
    assert source.read(2, None, 0).values.unique().tolist() == [0.0]


def test_arrays_are_known_by_their_values_and_not_by_their_names(tmp_path):
    values = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32)
    for name, array in (("a", values), ("b", values), ("c", values + 1), ("d", values.astype(np.float16))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / f"{name if name != 'c' else 'a'}.npy", array)
    sources = [open_source(tmp_path / name) for name in "abcd"]
    assert sources[0].identity == sources[1].identity
    assert len({source.identity for source in sources}) == 3
    ids = [[one.id for one in source.generations] for source in sources]
    assert ids[0] == ids[1]
    assert not set(ids[0]) & set(ids[2])
    values[300, 2] += 1  # one value of 3,600
    np.save(tmp_path / "b" / "b.npy", values)
    assert open_source(tmp_path / "b").identity != sources[0].identity


@pytest.mark.parametrize("kind", ["images", "fortran", "float64", "big_endian", "safetensors"])
def test_runs_of_arrays_are_their_rows(tmp_path, kind):
    shape = (7, 5, 4) if kind in ("images", "fortran") else (ROWS_PER_PIECE * 2 + 30, 4)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stored = {
        "fortran": np.asfortranarray(values),
        "float64": values.astype(np.float64),
        "big_endian": values.astype(">f4"),
    }.get(kind, values)
    if kind == "safetensors":
        save_file({"x": torch.from_numpy(values)}, tmp_path / "a.safetensors")
    else:
        np.save(tmp_path / "a.npy", stored)
    source = open_source(tmp_path)
    for run in source.runs:
        whole = torch.cat([source.read(index, None, 0).values for index in run])
        assert torch.equal(source.read_run(run, None, 0).values.flatten(0, 1), whole)
        part = source.read_run(run, None, 0, range(1, 3), Memory())
        each = [source.read(index, None, 0) for index in run]
        assert torch.equal(part.values, torch.stack([block.values[1:3] for block in each]))
        assert torch.equal(part.positions, torch.stack([block.positions[1:3] for block in each]))
    rows = torch.cat([source.read(index, None, 0).values for index in range(len(source.generations))])
    assert torch.equal(rows, torch.from_numpy(values).flatten(0, -2))
    assert source.read_run(source.runs[-1], None, 0, range(1000, 1001)).values.shape[1] == 0
