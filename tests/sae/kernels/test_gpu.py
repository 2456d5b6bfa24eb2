"""The GPU's path: interpreted on a CPU wherever Triton is installed, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flux_ir.sae.kernels.reference import AdamStep
from tests.sae.kernels.cases import CASES, assert_same_step, parameters

ROOT = Path(__file__).parents[3]


def test_interpreted_kernels_are_the_reference():
    pytest.importorskip("triton", reason="Triton comes with PyTorch for Linux only")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.sae.kernels.interpreted"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "as the reference"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dense_below", [0, 184])
def test_a_step_on_a_gpu_is_that_of_the_reference(case, dense_below, monkeypatch):
    from flux_ir.sae.kernels import gpu

    class OnGPU:
        """The GPU's path with its inputs and outputs on the CPU."""

        @staticmethod
        def encode_top_k(x, encoder, b_enc, k, *, b_dec, dead, k_aux):
            dead = None if dead is None else dead.cuda()
            code = gpu.encode_top_k(
                x.cuda(), encoder.cuda(), b_enc.cuda(), k, b_dec=b_dec.cuda(), dead=dead, k_aux=k_aux
            )
            return type(code)(*(None if one is None else one.cpu() for one in code))

        @staticmethod
        def sparse_decode(values, indices, decoder, b_dec):
            b_dec = None if b_dec is None else b_dec.cuda()
            return gpu.sparse_decode(values.cuda(), indices.cuda(), decoder.cuda(), b_dec).cpu()

    monkeypatch.setattr(gpu, "DENSE_BELOW", dense_below)
    assert_same_step(OnGPU, case)


@pytest.mark.gpu
def test_a_step_of_adam_on_a_gpu_is_that_of_the_reference():
    from flux_ir.sae.kernels import gpu, reference

    weight = parameters(CASES[0])["decoder"]
    gradient = torch.randn_like(weight)
    outcomes = []
    for path, device in ((gpu, "cuda"), (reference, "cpu")):
        own = weight.to(device, copy=True)
        moments = torch.zeros_like(own), torch.zeros_like(own)
        for number in range(1, 4):
            path.adam_rows_(own, gradient.to(device, copy=True), *moments, AdamStep(number, lr=0.01, unit_rows=True))
        outcomes.append(own.cpu())
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)
