import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.training.checkpoints import MomentShard, SavedRun, TrainingCheckpoints
from flux_ir.sae.training.optimiser import RowRange
from tests.full_disk import file_size_limit

ONE = Ranks()
NOTHING = MomentShard({}, {})


@pytest.fixture
def shard():
    moment = torch.arange(12.0).reshape(4, 3)
    return MomentShard({"encoder.first": moment}, {"encoder.first": RowRange(0, 4)})


def test_what_is_saved_comes_back(tmp_path, shard):
    state = {"step": 7, "data": {"order": [3, 1], "epoch": None}, "rate": 0.5}
    weights = {"a/W_dec": torch.eye(3), "b/W_dec": torch.zeros(2)}
    saved = SavedRun(TrainingCheckpoints(tmp_path, ONE).save(7, state, weights, shard))
    assert saved.state == state
    assert torch.equal(saved.shared["a/W_dec"], torch.eye(3))
    assert torch.equal(saved.moment("encoder.first", RowRange(1, 3)), shard.tensors["encoder.first"][1:3])


def test_the_last_two_are_kept(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, ONE)
    for step in (5, 40, 1000):
        checkpoints.save(step, {}, {"w": torch.ones(1)}, NOTHING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000040", "step_000001000"]
    assert checkpoints.newest().name == "step_000001000"


def test_half_a_checkpoint_is_never_read_and_is_cleared_away(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, ONE)
    (tmp_path / "step_000000009.partial").mkdir()
    assert checkpoints.newest() is None
    checkpoints.save(3, {}, {"w": torch.ones(1)}, NOTHING)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000003"]


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, ONE)
    checkpoints.save(3, {}, {"w": torch.ones(1)}, NOTHING)
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoints.save(4, {"loss": float("nan")}, {"w": torch.ones(1)}, NOTHING)
    assert checkpoints.newest().name == "step_000000003"


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path, shard):
    path = TrainingCheckpoints(tmp_path, ONE).save(1, {"a": [2.5, None]}, {"w": torch.ones(1)}, shard)
    assert sorted(file.name for file in path.iterdir()) == ["rank_0000.safetensors", "shared.safetensors", "state.json"]
    assert json.loads((path / "state.json").read_text()) == {"a": [2.5, None]}


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_moments_of_several_processes_are_read_by_any_number(tmp_path, readers):
    """Two processes wrote; each file is made here as its process would make it."""
    whole = torch.arange(21.0).reshape(7, 3)
    first, second = RowRange(0, 3), RowRange(3, 7)
    path = TrainingCheckpoints(tmp_path / "0", ONE).save(
        1, {}, {"w": whole}, MomentShard({"m": whole[first.slice]}, {"m": first})
    )
    other = TrainingCheckpoints(tmp_path / "1", ONE).save(
        1, {}, {"w": whole}, MomentShard({"m": whole[second.slice]}, {"m": second})
    )
    (other / "rank_0000.safetensors").rename(path / "rank_0001.safetensors")
    saved = SavedRun(path)
    cuts = [7 * reader // readers for reader in range(readers + 1)]
    parts = [saved.moment("m", RowRange(start, stop)) for start, stop in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_that_nobody_wrote_are_named(tmp_path):
    part = MomentShard({"m": torch.ones(2, 3)}, {"m": RowRange(0, 2)})
    saved = SavedRun(TrainingCheckpoints(tmp_path, ONE).save(1, {}, {"w": torch.ones(1)}, part))
    with pytest.raises(FluxIRError, match="lacks rows of m: 2 of 5"):
        saved.moment("m", RowRange(0, 5))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(FluxIRError, match=r"state\.json must be JSON(.|\n)*no checkpoint of this program"):
        SavedRun(tmp_path)


def test_a_checkpoint_that_is_not_finite_is_not_written_and_pushes_none_out(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, ONE)
    for step in (1, 2):
        checkpoints.save(step, {}, {"a/weights/W_dec": torch.ones(2)}, NOTHING)
    before = sorted(path.name for path in tmp_path.iterdir())
    broken = torch.tensor([1.0, float("nan")])
    with pytest.raises(FluxIRError, match=r"after 3 .* a/weights/W_dec is not finite, so no checkpoint") as caught:
        checkpoints.save(3, {}, {"a/weights/W_dec": broken}, NOTHING)
    assert "step_000000002 is from before, and kept" in caught.value.message
    assert "pass a lower --lr with another --name" in caught.value.hint
    with pytest.raises(FluxIRError, match=r"encoder.second is not finite"):
        checkpoints.save(3, {}, {}, MomentShard({"encoder.second": torch.tensor([float("inf")])}, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["nan", "cut", "pointer", "no state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    checkpoints = TrainingCheckpoints(tmp_path, ONE)
    for step in (1, 2):
        newest = checkpoints.save(step, {"step": step}, {"w": torch.ones(20)}, NOTHING)
    weights = newest / "shared.safetensors"
    if damage == "nan":
        save_file({"w": torch.full((20,), float("nan"))}, weights)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "pointer":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    else:
        (newest / "state.json").unlink()
    saved, faults = checkpoints.last_good()
    assert saved.state == {"step": 1}
    (fault,) = faults
    assert str(newest) in fault.message
    (tmp_path / "step_000000001" / "state.json").unlink()
    with pytest.raises(FluxIRError, match="step_000000002"):  # the newest, if none is good
        checkpoints.last_good()


def test_a_disk_that_runs_full_leaves_the_earlier_checkpoint_and_nothing_half(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, ONE)
    checkpoints.save(1, {}, {"w": torch.ones(1)}, NOTHING)
    with (
        file_size_limit(100_000),
        pytest.raises(FluxIRError, match=r"cannot write .*shared.safetensors: File too large") as caught,
    ):
        checkpoints.save(2, {}, {"w": torch.ones(100_000)}, NOTHING)
    assert "free some space" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"]
