"""The words of a command line: every spelling of a flag, any text as typed, and what is wrong told in one line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.commands.cli.option import REQUIRED, Options, option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.train_sae import main as train_sae
from flux_ir.errors import FluxIRError


@dataclass(frozen=True)
class Toy(Options):
    """Draw a toy.

    It is only a toy.
    """

    prompt: str = option("a cat", help="what is drawn", free_text=True, group="picture")
    width: int = option(256, help="width of the picture", unit="px", multiple_of=16, group="picture")
    num_steps: int | None = option(None, help="steps", default_text="4 for toys", minimum=1)
    seed: int | None = option(None, help="seed")
    shift: int = option(0, help="shift")
    offload: bool = option(False, help="offload")
    multi_gpu: bool = option(False, help="several GPUs")
    should_decode_intermediates: bool = option(True, help="decode")
    device: str | None = option(None, help="device")
    output_dir: Path = option(Path("output"), help="folder")
    steps: tuple[int, ...] | None = option(None, help="steps kept", elsewhere=("timestep",))
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


def test_of_many_processes_each_says_what_went_wrong_with_it(capsys, monkeypatch):
    def fail(options):
        raise FluxIRError("the disk of this machine is full", hint="look here")

    monkeypatch.setenv("RANK", "1")
    assert launch(Toy, fail, (), prog="toy") == 2
    assert capsys.readouterr().err == "rank 1: error: the disk of this machine is full\nrank 1: hint: look here\n"


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
        ("--seed 5", "seed", 5),
        ("--shift -5", "shift", -5),
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


def test_a_name_that_other_programs_have_leads_to_ours(capsys):
    error, hint = refused(capsys, "--timestep", "3")
    assert error == "--timestep: no such flag; here it is --steps"
    assert hint == "--steps N,N,..: steps kept"


@pytest.mark.parametrize(
    ("word", "ours"), [("--layer", "site"), ("--timestep", "steps"), ("--topk", "k"), ("--topk_k=8", "k")]
)
def test_the_flags_of_earlier_programs_for_autoencoders_lead_to_ours(word, ours, capsys):
    assert train_sae([word, "3"] if "=" not in word else [word]) == 2
    assert f"no such flag; here it is --{ours}\nhint: --{ours} " in capsys.readouterr().err


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


@dataclass(frozen=True)
class Journey(Options):
    """Takes its main value alone, and has a flag that is a word of Python."""

    plan: Path = option(REQUIRED, help="the plan", positional=True)
    from_: str | None = option(None, help="where to begin")


def test_a_value_may_stand_alone_where_the_option_says_so(capsys):
    got: list[Journey] = []
    for words in (["a.toml"], ["--plan", "a.toml"], ["--plan=a.toml"]):
        assert launch(Journey, got.append, words, prog="toy") == 0
    assert got == [Journey(Path("a.toml"))] * 3
    assert (
        refused(capsys, "a.toml", "b.toml", options=Journey)[0]
        == "'b.toml' follows no flag: every value is given by name"
    )
    assert refused(capsys, "a.toml", "--plan", "b", options=Journey)[0] == "--plan is given twice"
    assert refused(capsys, options=Journey)[0] == "--plan is required: the plan"


def test_a_flag_may_be_a_word_of_python(capsys):
    got: list[Journey] = []
    for words in (["a", "--from", "here"], ["a", "--from=here"]):
        assert launch(Journey, got.append, words, prog="toy") == 0
    assert got == [Journey(Path("a"), "here")] * 2
    assert refused(capsys, "a", "--form", "here", options=Journey)[0] == "--form: no such flag; did you mean --from?"
    assert refused(capsys, "a", "--from", options=Journey)[0] == "--from needs a value"
    launch(Journey, got.append, ["--help"], prog="toy")
    page = capsys.readouterr().out
    assert "usage: toy PATH [--flag value ...]" in page
    assert "--from NAME" in page
