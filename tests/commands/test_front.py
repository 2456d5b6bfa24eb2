import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.commands.front import launch
from flux_ir.errors import FluxIRError
from flux_ir.options import REQUIRED, Options, option


@dataclass(frozen=True)
class Toy(Options):
    """Draw a toy.

    It is only a toy.
    """

    prompt: str = option("a cat", help="what is drawn", free_text=True, group="picture")
    width: int = option(256, help="width of the picture", unit="px", multiple_of=16, group="picture")
    num_steps: int | None = option(None, help="steps", default_text="4 for toys", minimum=1)
    seed: int | None = option(None, help="seed")
    offload: bool = option(False, help="offload")
    multi_gpu: bool = option(False, help="several GPUs")
    should_decode_intermediates: bool = option(True, help="decode")
    device: str | None = option(None, help="device")
    output_dir: Path = option(Path("output"), help="folder")
    steps: tuple[int, ...] | None = option(None, help="steps kept")
    lens: Literal["euler", "x0"] = option("euler", help="reading")


@dataclass(frozen=True)
class Needy(Options):
    """Has an option without a default."""

    generation_id: str = option(REQUIRED, help="the id a capture printed")


def parsed(*words: str) -> Toy:
    """The options that `run` gets."""
    got: list[Toy] = []
    assert launch(Toy, got.append, words, prog="toy") == 0
    return got[0]


def refused(capsys: pytest.CaptureFixture[str], *words: str, options: type[Options] = Toy) -> tuple[str, str]:
    """The error and the hint of a command line that must stop before `run`."""
    assert launch(options, lambda _: pytest.fail("it ran"), words, prog="toy") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, _, hint = captured.err.partition("\n")
    assert captured.err.count("\n") == (2 if hint else 1)
    assert error.startswith("error: ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--offload", "offload", True),
        ("--nooffload", "offload", False),
        ("--no-offload", "offload", False),
        ("--multi_gpu True", "multi_gpu", True),
        ("--multi-gpu true", "multi_gpu", True),
        ("--should_decode_intermediates=False", "should_decode_intermediates", False),
        ("--noshould_decode_intermediates", "should_decode_intermediates", False),
        ("--no-should-decode-intermediates", "should_decode_intermediates", False),
        ("--width=512", "width", 512),
        ("--width 512", "width", 512),
        ("--num-steps 4", "num_steps", 4),
        ("--num_steps=4", "num_steps", 4),
        ("--seed None", "seed", None),
        ("--seed -5", "seed", -5),
        ("--device None", "device", None),
        ("--device cuda:1", "device", "cuda:1"),
        ("--output_dir some/where", "output_dir", Path("some/where")),
        ("--steps 0,2,5", "steps", (0, 2, 5)),
        ("--lens x0", "lens", "x0"),
    ],
)
def test_every_spelling_of_a_flag_works(words, field, value):
    assert getattr(parsed(*words.split()), field) == value
    assert (
        getattr(parsed("--offload", *words.split()) if field != "offload" else parsed(*words.split()), field) == value
    )


def test_no_words_give_the_defaults():
    assert parsed() == Toy()


@pytest.mark.parametrize(
    "text",
    [
        "cat, dog", "2024", "True", "None", "a # b", "[1,2]", '{"a":1}', "", " ", "-", "--", "- a cat", "--a cat", "-5",
        "-cat",
        'say "hi"', "it's", "two\nlines", "a=b", "été 猫 🐈", "$HOME \\n `ls`", "(a", "lambda: 0", "1e5", "0x10",
    ],
)  # fmt: skip
def test_free_text_arrives_as_typed(text):
    assert parsed("--prompt", text).prompt == text
    assert parsed("--width", "32", f"--prompt={text}", "--offload").prompt == text


@pytest.mark.parametrize("text", ["--weird", "--width=3", "--no-hands", "-h", "--help"])
def test_text_that_looks_like_a_flag_is_written_with_an_equals_sign(text):
    assert parsed(f"--prompt={text}").prompt == text


def test_text_that_looks_like_a_flag_is_never_taken_for_a_value(capsys):
    error, hint = refused(capsys, "--prompt", "--weird")
    assert error == "--prompt needs a value"
    assert hint == "a text that starts with dashes is written --prompt=--weird"


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_arrives_as_typed(text):
    assert parsed(f"--prompt={text}", f"--device=x{text}") == Toy(prompt=text, device=f"x{text}")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--promt", "cat"], "--promt: no such flag; did you mean --prompt?"),
        (["--promt=cat"], "--promt: no such flag; did you mean --prompt?"),
        (["--Width", "3"], "--Width: no such flag; did you mean --width?"),
        (["-width", "3"], "-width: no such flag; did you mean --width?"),
        (["-w", "3"], "-w: no such flag; did you mean --width?"),
        (["–prompt", "cat"], "–prompt: no such flag; did you mean --prompt?"),  # noqa: RUF001 (an en dash, from an editor)
        (["--gpu"], "--gpu: no such flag; did you mean --multi_gpu?"),
        (["--noprompt"], "--noprompt: no such flag; did you mean --prompt?"),
        (["--qqq"], "--qqq: no such flag"),
        (["--"], "--: no such flag"),
        (["cat"], "'cat' follows no flag: every value is given by name"),
        (["--prompt", "a", "cat"], "'cat' follows no flag: every value is given by name"),
        (["--nooffload", "True"], "'True' follows no flag: every value is given by name"),
        (["--width", "16", "--width=32"], "--width is given twice"),
        (["--offload", "--nooffload"], "--offload is given twice"),
        (["--prompt"], "--prompt needs a value"),
        (["--width", "--offload"], "--width needs a value"),
        (["--nooffload=True"], "--nooffload takes no value: got 'True'"),
        (["--offload", "cat"], "--offload must be True or False: got 'cat'"),
        (["--offload="], "--offload must be True or False: got ''"),
        (["--width", "wide"], "--width must be a whole number: got 'wide'"),
        (["--width", "250"], "--width must be a multiple of 16: got 250"),
        (["--num_steps", "0"], "--num_steps must be at least 1: got 0"),
        (["--lens", "eulr"], "--lens must be euler or x0: got 'eulr'"),
    ],
)
def test_a_wrong_command_line_stops_at_once_with_one_line(words, error, capsys):
    assert refused(capsys, *words)[0] == error


def test_hints_say_what_to_write(capsys):
    assert refused(capsys, "--promt")[1] == "toy --help lists all flags"
    assert refused(capsys, "a cat")[1] == 'quote a text of several words: --prompt "a red circle"'
    assert refused(capsys, "--width")[1] == "write --width N"
    assert refused(capsys, "--steps", "1", "--steps", "2")[1] == "give it once, with commas between its values"
    assert refused(capsys, "--lens=eulr")[1] == "did you mean euler?"


def test_a_required_option_is_asked_for(capsys):
    assert refused(capsys, options=Needy)[0] == "--generation_id is required: the id a capture printed"
    assert launch(Needy, lambda options: int(options.generation_id == "1e5"), ["--generation_id", "1e5"]) == 1


def test_the_return_value_of_run_is_the_exit_code():
    assert launch(Toy, lambda _: None, []) == 0
    assert launch(Toy, lambda _: 3, []) == 3


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--width", "3", "--help"], ["--promt", "-h"]])
def test_help_wins_over_everything_else(words, capsys):
    assert launch(Toy, lambda _: pytest.fail("it ran"), words, prog="toy") == 0
    page = capsys.readouterr().out
    assert page.startswith("Draw a toy.\n\nusage: toy [--flag value ...]\n\nIt is only a toy.\n")


SCRIPT = """
import errno, os, signal, sys
from dataclasses import dataclass
from pathlib import Path
from flux_ir.commands.front import launch
from flux_ir.errors import FluxIRError
from flux_ir.options import Options, option

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


def test_an_error_of_the_options_themselves_is_told_like_any_other(capsys):
    @dataclass(frozen=True)
    class Strict(Options):
        """Strict."""

        width: int = option(16, help="width")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width > 16:
                raise FluxIRError("too wide")

    assert refused(capsys, "--width", "17", options=Strict) == ("too wide", "")
