"""A short training: its words, and the command in a process of its own and in this one."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from flux_ir.commands.train_sae import main as train_sae

ROOT = Path(__file__).parents[2]
D = 12
QUICK = ("--expansion", "4", "--batch_tokens", "64", "--device", "cpu")


def start(array, saes, *words, launcher=()):
    """The real command, in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train_sae.py"), "--captures", str(array), *QUICK]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [*command, *words, "--output_dir", str(saes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def finish(array, saes, *words):
    """The same to its end in this process, with one thread as there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_sae(["--captures", str(array), *QUICK, *words, "--output_dir", str(saes)]) == 0
    finally:
        torch.set_num_threads(threads)
