"""Captures that training can read, read the same way: collections, folders, runs, single files."""

import pytest
import torch

from flux_ir.activations.tokens import TokenSource, open_source
from flux_ir.recording.precision import dequantised, scaled
from flux_ir.sites import Site
from tests.recording.cases import IMG, SITES, TXT

FLOAT8 = torch.float8_e4m3fn


def check_block(block, values, site, step):
    """A block of a capture of every token, written in bfloat16."""
    assert torch.equal(block.values, values[step, site][0].bfloat16())
    assert block.floats() is block.values
    assert (block.site, block.step, block.scale, block.used_txt) == (site, step, None, 3)
    txt = {"img": 0, "txt": TXT, None: TXT}[site.stream]
    assert block.txt_tokens == txt
    assert block.positions.dtype == torch.int32
    assert block.positions.tolist() == [*range(txt), *range(len(block.values) - txt)]


def test_a_collection_gives_every_generation_in_order(collection):
    folder, values = collection()
    source: TokenSource = open_source(str(folder))
    assert source.sites == [Site.parse(name) for name in SITES]
    assert source.steps == [0, 2]
    assert source.model == "tiny"
    assert [generation.id for generation in source.generations] == [f"{number:016x}" for number in range(6)]
    assert source.generations[5].prompt == "prompt 2"
    assert source.generations[5].path == folder / "groups/000002/0000000000000005.pt"
    assert [one.id for one in source.generations[4:]] == [source.generations[4].id, source.generations[5].id]
    for number in (5, 0, 3, 1, 2, 4, 0):
        for site in source.sites:
            for step in source.steps:
                block = source.read(number, site, step)
                check_block(block, values[number], site, step)
                assert block.generation == f"{number:016x}"
                assert block.prompt == f"prompt {number // 2}"
                assert list(block.values.shape) == [source.tokens(site), source.d(site)]


def test_halves_of_single_blocks_can_be_read(collection):
    folder, values = collection(1)
    source = open_source(folder)
    whole = values[1][2, Site.parse("single.0")][0].bfloat16()
    for name, expected, txt in (("single.0.img", whole[TXT:], 0), ("single.0.txt", whole[:TXT], TXT)):
        block = source.read(1, Site.parse(name), 2)
        assert torch.equal(block.values, expected)
        assert block.txt_tokens == txt
        assert block.positions.tolist() == list(range(len(expected)))
        assert source.tokens(block.site) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
def test_kept_places_and_scales_come_with_the_values(collection, dtype):
    places = [1, 5, 10]
    folder, values = collection(1, dtype=dtype, img_positions=places)
    source = open_source(folder)
    for site in source.sites:
        txt = {"img": 0, "txt": TXT, None: TXT}[site.stream]
        value = values[1][0, site][0]
        kept = torch.cat([value[:txt], value[txt:][places]]) if site.stream != "txt" else value
        block = source.read(1, site, 0)
        assert block.positions.tolist() == [*range(txt), *places][: len(kept)]
        assert source.tokens(site) == len(kept)
        if dtype == FLOAT8:
            assert block.values.dtype == FLOAT8
            assert torch.equal(block.scale, scaled(kept).scale)
            assert torch.equal(block.floats(), dequantised(*scaled(kept)))
            assert block.floats().dtype == torch.bfloat16
        else:
            assert torch.equal(block.floats(), kept)


@pytest.mark.parametrize("finished", [3, 1, 0])
def test_an_unfinished_collection_is_read_as_far_as_it_is(collection, finished):
    folder, values = collection(finished=finished, root=False)
    source = open_source(folder)
    assert len(source.generations) == 6
    check_block(source.read(5, source.sites[0], 2), values[5], source.sites[0], 2)


def test_a_line_being_written_is_not_read_yet(collection):
    folder, _ = collection(finished=2, root=False)
    journal = folder / "groups/000002/journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    assert len(open_source(folder).generations) == 5


def test_only_a_few_files_are_open_at_once(collection):
    folder, values = collection(10)
    source = open_source(folder)
    site = source.sites[0]
    for number in range(20):
        check_block(source.read(number, site, 0), values[number], site, 0)
    assert len(source._open) == 8


def test_a_folder_of_captures_is_a_source(tmp_path, write):
    values = [write(tmp_path / f"{name}.pt", number)[0] for number, name in enumerate("abc")]
    (tmp_path / "d.pt.partial").write_bytes(b"x")
    source = open_source(tmp_path)
    assert [one.path for one in source.generations] == [tmp_path / f"{name}.pt" for name in "abc"]
    assert source.generations[2].id == f"{2:016x}"
    check_block(source.read(2, source.sites[2], 2), values[2], source.sites[2], 2)
    alone = open_source(tmp_path / "b.pt")
    assert len(alone.generations) == 1
    check_block(alone.read(0, source.sites[0], 0), values[1], source.sites[0], 0)


def test_a_folder_of_runs_and_a_run_are_sources(tmp_path, write):
    for number in range(2):
        for name in ("capture_20250101_000000_x.pt", "capture_20250102_000000_x.pt"):
            write(tmp_path / f"{number:08x}" / "intermediates" / name, number)
    assert len(open_source(tmp_path / f"{0:08x}").generations) == 1
    source = open_source(tmp_path)
    assert [one.path.name for one in source.generations] == ["capture_20250102_000000_x.pt"] * 2


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
