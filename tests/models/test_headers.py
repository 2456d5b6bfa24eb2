"""Safetensors files told from broken ones and from other kinds, without reading a tensor."""

import json

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.headers import read_entries, shards


@pytest.fixture
def state():
    return {"a.weight": torch.zeros(3, 5), "b.bias": torch.zeros(7, dtype=torch.bfloat16)}


def test_entries_say_where_and_how_large_each_tensor_is(tmp_path, save, state):
    path = save(state, tmp_path / "some.safetensors")
    entries = read_entries(path)
    assert entries["a.weight"] == (path, "a.weight", (3, 5), "F32", 60)
    assert entries["b.bias"] == (path, "b.bias", (7,), "BF16", 14)


def test_shards_are_read_through_their_index(tmp_path, save_sharded, state):
    index = save_sharded(state, tmp_path, "model")
    entries = read_entries(index)
    assert {name: entry.file.name for name, entry in entries.items()} == {
        "a.weight": "model-00001-of-00002.safetensors",
        "b.bias": "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("kept_bytes", [-1, 40, 12])
def test_file_that_is_cut_short_is_named_with_both_sizes(tmp_path, save, state, kept_bytes):
    path = save(state, tmp_path / "some.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:kept_bytes])
    with pytest.raises(FluxIRError, match=r"some\.safetensors is cut short: it has \d+ bytes .* promises \d+"):
        read_entries(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 a pickle", b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0nope", b'\x07\0\0\0\0\0\0\0{"a":1}'],
)
def test_file_of_another_kind_is_not_taken_for_a_safetensors_file(tmp_path, content):
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    with pytest.raises(FluxIRError, match="is not a safetensors file"):
        read_entries(path)


def test_pointer_left_by_git_lfs_is_recognised(tmp_path):
    path = tmp_path / "some.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23800000000\n")
    with pytest.raises(FluxIRError, match="Git LFS pointer") as error:
        read_entries(path)
    assert "git lfs pull" in error.value.hint


def test_missing_shard_is_named(tmp_path, save_sharded, state):
    index = save_sharded(state, tmp_path, "model")
    shards(index)[1].unlink()
    with pytest.raises(FluxIRError, match=r"shards that are not there: model-00002-of-00002\.safetensors"):
        read_entries(index)


def test_index_of_another_version_is_noticed(tmp_path, save_sharded, state):
    index = save_sharded(state, tmp_path, "model")
    stored = json.loads(index.read_text())
    stored["weight_map"]["c.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(stored))
    with pytest.raises(FluxIRError, match=r"lack 1 of the tensors it lists: c\.weight"):
        read_entries(index)


def test_broken_index_is_an_error_naming_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(FluxIRError, match=r"index\.json must be an index of shards"):
        read_entries(index)


def test_unreadable_path_is_one_line(tmp_path):
    with pytest.raises(FluxIRError, match="cannot be read"):
        read_entries(tmp_path)
