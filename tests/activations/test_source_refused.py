"""What cannot be read as tokens: nothing there, half-written or mixed files, places that were not captured."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_ir.activations.source import open_source
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site
from tests.recording.cases import SITES


def read_all(path):
    source = open_source(path)
    for number in range(len(source.generations)):
        source.read(number, (list(source.sites) or [None])[0], source.steps[0])


def message(path):
    with pytest.raises(FluxIRError) as caught:
        read_all(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_nothing_there_is_said(tmp_path):
    assert "there is nothing at" in message(tmp_path / "nowhere")
    assert "holds no activations" in message(tmp_path)
    (tmp_path / "a.pt.partial").write_bytes(b"")
    assert "holds only 1 unfinished files" in message(tmp_path)
    (tmp_path / "text.txt").write_text("")
    assert "no file of activations" in message(tmp_path / "text.txt")


def test_a_half_written_capture_is_named(tmp_path, write):
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.pt", number)
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:-500])
    assert "b.pt is not a complete capture file" in message(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "other"}, "the same model: .*b.pt has other, .*a.pt has tiny"),
        ({"width": 32}, "the same widths: .*b.pt has 32, 128, .*a.pt has 64, 256"),
        ({"img_tokens": 20}, "the same tokens"),
        ({"steps": [0]}, "the same steps: .*b.pt has 0, .*a.pt has 0, 2"),
        ({"sites": SITES[:2]}, "the same sites"),
    ],
)
def test_captures_that_do_not_belong_together_are_named(tmp_path, write, changes, says):
    write(tmp_path / "a.pt", 0)
    write(tmp_path / "b.pt", 1, **changes)
    with pytest.raises(FluxIRError, match=says):
        open_source(tmp_path)


def test_several_pictures_in_one_capture_are_refused(tmp_path, write):
    write(tmp_path / "a.pt", 0, batch=2)
    assert "holds one picture" in message(tmp_path)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((5, 4), np.int64), "float16, bfloat16, float32 or float64: .* is int64"),
        (np.zeros(5, np.float32), r"is \[5\]"),
        (np.zeros((0, 4), np.float32), r"is \[0, 4\]"),
        (np.zeros((2, 2, 2, 2), np.float32), r"\[tokens, d\] or \[images, tokens, d\]"),
    ],
)
def test_arrays_that_are_no_activations_are_refused(tmp_path, array, says):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(FluxIRError, match=says):
        open_source(tmp_path / "x.npy")


def test_half_written_and_mixed_arrays_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 4), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((5, 8), np.float32))
    assert "the same width: " in message(tmp_path)
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    assert "b.npy is not a complete array" in message(tmp_path)
    save_file({"x": torch.zeros(50, 4)}, tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-8])
    assert "c.safetensors is not a complete array" in message(tmp_path / "c.safetensors")
    save_file({"x": torch.zeros(5, 4), "y": torch.zeros(5, 4)}, tmp_path / "d.safetensors")
    assert "holds 2 tensors" in message(tmp_path / "d.safetensors")


def test_plain_arrays_have_no_sites_and_one_step(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 4), np.float32))
    source = open_source(tmp_path)
    with pytest.raises(FluxIRError, match=r"has no sites: got single\.0"):
        source.d(Site.parse("single.0"))
    with pytest.raises(FluxIRError, match="has the step 0 only: got 1"):
        source.read(0, None, 1)


def test_a_shard_and_arrays_beside_shards_are_told(tmp_path, collection):
    folder, _ = collection(1)
    (shard,) = (folder / "shards").iterdir()
    assert f"a collection is opened as a whole: {shard} is a shard" in message(shard)
    (folder / "more.safetensors").write_bytes(shard.read_bytes())
    assert "is a collection and holds more.safetensors" in message(folder)


@pytest.mark.parametrize("pair", [("a.safetensors", "b.npy"), ("a.npy", "b.pt"), ("a.safetensors", "exported")])
def test_a_folder_of_two_kinds_names_both(tmp_path, pair, write):
    for name in pair:
        if name.endswith(".npy"):
            np.save(tmp_path / name, np.zeros((5, 4), np.float32))
        elif name.endswith(".pt"):
            write(tmp_path / name)
        else:
            key = "x" if name.endswith(".safetensors") else "single.0/step_0"
            save_file({key: torch.zeros(5, 4)}, tmp_path / f"{name.split('.')[0]}.safetensors")
    assert "holds one kind of them" in message(tmp_path)
