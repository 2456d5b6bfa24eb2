import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from flux_ir.commands.cli.option import REQUIRED, Flag, Options, command_line, flags, option
from flux_ir.commands.cli.parse import parse
from flux_ir.commands.steer import SteerOptions
from flux_ir.errors import FluxIRError


@dataclass(frozen=True)
class Drawing(Options):
    """Draw something."""

    title: str = option(REQUIRED, help="what it is called")
    prompt: str | None = option("a cat", help="what is drawn", free_text=True)
    width: int | None = option(None, help="width", unit="px", minimum=16, multiple_of=16)
    seed: int = option(0, help="seed", minimum=0, maximum=2**32)
    strength: float = option(1.0, help="strength", maximum=10)
    quick: bool = option(False, help="whether to hurry")
    lens: Literal["euler", "x0"] = option("euler", help="how it is read")
    side: Literal[2, 4] = option(2, help="side")
    model: str = option("big", help="model", choices=("big", "small"))
    folder: Path = option(Path("output"), help="where it goes")
    steps: tuple[int, ...] | None = option(None, help="steps")
    sites: tuple[str, ...] = option(("double.*",), help="sites")
    weights: tuple[float, ...] | None = option(None, help="weights")
    kinds: tuple[Literal["img", "txt"], ...] | None = option(None, help="kinds")


@dataclass(frozen=True)
class Exclusive(Options):
    """Options with a rule of their own."""

    offload: bool = option(False, help="offload")
    multi_gpu: bool = option(False, help="several GPUs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload and self.multi_gpu:
            raise FluxIRError("--offload and --multi_gpu exclude each other")


def flag(name: str) -> Flag:
    return next(flag for flag in flags(Drawing) if flag.name == name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "12", 12),
        ("width", "None", None),
        ("width", "none", None),
        ("width", "512", 512),
        ("strength", "3", 3.0),
        ("strength", "1e-3", 0.001),
        ("strength", "-2.5", -2.5),
        ("quick", "True", True),
        ("quick", "false", False),
        ("quick", "0", False),
        ("lens", "x0", "x0"),
        ("side", "4", 4),
        ("folder", "some where/else", Path("some where/else")),
        ("steps", "0,2,5", (0, 2, 5)),
        ("steps", "7, 0-3", (7, 0, 1, 2, 3)),
        ("steps", "[0,2]", (0, 2)),
        ("steps", "(4)", (4,)),
        ("steps", "None", None),
        ("sites", "double.*.img, single.3[0-9]", ("double.*.img", "single.3[0-9]")),
        ("weights", "0.5,2", (0.5, 2.0)),
        ("kinds", "img,txt", ("img", "txt")),
        ("title", "None", "None"),
        ("title", " 2024 ", " 2024 "),
        ("prompt", "None", "None"),
        ("prompt", "", ""),
        ("prompt", "[1,2] # {'a': 1}", "[1,2] # {'a': 1}"),
    ],
)
def test_text_is_read_as_the_type_of_its_field(name, text, value):
    read = flag(name).read(text)
    assert read == value
    assert type(read) is type(value)
    flag(name).check(read)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("seed", "wide", "--seed must be a whole number: got 'wide'"),
        ("seed", "2.0", "--seed must be a whole number: got '2.0'"),
        ("seed", "None", "--seed must be a whole number: got 'None'"),
        ("width", "", "--width must be a whole number or None: got ''"),
        ("strength", "much", "--strength must be a number: got 'much'"),
        ("quick", "perhaps", "--quick must be True or False: got 'perhaps'"),
        ("side", "two", "--side must be a whole number: got 'two'"),
        ("folder", "", "--folder must be a path: got ''"),
        ("steps", "0,two", "--steps must be whole numbers separated by commas or None: got '0,two'"),
        ("steps", "3-1", "--steps must be whole numbers separated by commas or None: got '3-1'"),
        ("sites", "a,,b", "--sites must be names separated by commas: got 'a,,b'"),
        ("sites", "", "--sites must be names separated by commas: got ''"),
    ],
)
def test_text_of_another_type_is_refused(name, text, message):
    with pytest.raises(FluxIRError) as error:
        flag(name).read(text)
    assert error.value.message == message


@pytest.mark.parametrize(
    ("name", "value", "message", "hint"),
    [
        ("width", 250, "--width must be a multiple of 16: got 250", "use 240 or 256"),
        ("width", 20, "--width must be a multiple of 16: got 20", "use 16 or 32"),
        ("width", 0, "--width must be at least 16: got 0", "use 16 or more"),
        ("width", "256", "--width must be a whole number or None: got '256'", None),
        ("seed", True, "--seed must be a whole number: got True", None),
        ("seed", None, "--seed must be a whole number: got None", None),
        ("seed", 2**32 + 1, "--seed must be at most 4294967296: got 4294967297", "use 4294967296 or less"),
        ("strength", float("nan"), "--strength must be a finite number: got nan", None),
        ("strength", float("inf"), "--strength must be a finite number: got inf", None),
        ("strength", 11, "--strength must be at most 10: got 11", "use 10 or less"),
        ("quick", 1, "--quick must be True or False: got 1", None),
        ("lens", "eulr", "--lens must be euler or x0: got 'eulr'", "did you mean euler?"),
        ("model", "smal", "--model must be big or small: got 'smal'", "did you mean small?"),
        ("model", "zzz", "--model must be big or small: got 'zzz'", None),
        ("side", 3, "--side must be 2 or 4: got 3", None),
        ("folder", "output", "--folder must be a path: got 'output'", None),
        (
            "steps",
            (),
            "--steps must be whole numbers separated by commas or None: got ()",
            "write them like 0,2,5 or 0-3",
        ),
        (
            "steps",
            [1],
            "--steps must be whole numbers separated by commas or None: got [1]",
            "write them like 0,2,5 or 0-3",
        ),
        ("kinds", ("img", "text"), "--kinds must be img or txt: got 'text'", "did you mean txt?"),
    ],
)
def test_a_value_out_of_bounds_is_refused_on_construction(name, value, message, hint):
    with pytest.raises(FluxIRError) as error:
        Drawing(title="x", **{name: value})
    assert error.value.message == message
    assert error.value.hint == hint


def test_a_whole_number_is_a_number():
    assert Drawing(title="x", strength=3).strength == 3


def test_several_values_may_be_none_where_that_is_the_default():
    assert SteerOptions(edit=Path("edit.json")).feature == ()
    with pytest.raises(FluxIRError, match="--strength must be numbers separated by commas"):
        SteerOptions(strength=())


def test_a_leading_tilde_is_the_home_folder():
    assert flag("folder").read("~/pictures") == Path.home() / "pictures"
    with pytest.raises(FluxIRError, match="must be a path"):
        flag("folder").read("~nobody-of-this-name/pictures")


def test_options_are_frozen_and_a_required_one_has_no_default():
    with pytest.raises(FrozenInstanceError):
        Drawing(title="x").seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError, match="title"):
        Drawing()
    assert [flag.name for flag in flags(Drawing) if flag.required] == ["title"]


def test_a_command_adds_rules_of_its_own():
    assert Exclusive(offload=True).offload
    with pytest.raises(FluxIRError, match="exclude each other"):
        Exclusive(offload=True, multi_gpu=True)
    with pytest.raises(FluxIRError, match="--offload must be True or False"):
        Exclusive(offload=1)  # type: ignore[arg-type]


def test_flags_keep_the_order_and_the_facts_of_the_fields():
    assert [flag.name for flag in flags(Exclusive)] == ["offload", "multi_gpu"]
    width = flag("width")
    assert (width.kind, width.optional, width.many, width.default) == (int, True, False, None)
    assert (width.facts.help, width.facts.unit, width.facts.multiple_of) == ("width", "px", 16)
    assert flag("lens").choices == ("euler", "x0")


def test_a_field_without_help_or_of_a_foreign_type_is_refused():
    @dataclass(frozen=True)
    class Silent(Options):
        width: int = 256

    @dataclass(frozen=True)
    class Foreign(Options):
        table: dict[str, int] | None = option(None, help="a table")

    with pytest.raises(TypeError, match="width: every field"):
        flags(Silent)
    with pytest.raises(TypeError, match="table: no flag"):
        flags(Foreign)


def test_options_as_they_are_typed_give_the_same_options():
    drawing = Drawing(title="cat, \u00e9", prompt="--a# 'b'", width=None, quick=True, folder=Path("a b"), steps=(0, 2))
    line = command_line(drawing, seed=5, lens="euler")
    assert line.startswith("--title 'cat, \u00e9' ")
    assert "--lens" not in line  # it is at its default
    again = parse(Drawing, shlex.split(line), prog="draw")
    assert again == replace(drawing, seed=5)
    assert command_line(again, quick=False, steps=None) == command_line(replace(again, quick=False, steps=None))


def test_options_import_nothing_heavy():
    heavy = "{'torch', 'numpy', 'fire', 'rich', 'jaxtyping'}"
    check = f"import sys, flux_ir.commands.cli.option; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_an_output_folder_must_have_a_name_that_other_flags_can_take():
    @dataclass(frozen=True)
    class Writing(Options):
        output_dir: Path | None = option(None, help="where it goes")
        folder: Path | None = option(None, help="another")

    assert Writing(folder=Path("a,b"), output_dir=Path("ab")).output_dir == Path("ab")
    with pytest.raises(FluxIRError, match=r"--output_dir must be a folder .* so without commas: got"):
        Writing(output_dir=Path("a,b"))


@dataclass(frozen=True)
class Placed(Options):
    """A switch that takes words too."""

    offload: bool | Literal["parts", "blocks"] = option(False, help="what waits elsewhere")
    device: str | None = option(None, help="device")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),
        (["--offload"], True),
        (["--offload", "True"], True),
        (["--offload=no"], False),
        (["--nooffload"], False),
        (["--offload", "blocks"], "blocks"),
        (["--offload=parts", "--device", "cpu"], "parts"),
        (["--offload", "--device", "cpu"], True),
    ],
)
def test_a_switch_may_take_words(words, value):
    assert parse(Placed, words, prog="place").offload == value
    assert Placed(offload=value).offload == value
    again = parse(Placed, shlex.split(command_line(Placed(offload=value))), prog="place")
    assert again.offload == value


def test_a_switch_that_takes_words_names_them():
    with pytest.raises(FluxIRError, match="--offload must be True, False, parts or blocks: got 'layers'"):
        parse(Placed, ["--offload", "layers"], prog="place")
    with pytest.raises(FluxIRError, match="--offload must be True, False, parts or blocks: got 3"):
        Placed(offload=3)
