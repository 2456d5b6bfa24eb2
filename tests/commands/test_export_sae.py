"""The whole command `export-sae`."""

import pytest
import torch

from flux_ir.commands.export_sae import main
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import load_sae, save_sae
from flux_ir.sae.files.formats import format_of, load_any
from tests.full_disk import file_size_limit


@pytest.fixture
def folder(tmp_path):
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sae = make_sae(SAEConfig(architecture="topk", d_in=6, d_sae=18, k=3, site="single.6.img"), sample=tokens)
    return save_sae(sae, tmp_path / "sae")


@pytest.mark.parametrize("name", ["sparsify", "dictionary_learning"])
def test_there_and_back_again(name, folder, tmp_path, capsys):
    theirs, ours = tmp_path / "theirs" / "single.6.img", tmp_path / "ours"
    assert main(["--sae", str(folder), "--format", name, "--output_dir", str(theirs)]) == 0
    assert format_of(theirs) == name
    assert main(["--sae", str(theirs), "--output_dir", str(ours)]) == 0
    said = capsys.readouterr().out
    assert f"as {name} reads it" in said
    assert "topk, 6 wide, 18 features" in said
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load_any(ours)(x), load_sae(folder)(x), atol=1e-6, rtol=1e-6)
    assert load_sae(ours).config.site == "single.6.img"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sae", "{sae}"], "give --output_dir or --push_to"),
        (["--sae", "{sae}", "--output_dir", "x", "--push_to", "a/b"], "give --output_dir or --push_to"),
        (["--sae", "{sae}", "--format", "sparsify", "--push_to", "a/b"], "--push_to puts our own files on the hub"),
        (["--sae", "./nowhere", "--output_dir", "x"], "./nowhere must be a folder, or a repository on the hub"),
        (["--output_dir", "x"], "--sae"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, message, folder, capsys):
    assert main([word.replace("{sae}", str(folder)) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["sae_lens", "sparsify", "dictionary_learning"])
def test_an_export_never_replaces_another_autoencoder(name, folder, tmp_path, capsys):
    theirs = tmp_path / "theirs" / "single.6.img"
    words = ["--sae", str(folder), "--format", name, "--output_dir"]
    assert main([*words, str(theirs)]) == 0
    assert main([*words, str(theirs)]) == 0  # the same again
    other = load_sae(folder)
    with torch.no_grad():
        other.b_enc += 1
    save_sae(other, tmp_path / "other")
    for target in (theirs, folder):
        before = contents(target)
        capsys.readouterr()
        assert main(["--sae", str(tmp_path / "other"), "--format", name, "--output_dir", str(target)]) == 2
        assert f"error: {target} holds an autoencoder already, and not what would be written" in capsys.readouterr().err
        assert contents(target) == before


def test_an_export_onto_its_own_folder_changes_nothing(folder, capsys):
    before = contents(folder)
    assert main(["--sae", str(folder), "--output_dir", str(folder)]) == 0
    for name in ("sparsify", "dictionary_learning"):
        assert main(["--sae", str(folder), "--format", name, "--output_dir", str(folder)]) == 2
        assert "holds an autoencoder already" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["sae_lens", "sparsify", "dictionary_learning"])
def test_a_disk_that_runs_full_is_one_line_and_leaves_nothing_half(name, folder, tmp_path, capsys):
    with file_size_limit(600):
        assert main(["--sae", str(folder), "--format", name, "--output_dir", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "error: cannot write" in error
    assert "File too large" in error
    assert list((tmp_path / "x").iterdir()) == []
