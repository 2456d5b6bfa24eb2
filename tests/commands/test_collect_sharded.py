"""`flux-ir collect --fsdp`: the command as torchrun starts it, and what it refuses."""

import subprocess
import sys

import pytest

from flux_ir.api.collect import CollectArguments, settle_collection
from flux_ir.commands.collect import main
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from tests.collecting.small_jobs import files_of

WORDS = "--model flux-tiny --sites double.1.img,single.1 --steps 0 --width 64 --height 48 --num_steps 2 --device cpu"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square\na green triangle\n")
    return path


def test_two_processes_write_the_files_of_one(prompts, tmp_path):
    words = [*WORDS.split(), "--prompts", str(prompts), "--batch_size", "2", "--output_dir"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "flux_ir", "collect", "--fsdp", *words, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 processes, each on a cpu device, the transformer's blocks sharded over all" in done.stderr
    assert main([*words, str(tmp_path / "one")]) == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_one_process_is_refused_in_one_line(prompts, tmp_path, capsys):
    words = [*WORDS.split(), "--prompts", str(prompts), "--output_dir", str(tmp_path / "none"), "--fsdp"]
    assert main(words) == 2
    assert "--fsdp shards the transformer over processes: there is one" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"offload": "blocks"}, "--fsdp keeps a part of every weight on each device, --offload is for"),
        ({"vram_gb": 8.0}, "--vram_gb is for a network of one process"),
        ({"multi_gpu": "blocks"}, "--multi_gpu is for one process that has several GPUs: got 2 processes"),
    ],
)
def test_other_ways_to_save_memory_are_refused_beside_it(prompts, tmp_path, other, message):
    asked = CollectArguments(
        prompts=prompts, sites="double.1.img", output_dir=tmp_path / "none", model="flux-tiny", fsdp=True, **other
    )
    with pytest.raises(FluxIRError, match=message):
        settle_collection(asked, Ranks(1, 2, 0))
