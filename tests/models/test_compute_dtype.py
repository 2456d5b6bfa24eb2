"""bfloat16 where a device has it, float32 elsewhere; and that a CPU without it computes the same things, quickly."""

import json
import os
import subprocess
import sys

import pytest
import torch

from flux_ir.models.compute_dtype import ONEDNN_LIMITS, bfloat16_on, choose_dtype

WITHOUT_BFLOAT16 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

# Captures on a CPU without bfloat16: the last block read from the file, and the file read by the command `lens`.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from flux_ir.commands.capture import main as capture
from flux_ir.commands.lens import main as lens
from flux_ir.lens.readout import read_step
from flux_ir.models.registry import get_spec
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.checkpoints.load import load_flux
from flux_ir.recording.reader import load_capture

output = Path(sys.argv[1])
words = ["--model", "flux-tiny", "--num_steps", "2", "--seed", "1", "--prompt", "a red circle", "--sites", "single.7"]
words += ["--width", "32", "--height", "32"]
spec = get_spec("flux-tiny")
found = {}
for dtype in ("auto", "bfloat16"):
    folder = output / dtype
    here = ["--output_dir", str(folder), "--device", "cpu"]
    assert capture([*words, *here, "--dtype", dtype, "--should_decode_intermediates=False"]) == 0
    (run,) = folder.iterdir()
    recorded = load_capture(run)
    model = load_flux(spec, locate_model(spec).transformer, "cpu", recorded.dtype)
    (last,) = read_step(model, recorded, 0)
    assert lens(["--generation_id", run.name, *here]) == 0
    (metadata,) = run.glob("intermediates/metadata_*.json")
    found[dtype] = {
        "dtype": str(recorded.dtype),
        "metadata": json.loads(metadata.read_text())["dtype"],
        "reason": json.loads(metadata.read_text())["dtype_reason"],
        "equal": torch.equal(last.euler, recorded.context(1).img),
    }
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.fixture
def limited(monkeypatch):
    """This process as if oneDNN might use no bfloat16 instructions."""
    for name in ONEDNN_LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "avx512_core_vnni")


def test_auto_is_bfloat16_exactly_where_it_is_real():
    real, reason = bfloat16_on("cpu")
    chosen = choose_dtype("auto", ["cpu"])
    assert chosen.dtype == (torch.bfloat16 if real else torch.float32)
    assert str(chosen) == f"{chosen.name} ({reason})"
    assert chosen.warning is None


def test_what_was_recorded_in_float32_is_read_in_float32():
    assert choose_dtype("auto", ["cpu"], recorded=torch.float32).dtype == torch.float32
    assert choose_dtype("auto", ["cpu"], recorded=torch.bfloat16) == choose_dtype("auto", ["cpu"])
    assert choose_dtype("bfloat16", ["cpu"], recorded=torch.float32).dtype == torch.bfloat16


@pytest.mark.usefixtures("limited")
def test_a_limit_of_the_user_leaves_float32_and_bfloat16_is_said_to_be_slow():
    chosen = choose_dtype("auto", ["cpu"])
    assert chosen.dtype == torch.float32
    assert "no bfloat16 instructions" in chosen.reason or "was never measured" in chosen.reason
    forced = choose_dtype("bfloat16", ["cpu"])
    assert (forced.dtype, forced.reason) == (torch.bfloat16, "as --dtype says")
    assert forced.warning == f"bfloat16 is emulated and slow here ({chosen.reason}): float32 is many times faster"
    assert choose_dtype("float32", ["cpu"]) == (torch.float32, "as --dtype says", None)


def test_devices_that_were_never_measured_compute_in_float32():
    assert choose_dtype("auto", ["mps"]) == (torch.float32, "bfloat16 on mps was never measured", None)
    assert choose_dtype("auto", ["cpu", "mps"]).dtype == torch.float32


@pytest.mark.gpu
def test_gpus_have_bfloat16_from_ampere_on():
    real, reason = bfloat16_on("cuda:0")
    assert real is (torch.cuda.get_device_capability(0) >= (8, 0))
    assert "compute capability" in reason


def test_a_cpu_without_bfloat16_captures_in_float32_and_reads_any_capture_in_it(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "output"), str(found)]
    environment = os.environ | WITHOUT_BFLOAT16
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = json.loads(found.read_text())
    assert runs["auto"]["dtype"] == "torch.float32"
    assert runs["bfloat16"]["dtype"] == "torch.bfloat16"
    for run in runs.values():
        assert run["metadata"] == run["dtype"].removeprefix("torch.")
        assert run["equal"], run  # the last block, read from the file in its own dtype, is the sampler's step
    assert "no bfloat16 instructions" in runs["auto"]["reason"]
    assert runs["bfloat16"]["reason"] == "as --dtype says"
    told = done.stderr.splitlines()
    reason = f"float32 ({runs['auto']['reason']})"  # what the command lens says in turn of both
    assert sum(line == f"flux-tiny on cpu (as --device says), {reason}" for line in told) == 2, told
    assert sum(line.startswith("note: bfloat16 is emulated and slow here (") for line in told) == 1
    note = "note: the capture is bfloat16: its last block gives the sampler's next state but for rounding"
    assert told.count(note) == 1
