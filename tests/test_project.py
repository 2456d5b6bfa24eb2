"""What the project promises about itself: the lock file, the documented commands, the version, a light import."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flux_ir

ROOT = Path(__file__).parents[1]
README_COMMANDS = [
    "pip install -q uv && uv run python capture_sample.py --model flux-tiny "
    '--prompt "a large red circle left of a small blue square on a white background"',
    "pip install -q uv && uv run pytest",
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(lock: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", lock, flags=re.MULTILINE))


def test_requirements_lock_has_the_versions_that_pyproject_pins():
    check = subprocess.run([sys.executable, ".ci/pin.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_every_dependency_is_pinned_and_no_host_is_named():
    project = tomllib.loads(read("pyproject.toml"))
    pins = project["tool"]["uv"]["constraint-dependencies"]
    groups = [names for group, names in project["dependency-groups"].items() if group != "dev"]  # that is an extra
    extras = [*project["project"]["optional-dependencies"].values(), *groups]
    asked = [*project["project"]["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.split(r"[<>=~! \[]", dependency)[0].lower().replace("_", "-") for dependency in asked}
    assert names <= {pin.split("==")[0] for pin in pins}
    assert "://" not in " ".join(pins)
    assert (ROOT / ".gitignore").read_text().split().count("uv.lock") == 1


def test_requirements_lock_names_no_host_and_no_path():
    lock = read("requirements.lock")
    assert "://" not in lock
    assert not re.search(r"(^|\s)(-e|-i|-f|--index|--extra-index|--find-links|\.?/|file:)", lock, flags=re.MULTILINE)


def test_requirements_lock_pins_every_runtime_dependency_with_hashes():
    lock = read("requirements.lock")
    dependencies = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    names = {re.split(r"[<>=~! \[]", dependency)[0].replace("_", "-") for dependency in dependencies}
    assert names <= pinned(lock)
    entries = re.split(r"\n(?=\S)", lock.strip())
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_requirements_lock_leaves_out_what_only_development_needs():
    assert not pinned(read("requirements.lock")) & {
        *("pytest", "hypothesis", "beartype", "diffusers", "transformers", "ruff", "mypy", "mkdocs"),
    }


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_has_the_two_commands_on_lines_of_their_own(command):
    assert command in [line.strip() for line in read("README.md").splitlines()]


def test_continuous_integration_ends_with_the_test_command_of_the_readme():
    assert read(".ci/run").strip().splitlines()[-1] == README_COMMANDS[-1]


def test_version_is_the_top_entry_of_the_changelog():
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d{2}-\d{2}$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert released[0] == flux_ir.__version__


@pytest.mark.parametrize("module", ["flux_ir", "flux_ir.errors"])
def test_importing_the_package_does_not_load_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_no_module_needs_transformers():
    """It is no dependency: only the drawing of flux-tiny's first weights calls it."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "flux_ir").rglob("*.py"))
        if path.stem != "__main__"
    ]
    code = (
        "import sys, importlib; sys.modules['transformers'] = None\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "from recipes.flux_tiny.text import build_t5, build_tokenizer\n"
        "from flux_ir.errors import FluxIRError\n"
        "try: build_t5(build_tokenizer())\n"
        "except FluxIRError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("training flux-tiny needs transformers, which is not installed")
    assert "pip install 'flux-ir[dev]'" in done.stdout


def test_a_capture_from_prompt_to_picture_never_loads_transformers(tmp_path):
    """It takes several times as long to import as PyTorch: neither the commands nor the text encoders import it."""
    modules = sorted(path.stem for path in (ROOT / "flux_ir" / "commands").glob("*.py") if path.stem != "__init__")
    words = ["capture", "--model", "flux-tiny", "--prompt", "a red circle", "--num_steps", "1", "--width", "16"]
    words += ["--height", "16", "--lens", "euler", "--dtype", "float32", "--output_dir", str(tmp_path)]
    code = (
        f"import sys, {', '.join(f'flux_ir.commands.{module}' for module in modules)}\n"
        f"assert flux_ir.commands.main.main({words}) == 0\n"
        "loaded = {'torch', 'transformers', 'torch._dynamo', 'sympy'} & sys.modules.keys()\n"
        "print(sorted(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['torch']"
    assert list(tmp_path.rglob("*.jpg"))
