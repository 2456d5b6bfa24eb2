"""The wheel is whole: in an empty environment and an empty folder it does what README's first command does."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMPT = "a large red circle left of a small blue square on a white background"


def run(words: list[str | Path], folder: Path) -> str:
    """What the command prints. The folder and the environment know nothing of this repository."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=folder, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_in_an_empty_environment_runs_the_first_command(tmp_path):
    if shutil.which("uv") is None:
        pytest.skip("uv, which builds the wheel, is not installed")
    run(["uv", "build", "-q", "--wheel", "--out-dir", tmp_path / "dist", ROOT], tmp_path)
    (wheel,) = (tmp_path / "dist").glob("flux_ir-*.whl")
    environment = tmp_path / "environment"
    run(["uv", "venv", "-q", environment], tmp_path)
    # What the wheel asks for, in the versions of requirements.lock; links, because torch takes gigabytes.
    install = ["uv", "pip", "install", "-q", "--link-mode", "symlink", "--python", environment]
    run([*install, "--constraints", ROOT / "requirements.lock", wheel], tmp_path)

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"uv run python capture_sample\.py (.*)$", readme, flags=re.MULTILINE).group(1)
    assert first == f'--model flux-tiny --prompt "{PROMPT}"'
    empty = tmp_path / "empty"
    empty.mkdir()
    told = run(
        [environment / "bin" / "flux-ir", "capture", "--model", "flux-tiny", "--prompt", PROMPT, "--num_steps", "2"],
        empty,
    )
    (folder,) = (empty / "output").iterdir()
    assert folder.name in told
    assert {"img_0.jpg", "contact_sheet.jpg", "contact_sheet_x0.jpg"} <= {path.name for path in folder.iterdir()}
    assert [path.suffix for path in (folder / "intermediates").glob("capture_*_flux-tiny.*")] == [".pt"]

    where = run([environment / "bin" / "python", "-c", "import flux_ir; print(flux_ir.__file__)"], empty)
    assert Path(where.strip()).is_relative_to(environment)
