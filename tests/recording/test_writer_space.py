"""Complete or absent where the disk is full or the process is killed: no file under a final name is broken."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.recording.reader import load_capture
from flux_ir.recording.writer import CaptureWriter, file_bytes
from flux_ir.sites import Site
from tests.recording.cases import left_in


def test_a_capture_larger_than_the_disk_is_refused_at_once(tmp_path, plan):
    asked = plan(img_tokens=10**9, timesteps=[i / 20 for i in range(21)])  # 30 TB
    with pytest.raises(FluxIRError) as caught, CaptureWriter(tmp_path / "c.pt", asked):
        pytest.fail("the body must not run")
    assert "c.pt" in caught.value.message
    assert "are free" in caught.value.message
    assert "--steps" in (caught.value.hint or "")
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, plan):
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxIRError, match="cannot write"), CaptureWriter(tmp_path / "file" / "c.pt", plan()):
        pytest.fail("the body must not run")


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from flux_ir.recording.writer import CaptureWriter, file_bytes
from flux_ir.errors import FluxIRError
{setup}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]) % file_bytes(plan), resource.RLIM_INFINITY))
try:
    with CaptureWriter(Path(sys.argv[1]), plan):
        print("entered")
except FluxIRError as error:
    print(error.message)
"""


SETUP = """
from flux_ir.recording.recorder import Recorder, StepContext
from flux_ir.recording.plan import CapturePlan
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.sites import block_outputs
params = FluxParams(64, 64, 24, 40, 64, 4.0, 4, 2, 3, (4, 6, 6), 10_000, True, False)
plan = CapturePlan(params, block_outputs(2, 3), [1.0, 0.5, 0.0], txt_tokens=7, img_tokens=12, guidance=1.0, metadata={},
                   dtype=torch.float32)
"""


def program(text, *arguments):
    return [sys.executable, "-c", text, *map(str, arguments)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
@pytest.mark.parametrize("limit", [-1000, 5000, 0])
def test_space_that_cannot_be_taken_is_said_before_anything_is_computed(tmp_path, limit):
    done = subprocess.run(
        program(LIMITED.format(setup=SETUP), tmp_path / "c.pt", limit), capture_output=True, text=True, check=True
    )
    assert "c.pt: File too large (it needs " in done.stdout
    assert "entered" not in done.stdout
    assert left_in(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("swallowed", [True, False])
def test_a_disk_that_runs_full_while_writing_stops_the_producer_and_leaves_no_file(tmp_path, plan, swallowed):
    asked = plan(img_tokens=5000)  # the thread does not wake for less than a megabyte
    writer, site = CaptureWriter(tmp_path / "c.pt", asked), Site("single", 0)
    seen = []

    def capture():
        with writer, Path("/dev/full").open("wb") as full:
            os.dup2(full.fileno(), writer._filler.file.fileno())  # from here on the thread meets a full disk
            writer.write(0, site, torch.zeros(asked.shape(site)))
            writer._filler._thread.join(60)
            try:
                writer.write(1, site, torch.zeros(asked.shape(site)))
            except FluxIRError as error:
                seen.append(error)
                if not swallowed:
                    raise
            writer._missing.clear()  # a caller that goes on must not end up with a file

    with pytest.raises(FluxIRError) as caught:
        capture()
    assert seen == [caught.value]
    assert "c.pt: No space left on device" in caught.value.message
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert left_in(tmp_path) == []


# Forks one process per moment; each kills itself, without any chance to clean up, at that call of the sink.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from flux_ir.recording.writer import CaptureWriter
{setup}
torch.set_num_threads(1)
folder = Path(sys.argv[1])
values = {{site: torch.randn(plan.shape(site)) for site in plan.sites}}

class Dying(CaptureWriter):
    calls = 0
    def _put(self, *arguments):
        if self.calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        super()._put(*arguments)

def capture():
    with Dying(folder / f"capture_{{moment}}.pt", plan) as writer:
        for step in range(2):
            writer.begin_step(step, StepContext(torch.zeros(plan.img_shape), torch.zeros(plan.y_shape), 7))
            for site in plan.sites:
                writer.write(step, site, values[site])

for moment in [0, 1, 2, 7, 11, 17, 18]:
    if (child := os.fork()) == 0:
        capture()
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_killed_process_leaves_nothing_under_a_final_name(tmp_path):
    done = subprocess.run(program(KILLED.format(setup=SETUP), tmp_path), capture_output=True, text=True, check=True)
    exits = dict(map(int, line.split()) for line in done.stdout.splitlines())
    assert exits == {**dict.fromkeys([0, 1, 2, 7, 11, 17], -signal.SIGKILL), 18: 0}
    assert left_in(tmp_path) == sorted([*(f"capture_{i}.pt.partial" for i in (0, 1, 2, 7, 11, 17)), "capture_18.pt"])
    assert load_capture(tmp_path / "capture_18.pt").steps == [0, 1]


def test_what_a_killed_process_left_is_written_over(tmp_path, plan, run):
    (tmp_path / "c.pt.partial").write_bytes(b"x" * 10**6)
    run(tmp_path / "c.pt", plan())
    assert left_in(tmp_path) == ["c.pt"]
    assert (tmp_path / "c.pt").stat().st_size == file_bytes(plan())
    assert torch.load(tmp_path / "c.pt", weights_only=True)["metadata"]["seed"] == 7
