"""Captures as training data: folders of them, runs, single files."""

import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site
from tests.recording.cases import IMG, TXT


def check_block(block, values, site, step):
    """A block of a capture of every token, written in bfloat16."""
    assert torch.equal(block.values, values[step, site][0].bfloat16())
    assert block.floats() is block.values
    assert (block.site, block.step, block.scale, block.used_txt) == (site, step, None, 3)
    txt = {"img": 0, "txt": TXT, None: TXT}[site.stream]
    assert block.txt_tokens == txt
    assert block.positions.dtype == torch.int32
    assert block.positions.tolist() == [*range(txt), *range(len(block.values) - txt)]


def test_a_folder_of_captures_is_a_source(tmp_path, write):
    values = [write(tmp_path / f"{name}.pt", number) for number, name in enumerate("abc")]
    (tmp_path / "d.pt.partial").write_bytes(b"x")
    source = open_source(tmp_path)
    assert [one.path for one in source.generations] == [tmp_path / f"{name}.pt" for name in "abc"]
    assert source.generations[2].id == f"{2:016x}"
    check_block(source.read(2, source.sites[2], 2), values[2], source.sites[2], 2)
    alone = open_source(tmp_path / "b.pt")
    assert len(alone.generations) == 1
    check_block(alone.read(0, source.sites[0], 0), values[1], source.sites[0], 0)
    assert torch.equal(alone.noisy(range(1), 2), source.noisy(range(1, 2), 2))
    assert alone.noisy(range(1), 2).shape[:2] == (1, IMG)


def test_a_folder_of_runs_and_a_run_are_sources(tmp_path, write):
    for number in range(2):
        for name in ("capture_20250101_000000_x.pt", "capture_20250102_000000_x.pt"):
            write(tmp_path / f"{number:08x}" / "intermediates" / name, number)
    assert len(open_source(tmp_path / f"{0:08x}").generations) == 1
    source = open_source(tmp_path)
    assert [one.path.name for one in source.generations] == ["capture_20250102_000000_x.pt"] * 2


def test_a_capture_of_given_embeddings_cannot_be_run_again(tmp_path, write):
    facts = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "timesteps": [1.0, 0.0], "guidance": 1.0}
    write(tmp_path / "a.pt", metadata=facts)
    assert open_source(tmp_path / "a.pt").sampling(0).prompt == "a cat"
    write(tmp_path / "b.pt", metadata=facts | {"prompt_embeds": "0123456789abcdef"})
    with pytest.raises(FluxIRError, match="was made from embeddings of a prompt, which it does not hold"):
        open_source(tmp_path / "b.pt").sampling(0)


def test_files_of_the_original_program_are_a_source(tmp_path):
    """It told neither sites nor steps, nor which tokens are padding."""
    tensor = torch.randn(1, IMG, 8).bfloat16()
    file = {
        "double_blocks": {"block_0": [(tensor, torch.randn(1, TXT, 8).bfloat16())]},
        "single_blocks": {"block_0": [torch.randn(1, TXT + IMG, 8).bfloat16()]},
        "denoising_context": {
            "y": [torch.randn(1, 4)],
            "txt_seq_len": [TXT],
            "img_state": [torch.randn(1, IMG, 64)],
            "timestep_pairs": [(1.0, 0.0)],
            "guidance": 3,
        },
        "metadata": {"generation_id": "0123abcd", "prompt": "a cat"},
    }
    torch.save(file, tmp_path / "capture_x.pt")
    source = open_source(tmp_path)
    block = source.read(0, Site.parse("double.0.img"), 0)
    assert torch.equal(block.values, tensor[0])
    assert block[5:6] == ("a cat",)
    assert block.used_txt is None
    assert source.model is None


def test_captures_are_known_by_what_they_hold(tmp_path, write):
    for number, name in enumerate("ab"):
        write(tmp_path / "one" / f"{name}.pt", number)
        write(tmp_path / "same" / f"x{name}.pt", number)
        write(tmp_path / "other" / f"{name}.pt", number + 1)
    one, same, other = (open_source(tmp_path / name).identity for name in ("one", "same", "other"))
    assert one == same != other
