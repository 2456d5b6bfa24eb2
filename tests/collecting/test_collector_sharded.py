"""Collecting with a transformer that is sharded over ranks: in step with uneven shares, and the files of one process.

Every job is two processes on the CPU, started by torchrun, whose all-gathers are gloo's. Were they not in step, they
would wait for each other for ever.
"""

import re
import subprocess
import sys

import pytest

from flux_ir.collecting.collector import Collector
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.placement import Placement
from flux_ir.models.suite import Suite
from tests.collecting.sharded_job import settings
from tests.collecting.small_jobs import SPEC, collected, files_of, new_suite, settings_of


def run_sharded(folder, case):
    """Runs the job; returns how many generations each rank made."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.collecting.sharded_job", str(folder), case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"rank (\d): (\d+) made", done.stdout))
    return int(told["0"]), int(told["1"])


@pytest.fixture
def of_one_process(tmp_path, small_shards):
    """Collects with one process, the network whole."""

    def run(case):
        folder = tmp_path / "one"
        collected(folder, settings(case), new_suite(autoencoder=settings(case).save_images))
        return files_of(folder)

    return run


@pytest.mark.parametrize(
    ("case", "shares"), [("inside a block", (3, 2)), pytest.param("to the end", (2, 1), marks=pytest.mark.slow)]
)
def test_files_are_those_of_one_process(of_one_process, tmp_path, case, shares):
    assert run_sharded(tmp_path / "two", case) == shares
    assert files_of(tmp_path / "two") == of_one_process(case)


@pytest.mark.slow
def test_going_on_where_one_rank_has_nothing_to_do_and_again_where_none_has(of_one_process, tmp_path):
    folder, whole = tmp_path / "two", of_one_process("uneven")
    assert run_sharded(folder, "uneven") == (3, 2)
    assert files_of(folder) == whole
    (folder / "shards" / "000001.safetensors").unlink()  # of rank 1
    assert run_sharded(folder, "uneven") == (0, 2)
    assert run_sharded(folder, "uneven") == (0, 0)
    assert files_of(folder) == whole


def test_a_gpu_needs_a_batch_size(tmp_path):
    whole = new_suite()
    gpu = Placement(*["cuda:0"] * 5, offload="none", reason="a test")
    suite = Suite(SPEC, whole.source, gpu, whole.dtype, sharded_over=2)
    with pytest.raises(FluxIRError, match="on GPUs --fsdp needs a --batch_size"):
        Collector(settings_of(batch_size=None), suite, LocalStorage(tmp_path), Ranks())
