"""Pins every package that uv resolves, for this project's commands and for pip alike.

    uv run --no-project python .ci/pin.py                  write the pins of today's uv.lock
    uv run --no-project python .ci/pin.py --upgrade        resolve anew, without today's pins, then write
    uv run --no-project python .ci/pin.py --check          whether the two files say the same; needs no network

`[tool.uv] constraint-dependencies` in pyproject.toml holds name and version of every package, so that each machine
resolves the same versions at any date and with any uv. `requirements.lock` holds those needed at run time, with hashes,
for `pip install --require-hashes`. Neither names the host of a registry; uv.lock does, so it is not committed.
"""

import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT, LOCK, PINNED = ROOT / "pyproject.toml", ROOT / "uv.lock", ROOT / "requirements.lock"
EXPORT = "uv export -q --frozen --no-header --no-annotate --no-emit-project --no-dev"
BLOCK = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", flags=re.MULTILINE | re.DOTALL)
PYTHON_BOUND = re.compile(r"python_full_version (>=|<|==) '([^']+)'")
Version = tuple[int, ...]


def main(words: list[str]) -> int:
    """Does what the words ask for; returns the exit code."""
    if words == ["--check"]:
        return report(differences())
    if words not in ([], ["--upgrade"]):
        print(__doc__)
        return 2
    if words:
        write_constraints([])
        run("uv lock -q --upgrade")
    else:
        run("uv lock -q")
    write_constraints(constraints(tomllib.loads(LOCK.read_text(encoding="utf-8"))))
    run("uv lock -q")
    PINNED.write_text(run(EXPORT), encoding="utf-8")
    return report(differences())


def constraints(lock: dict) -> list[str]:
    """`name==version` for every package of a lock; where one name has several versions, each with its Pythons."""
    packages = [package for package in lock["package"] if "registry" in package["source"]]
    names = [package["name"] for package in packages]
    return [
        f"{package['name']}=={package['version']}"
        + (f" ; {pythons(package['resolution-markers'])}" if names.count(package["name"]) > 1 else "")
        for package in packages
    ]


def pythons(markers: list[str]) -> str:
    """The Python versions of a list of markers, as one range: `python_full_version >= '3.11.5'`."""
    ranges = [bounds(marker) for marker in markers]
    lower = min((low for low, _ in ranges), key=lambda low: low or ())  # (): from the oldest Python on
    upper = max((high for _, high in ranges), key=lambda high: high or (math.inf,))  # None: to the newest
    words = [
        f"python_full_version {sign} '{'.'.join(map(str, version))}'"
        for sign, version in ((">=", lower), ("<", upper))
        if version
    ]
    if not words:
        raise SystemExit(f"two versions of one package differ by something else than Python: {markers}")
    return " and ".join(words)


def bounds(marker: str) -> tuple[Version | None, Version | None]:
    """The first Python of a marker and the first behind it; None where it names none. `== '3.12.*'` is 3.12 to 3.13."""
    lower = upper = None
    for sign, text in PYTHON_BOUND.findall(marker):
        version = tuple(int(number) for number in re.findall(r"\d+", text))
        if sign in (">=", "=="):
            lower = version
        if sign == "==":
            version = (*version[:-1], version[-1] + 1)
        if sign in ("<", "=="):
            upper = version
    return lower, upper


def write_constraints(pins: list[str]) -> None:
    """Puts the pins in the place of today's."""
    text = PROJECT.read_text(encoding="utf-8")
    block = "".join(["constraint-dependencies = [\n", *(f'    "{pin}",\n' for pin in pins), "]\n"])
    changed, count = BLOCK.subn(lambda _: block, text)
    if count != 1:
        raise SystemExit("pyproject.toml must have one `constraint-dependencies = [` with a line per package")
    PROJECT.write_text(changed, encoding="utf-8")


def differences() -> list[str]:
    """What requirements.lock pins otherwise than pyproject.toml. Versions are compared, not text."""
    tool = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["uv"]
    pinned = {pin.split(" ;")[0] for pin in tool["constraint-dependencies"]}
    exported = re.findall(r"^([A-Za-z0-9._-]+==[^\s;\\]+)", PINNED.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [f"requirements.lock has {pin}, pyproject.toml has not" for pin in exported if pin not in pinned]


def report(lines: list[str]) -> int:
    """Prints what differs, with the remedy; returns the exit code."""
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print("mend it with: uv run --no-project python .ci/pin.py", file=sys.stderr)
    return 1 if lines else 0


def run(command: str) -> str:
    """What the command prints, run in the project's root. Ends the script with what it complained about."""
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
