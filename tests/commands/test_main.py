import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

from flux_ir.commands.main import VERBS, main
from flux_ir.options import Options, flags


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_verbs_are_listed_with_one_line_each(words, capsys):
    assert main(words) == 0
    page = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name} " in page
        assert verb.help in page


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
def test_every_verb_has_options_a_purpose_and_a_run(name):
    verb = VERBS[name]
    module = import_module(verb.module)
    options = getattr(module, verb.options)
    assert issubclass(options, Options)
    assert options.__doc__
    assert flags(options)
    assert callable(getattr(module, verb.run))
    assert callable(module.main)


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_imports_neither_fire_nor_torch(name):
    check = (
        "import sys; from flux_ir.commands.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or bool({'torch', 'numpy', 'fire', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check, name, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: flux-ir {name} " in done.stdout
