"""The same training in one process, which is this one, and in two, started as a user starts them, with gloo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_ir.distributed import Ranks
from flux_ir.sae.architectures.config import ARCHITECTURES
from flux_ir.sae.training.checkpoints import SavedRun

PROGRAM = Path(__file__).with_name("training_program.py")
SETTINGS = (*ARCHITECTURES, "resample", "whiten")
_SPEC = importlib.util.spec_from_file_location("training_program", PROGRAM)
program = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(program)


def run_in_one(out, steps, *words):
    """Train in this process, and return the weights, averages and counters at the end by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program.main(out, steps, *words)
    finally:
        torch.set_num_threads(threads)
    return load_file(out)


def run_in_two(out, steps, *words):
    """The same in two processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(PROGRAM), str(out), str(steps), *words]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=alone | {"OMP_NUM_THREADS": "1"}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)


def assert_equal_weights(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    """Every architecture after 8 steps in one process."""
    return run_in_one(tmp_path_factory.mktemp("one") / "weights", 8, *SETTINGS)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """The same in two processes that shard their optimiser, the first 5 steps and a checkpoint by themselves."""
    folder = tmp_path_factory.mktemp("two")
    run_in_two(folder / "weights", 5, *SETTINGS, "shard", "save")
    return folder


@pytest.mark.slow
def test_two_processes_from_start_to_end_have_the_weights_of_one(in_one, tmp_path):
    assert_equal_weights(in_one, run_in_two(tmp_path / "weights", 8, *SETTINGS))


def test_every_process_saves_the_moments_it_keeps(in_two):
    files = sorted(path.name for path in (in_two / "step_000000005").iterdir())
    assert files == ["rank_0000.safetensors", "rank_0001.safetensors", "shared.safetensors", "state.json"]
    first, second = (load_file(in_two / "step_000000005" / name)["topk_s0/encoder.first"] for name in files[:2])
    assert (len(first), len(second)) == (15, 16)
    assert (first != 0).any()
    assert (second != 0).any()


@pytest.mark.parametrize("go_on", [run_in_one, run_in_two])
def test_two_sharded_processes_and_one_or_two_others_end_with_the_weights_of_one(in_one, in_two, tmp_path, go_on):
    """Also the thresholds, which are statistics of the batch, and the counters of dead features, which are sums."""
    assert_equal_weights(in_one, go_on(tmp_path / "weights", 3, *SETTINGS, f"from={in_two / 'step_000000005'}"))


def test_dead_counters_are_in_tokens_of_all_processes(in_two):
    """A feature that fired in the other process's share alone is not dead, and both shares count."""
    counter = SavedRun(in_two / "step_000000005").shared["topk_s0/tokens_since_fired"]
    assert set(counter.tolist()) <= {32 * steps for steps in range(6)}
    assert (counter == 0).sum() > 0


def test_the_device_of_a_process_is_the_one_of_its_number_on_its_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Ranks(rank=6, world_size=8, local_rank=2).device("cuda") == torch.device("cuda:2")
    assert Ranks(rank=6, world_size=8, local_rank=2).device(None) == torch.device("cuda:2")
