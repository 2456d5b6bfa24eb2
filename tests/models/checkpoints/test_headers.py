"""Safetensors files told from broken ones and from other kinds, without reading a tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.formats.weights import join_weights, read_entries
from flux_ir.models.checkpoints.headers import read_tensor, shards


@pytest.fixture
def state():
    return {"a.weight": torch.zeros(3, 5), "b.bias": torch.zeros(7, dtype=torch.bfloat16)}


def test_entries_say_where_and_how_large_each_tensor_is(tmp_path, save, state):
    path = save(state, tmp_path / "some.safetensors")
    entries = read_entries(path)
    data = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    first = min(entries["a.weight"].offset, entries["b.bias"].offset)
    assert first == data
    assert entries["a.weight"]._replace(offset=0) == (path, "a.weight", (3, 5), "F32", 60, 0, None)
    assert entries["b.bias"]._replace(offset=0) == (path, "b.bias", (7,), "BF16", 14, 0, None)


def test_the_bytes_at_an_offset_are_the_values(tmp_path, save):
    state = {"a": torch.arange(5, dtype=torch.float32), "b": torch.arange(7, dtype=torch.int32)}
    path = save(state, tmp_path / "some.safetensors")
    for name, entry in read_entries(path).items():
        held = path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert held == state[name].numpy().tobytes()


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


def test_a_stale_copy_in_another_shard_counts_for_nothing(tmp_path, save, save_sharded, state):
    index = save_sharded(state, tmp_path, "model")
    second = shards(index)[1]
    save(load_file(second) | {"a.weight": torch.ones(3, 5)}, second)
    entry = read_entries(index)["a.weight"]
    assert entry.file == shards(index)[0]
    assert torch.equal(read_tensor(entry), state["a.weight"])


def test_a_tensor_that_moved_to_another_shard_is_noticed(tmp_path, save, save_sharded, state):
    index = save_sharded(state, tmp_path, "model")
    first, second = shards(index)
    save(load_file(second) | load_file(first), second)
    save({"c": torch.zeros(1)}, first)
    with pytest.raises(FluxIRError, match=r"a\.weight \(the first should be in model-00001-of-00002"):
        read_entries(index)


def test_shards_of_another_version_in_the_folder_are_named(tmp_path, save, save_sharded, state):
    index = save_sharded(state, tmp_path, "model")
    save(state, tmp_path / "model-00001-of-00003.safetensors")
    save(state, tmp_path / "model.fp16-00001-of-00003.safetensors")  # another set, with an index of its own
    with pytest.raises(
        FluxIRError, match=r"shards that it does not list: model-00001-of-00003\.safetensors \("
    ) as error:
        read_entries(index)
    assert "delete those that do not belong to the index" in error.value.hint


# ---- float8 with scales, and types that hold no plain weights


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5, 2.0]), torch.ones(2, 1)])
def test_a_scale_beside_a_weight_is_applied_exactly(tmp_path, save, leaf, scale):
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).to(torch.float8_e4m3fn)
    state = {"a.weight": values, f"a.{leaf}": scale, "a.bias": torch.ones(2)}
    state |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "a.scale_input": torch.ones(())}
    weights = join_weights(read_entries(save(state, tmp_path / "a.safetensors")), "a", hint="b")
    assert list(weights) == ["a.bias", "a.weight"]
    assert torch.equal(read_tensor(weights["a.weight"]), values.float() * scale.reshape(-1, 1))
    assert torch.equal(read_tensor(weights["a.bias"]), torch.ones(2))


def test_scales_per_block_are_refused(tmp_path, save):
    state = {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(2, 2)}
    with pytest.raises(FluxIRError, match=r"one number or one for each row: .* a\.weight \(4, 4\) is F32 \(2, 2\)"):
        join_weights(read_entries(save(state, tmp_path / "a.safetensors")), "a", hint="b")


def test_codes_of_a_quantisation_are_not_taken_for_weights(tmp_path, save):
    state = {"a.weight": torch.zeros(4, dtype=torch.uint8), "b.weight": torch.zeros(4, dtype=torch.int8)}
    with pytest.raises(FluxIRError) as error:
        join_weights(read_entries(save(state, tmp_path / "a.safetensors")), "the file a", hint="b")
    assert error.value.message == (
        "the file a holds quantised weights, and nothing says of what format: "
        "1 tensors of type I8 and 1 tensors of type U8, first b.weight"
    )


@pytest.mark.parametrize(
    ("start", "words"),
    [(b"\x80\x02 and more", "it is a pickle"), (b"PK\x03\x04 and more", "it is a pickle")],
)
def test_other_kinds_of_weight_files_are_called_what_they_are(tmp_path, start, words):
    path = tmp_path / "some.safetensors"
    path.write_bytes(start)
    with pytest.raises(FluxIRError, match=words):
        read_entries(path)


def test_broken_index_is_an_error_naming_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(FluxIRError, match=r"index\.json must be a JSON object"):
        read_entries(index)


def test_unreadable_path_is_one_line(tmp_path):
    with pytest.raises(FluxIRError, match="cannot be read"):
        read_entries(tmp_path)
