"""`flux-ir attribute`: what it prints, and one line for what is wrong."""

import pytest

from flux_ir.commands.main import main
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae

WORDS = ("--model", "flux-tiny", "--num_steps", "2", "--dtype", "float32", "--prompt", "a red circle [bold]")
FEW = ("--probes", "1", "--candidates", "2", "--controls", "1", "--best", "2")


@pytest.fixture
def sae(tmp_path):
    return save_sae(
        make_sae(SAEConfig("topk", d_in=192, d_sae=64, k=8, site="double.2.img", model="flux-tiny")), tmp_path / "mine"
    )


def test_it_prints_a_row_per_removal_how_well_they_were_foretold_and_all_at_once(sae, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["attribute", *WORDS, *FEW, "--sae", str(sae), "--region", "0,0,64,64", "--output_dir", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split()[:4] == ["feature", "estimate", "inside", "outside"]
    assert sum(line.startswith("double.2.img ") for line in lines) == 3
    assert sum(" control " in line for line in lines) == 1
    assert "rank correlation of estimate and removal: " in said
    assert "the best 2 at once change the region by 0." in said
    (folder,) = out.iterdir()
    for name in ("removals.png", "removals.csv", "attribution.json", "estimates.safetensors"):
        assert str(folder / name) in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--region", "0,0,200,16"), "a rectangle lies within the picture of 128 x 128 px: got 0, 0, 200, 16"),
        (("--run", "nowhere"), "nowhere"),
        (("--best", "0"), "--best must be at least 1: got 0"),
        (("--candidate", "3"), "--candidate: no such flag; did you mean --candidates?"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_two(sae, words, error, capsys):
    given = ("--model", "flux-tiny") if "--run" in words else WORDS
    assert main(["attribute", *given, "--sae", str(sae), *words]) == 2
    first, *hints = capsys.readouterr().err.splitlines()[-2:]
    assert error in first
    assert all(hint.startswith("hint: ") for hint in hints)
