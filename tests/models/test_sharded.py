"""A transformer sharded over two processes: half of every weight on each, and the bits of the whole network."""

import subprocess
import sys


def test_two_ranks_have_half_of_every_block_and_the_bits_of_the_whole():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "tests.models.sharded_ranks"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
