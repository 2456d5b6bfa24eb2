import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

from flux_ir.commands.cli.option import Options, flags
from flux_ir.commands.cli.shared import PictureOptions
from flux_ir.commands.main import VERBS, main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_verbs_are_listed_with_one_line_each(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # pages are wrapped to the terminal
    assert main(words) == 0
    page = capsys.readouterr().out
    for name, purpose in VERBS.items():
        assert f"  {name} " in page
        assert purpose in page


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flux-ir {version('flux-ir')}\n"


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("captrue", "error: captrue: no such verb; did you mean capture?"),
        ("--prompt", "error: --prompt: no such verb"),
        ("zzz", "error: zzz: no such verb"),
    ],
)
def test_an_unknown_verb_names_the_nearest(word, error, capsys):
    assert main([word, "--prompt", "cat"]) == 2
    assert capsys.readouterr().err == f"{error}\nhint: flux-ir --help lists the verbs\n"


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_one_module_with_options_a_purpose_and_a_run(name):
    module = import_module(f"flux_ir.commands.{name.replace('-', '_')}")
    (options,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Options) and value.__module__ == module.__name__
    ]
    assert options.__doc__
    assert flags(options)
    assert callable(module.run)
    assert callable(module.main)


def test_a_flag_that_verbs_share_is_declared_once():
    """Two verbs may have a flag of the same name and different meaning, but none says the same thing twice."""
    declared = {}
    for name in VERBS:
        module = import_module(f"flux_ir.commands.{name.replace('-', '_')}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Options) and value.__module__ == module.__name__:
                own = value.__annotations__
                for flag in flags(value):
                    if flag.name in own:
                        declared.setdefault((flag.name, flag.facts.help), []).append(name)
    assert {key: verbs for key, verbs in declared.items() if len(verbs) > 1} == {}


def test_the_help_names_every_model_that_runs():
    from flux_ir.models.registry import get_spec, model_names

    (help_text,) = [flag.facts.help for flag in flags(PictureOptions) if flag.name == "model"]
    that_run = [name for name in model_names() if get_spec(name).lacks is None]
    assert help_text.replace(" or ", ", ").split(", ") == that_run


def test_python_m_is_the_same_program():
    command = [sys.executable, "-m", "flux_ir", "capture", "--promt", "a cat"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --promt: no such flag; did you mean --prompt?\nhint: flux-ir capture --help lists all flags\n"
    )


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_imports_neither_fire_nor_torch(name):
    check = (
        "import sys; from flux_ir.commands.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or bool({'torch', 'numpy', 'fire', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check, name, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: flux-ir {name} " in done.stdout
