"""Pins name the Pythons they are for, where one package has several versions."""

import runpy
from pathlib import Path

import pytest

PIN = str(Path(__file__).parents[1] / ".ci" / "pin.py")


@pytest.mark.parametrize(
    ("markers", "pythons"),
    [
        (["python_full_version < '3.11.5' and sys_platform == 'win32'"], "python_full_version < '3.11.5'"),
        (
            ["python_full_version >= '3.12'", "python_full_version >= '3.11.5' and python_full_version < '3.12'"],
            "python_full_version >= '3.11.5'",
        ),
        (
            ["python_full_version < '3.11.5'", "python_full_version >= '3.11.5' and python_full_version < '3.12'"],
            "python_full_version < '3.12'",
        ),
        (
            ["python_full_version == '3.12.*'", "python_full_version == '3.13.*'"],
            "python_full_version >= '3.12' and python_full_version < '3.14'",
        ),
    ],
)
def test_a_pin_names_the_pythons_of_its_version(markers, pythons):
    assert runpy.run_path(PIN)["pythons"](markers) == pythons


def test_versions_that_differ_by_the_system_are_refused():
    with pytest.raises(SystemExit, match="differ by something else than Python"):
        runpy.run_path(PIN)["pythons"](["sys_platform == 'win32'"])
