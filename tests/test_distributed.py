"""Many processes, one job: alone without torchrun's variables, together with them, and clear words for broken ones."""

import subprocess
import sys

import pytest
import torch

from flux_ir.distributed import Ranks, all_max, all_sum, arrivals, first_rank_value, joined, wait_for_all
from flux_ir.errors import FluxIRError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TOGETHER = """
import os, sys, time, torch
from pathlib import Path
from flux_ir.distributed import all_max, all_sum, arrivals, first_rank_value, joined, wait_for_all
from flux_ir.models.compute_dtype import choose_dtype
with joined() as ranks:
    assert ranks.world_size == 2 and ranks.rank in (0, 1) and ranks.local_rank == ranks.rank
    assert ranks.is_first == (ranks.rank == 0) and ranks.device("cpu") == torch.device("cpu")
    mine = torch.tensor([1.0, 10.0 ** ranks.rank], dtype=torch.float64)
    assert all_sum(mine, ranks) is mine and mine.tolist() == [2.0, 11.0], mine
    assert first_rank_value({"rank": ranks.rank}, ranks) == {"rank": 0}
    assert all_max(3 - 2 * ranks.rank, ranks) == 3
    if ranks.is_first:
        time.sleep(0.3)
    assert ranks.count("things", 5) in (5, 10)
    seen = list(arrivals("counted", ranks, seconds=0.01))
    assert seen[-1] == 2 and (ranks.is_first or seen[0] == 1), seen
    assert ranks.count("things", 0) == 10
    if not ranks.is_first:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # one machine without bfloat16: none computes in it
    chosen = choose_dtype("auto", ["cpu"], ranks=ranks)
    assert chosen.dtype == torch.float32 and chosen.reason, chosen
    assert choose_dtype("bfloat16", ["cpu"], ranks=ranks).dtype == torch.bfloat16
    wait_for_all(ranks)
    (Path(sys.argv[1]) / f"rank_{ranks.rank}").touch()
assert not torch.distributed.is_initialized()
"""


@pytest.fixture
def set_variables(monkeypatch):
    """Sets torchrun's variables to what is given, and unsets the others."""

    def set_them(**given):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_without_variables_there_is_one_process_and_no_group(set_variables):
    set_variables()
    with joined() as ranks:
        assert not torch.distributed.is_initialized()
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_first) == (0, 1, 0, True)
        value = torch.ones(2)
        assert all_sum(value, ranks) is value
        assert value.tolist() == [1.0, 1.0]
        assert all_max(2, ranks) == 2
        wait_for_all(ranks)
        assert first_rank_value("mine", ranks) == "mine"
        assert list(arrivals("here", ranks)) == [1]
        assert ranks.count("things") == 0


def test_two_processes_sum_wait_and_count_together(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    command.append(str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == ["rank_0", "rank_1"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "RANK must be a whole number below WORLD_SIZE: got RANK=2",
        ),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a whole number below WORLD_SIZE: got RANK=one"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "got RANK=-1, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "ranks meet at MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_broken_variables_are_one_clear_line(set_variables, variables, message):
    set_variables(**variables)
    with pytest.raises(FluxIRError) as caught, joined():
        pass
    assert message in caught.value.message
    assert "torchrun" in str(caught.value.hint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_every_process_needs_a_gpu_of_its_own():
    assert Ranks().device(None) == Ranks().device("cpu") == torch.device("cpu")
    with pytest.raises(FluxIRError, match="process 1 of this machine needs a GPU of its own: there are 0"):
        Ranks(1, 2, 1).device("cuda")
    with pytest.raises(FluxIRError, match="with several processes --device must be cpu or cuda: got 'cuda:0'"):
        Ranks(1, 2, 1).device("cuda:0")
