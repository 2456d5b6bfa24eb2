"""A real command in a process of its own: what it prints and imports, and how it ends when something goes wrong."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import errno, os, signal, sys
from dataclasses import dataclass
from pathlib import Path
from flux_ir.commands.cli.parse import launch
from flux_ir.errors import FluxIRError
from flux_ir.commands.cli.option import Options, option

@dataclass(frozen=True)
class ToyOptions(Options):
    '''A toy.'''

    prompt: str = option("a cat", help="what is drawn", free_text=True)
    output_dir: Path = option(Path("output"), help="folder")

def run(options):
    {body}

sys.exit(launch(ToyOptions, run))
"""


@pytest.fixture
def command(tmp_path):
    """Runs a real command whose `run` has the given body."""

    def execute(body: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "toy.py"
        script.write_text(SCRIPT.format(body=textwrap.dedent(body).replace("\n", "\n    ")))
        words = (sys.executable, str(script), *words)
        return subprocess.run(
            words, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
        )

    return execute


def test_results_go_to_stdout_and_the_prompt_survives_the_shell(command):
    done = command("print(options.prompt)", "--prompt", "cat, dog # 2024")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cat, dog # 2024\n", "")


def test_an_unknown_flag_stops_before_anything_is_loaded(command, tmp_path):
    done = command("Path('ran').touch()", "--promt", "cat", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 2
    assert "error: --promt: no such flag; did you mean --prompt?\nhint: toy.py --help lists all flags\n" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not {"fire", "rich", "torch", "numpy"} & imported(done.stderr)


def test_help_imports_neither_fire_nor_anything_heavy(command):
    done = command("pass", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert done.stdout.startswith("A toy.\n\nusage: toy.py")
    assert not {"fire", "rich", "torch", "numpy", "asyncio"} & imported(done.stderr)


def imported(import_times: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in import_times.splitlines() if line.startswith("import time:")}


def test_a_mendable_error_is_one_line_and_a_hint(command):
    done = command("raise FluxIRError('the file is too\\nshort', hint='fetch it again')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the file is too short\nhint: fetch it again\n"


def test_any_other_error_keeps_its_traceback(command):
    done = command("raise ValueError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


def test_ctrl_c_says_that_what_was_finished_is_kept(command):
    done = command("os.kill(os.getpid(), signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "stopped; what was finished is kept\n")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'a/b.pt')", "a/b.pt: no space left on device"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", "here: no space left on device"),
        ("raise OSError(errno.EROFS, 'Read-only file system', 'a')", "a: read-only file system"),
        ("raise PermissionError(errno.EACCES, 'Permission denied', 'a')", "a: permission denied"),
        ("Path('f').touch(); (Path('f') / 'g').mkdir()", "f/g: not a directory"),
        ("Path('f').touch(); Path('f').mkdir(exist_ok=True)", "f: file exists"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_with_its_path(body, error, command):
    done = command(body, "--output_dir", "here")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {error}\nhint: ")
    assert done.stderr.count("\n") == 2


def test_other_failures_of_the_system_keep_their_traceback(command):
    done = command("Path('missing').read_text()")
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_met_with_silence(unbuffered, command, tmp_path):
    command("for _ in range(20_000): print('a long line of results')", "--help")
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "toy.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_the_broken_pipe_of_something_else_is_not_hidden(command):
    done = command("read, write = os.pipe(); os.close(read); os.write(write, b'frame')")
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr
