"""The public names: what they are, that no room stands in their way, and that importing the package is light."""

import pkgutil
import subprocess
import sys
from dataclasses import MISSING
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

import flux_ir
from flux_ir.commands.cli.option import Options, flags

ROOMS = [module.name for module in pkgutil.iter_modules(flux_ir.__path__) if module.name != "__main__"]


def test_rooms_and_public_names_differ():
    assert not set(ROOMS) & set(flux_ir.__all__)


def test_every_public_name_is_what_it_was_also_behind_every_room_and_asked_for_twice():
    for room in ROOMS:
        import_module(f"flux_ir.{room}")
    for name in flux_ir.__all__:
        module = import_module(flux_ir._MODULES[name])
        assert getattr(flux_ir, name) is getattr(module, name)
        assert getattr(flux_ir, name) is getattr(module, name)
        assert getattr(flux_ir, name).__doc__, name


def test_every_public_name_is_listed_once():
    assert sorted(flux_ir._MODULES) == sorted(flux_ir.__all__)
    assert set(flux_ir.__all__) <= set(dir(flux_ir))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'flux_ir' has no attribute 'captrue'"):
        _ = flux_ir.captrue
    assert not hasattr(flux_ir, "captrue")


def test_the_package_is_imported_without_torch_and_its_names_are_known():
    check = "import sys, flux_ir; print(len(dir(flux_ir)) > 5, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


@pytest.mark.parametrize(
    ("verb", "function"),
    [
        ("capture", "capture"),
        ("collect", "collect"),
        ("export", "export"),
        ("train_sae", "train_sae"),
        ("evaluate_sae", "evaluate_sae"),
        ("export_sae", "export_sae"),
        ("features", "analyse_features"),
        ("score_features", "score_features"),
        ("export_features", "export_features"),
        ("find_examples", "find_examples"),
        ("label_features", "label_features"),
        ("select_features", "select_features"),
        ("draw_features", "draw_features"),
        ("compare_features", "compare_features"),
        ("explore_features", "explore_features"),
        ("probe", "probe"),
        ("train_lens", "train_lens"),
        ("score_concepts", "score_concepts"),
        ("lens", "read_lens"),
        ("plan", "plan"),
        ("ablate", "ablate"),
        ("maps", "attention_maps"),
        ("text_lens", "text_lens"),
        ("play", "play"),
        ("steer", "steer"),
        ("demonstrate", "demonstrate"),
        ("score_steering", "score_steering"),
        ("attribute", "attribute"),
        ("study", "run_study"),
        ("transfer", "transfer"),
        ("visualize", "create_visualization"),
        ("weights", "describe_weights"),
        ("compare_quantized", "compare_quantized"),
        ("compare_models", "compare_models"),
    ],
)
def test_the_arguments_of_a_function_are_the_flags_of_its_verb_with_their_defaults(verb, function):
    module = import_module(f"flux_ir.commands.{verb}")
    (options,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Options) and value.__module__ == module.__name__
    ]
    known = {flag.name: flag.default for flag in flags(options) if flag.name != "plan"}
    parameters = signature(getattr(flux_ir, function)).parameters
    assert parameters.keys() - {"progress", "stop"} == known.keys()
    for name, parameter in parameters.items():
        if name in known and parameter.default is not parameter.empty and known[name] is not MISSING:
            default = known[name][0] if name in ("expansion", "seed") and verb == "train_sae" else known[name]
            assert parameter.default == (str(default) if isinstance(default, Path) else default), name


def test_only_public_names_are_listed():
    assert {name for name in dir(flux_ir) if not name.startswith("__")} == set(flux_ir.__all__)
