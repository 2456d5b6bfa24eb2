"""The first command stopped in the middle: what was finished is kept, and no file is broken."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from flux_ir.recording.reader import load_capture
from tests.commands.run_folder import BLOCKS, SCRIPT, pixels_of, tensors_of

# The words make a run long enough to be met in the middle of a phase.
SAMPLING = ("--num_steps", "3000", "--sites", "single.0.txt", "--should_decode_intermediates", "False")
DECODING = ("--num_steps", "8", "--lens", "both")


@pytest.fixture
def start(output):
    """Starts the command in a process of its own."""
    started = []

    def begin(*words):
        command = [sys.executable, str(SCRIPT), "--model", "flux-tiny", *words, "--output_dir", str(output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process, condition):
    """Until something is there. The process must not end before."""
    for _ in range(30_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail("it never came")


def sampling_began(process):
    """The note on an unknown word is the last thing said before the first step."""
    for line in process.stderr:
        if line.startswith("note: "):
            break
    time.sleep(0.2)


def decoded_in(output):
    return list(output.glob("*/intermediates/decoded*/*/*.jpg"))


def check_whole(output):
    """Every file with a final name is complete."""
    for path in [path for path in output.rglob("*") if path.is_file()]:
        if path.suffix == ".jpg":
            pixels_of(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            tensors_of(path)
        else:
            assert path.suffix == ".partial"


def test_ctrl_c_while_sampling_leaves_nothing(start, tmp_path):
    process = start("--prompt", "cat", *SAMPLING)
    sampling_began(process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "stopped; what was finished is kept"
    assert "Traceback" not in stderr
    assert re.fullmatch(r"generation id: [0-9a-f]{8}\n", stdout)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_decoding_keeps_what_is_finished(start, output):
    process = start("--prompt", "a red circle", *DECODING)
    wait_for(process, lambda: decoded_in(output))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "stopped; what was finished is kept"
    assert "Traceback" not in stderr
    (folder,) = output.iterdir()
    assert (folder / "img_0.jpg").is_file()
    assert load_capture(folder).steps == list(range(8))
    assert 0 < len(decoded_in(output)) < 8 * 2 * len(BLOCKS)
    assert not list(output.rglob("*.partial"))
    check_whole(output)


def test_a_killed_run_leaves_no_broken_file_under_a_final_name(start, output):
    process = start("--prompt", "a red circle", *DECODING)
    wait_for(process, lambda: decoded_in(output))
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    check_whole(output)
    assert len(decoded_in(output)) < 8 * 2 * len(BLOCKS)
