"""Everything that training can read, read the same way: collections, captures, arrays; and what cannot be read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_ir.capture.array_source import ROWS_PER_PIECE
from flux_ir.capture.precision import dequantised, scaled
from flux_ir.capture.recorder import StepContext
from flux_ir.capture.store import CapturePlan
from flux_ir.capture.tokens import TokenSource, open_source
from flux_ir.capture.whole import write_capture
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site, all_sites, match_sites

TXT, IMG, D = 7, 12, 64
SITES = ("double.1.img", "double.1.txt", "single.0", "single.2.img.neurons")
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def write(tiny_flux_params):
    """Writes a capture of random values; returns them by (step, site), and the row of a collection."""

    def make(path, number=0, *, sites=SITES, model="tiny", width=None, **changes):
        flux = tiny_flux_params if width is None else replace(tiny_flux_params, hidden_size=width, axes_dim=(4, 2, 2))
        metadata = {"generation_id": f"{number:016x}", "model": model, "prompt": f"prompt {number // 2}", "used_txt": 3}
        known = {"txt_tokens": TXT, "img_tokens": IMG, "timesteps": (1.0, 0.75, 0.5, 0.0), "steps": [0, 2]}
        known |= {"guidance": 1.0, "metadata": metadata, "rounds": True}
        plan = CapturePlan(flux, match_sites(sites, all_sites(2, 3)), **{**known, **changes})
        draw = torch.Generator().manual_seed(number)
        values = {
            (step, site): torch.randn(plan.full_shape(site), generator=draw)
            for step in plan.kept_steps
            for site in plan.sites
        }
        contexts = {
            step: StepContext(torch.zeros(plan.full_img_shape), torch.zeros(plan.y_shape), plan.txt_tokens)
            for step in plan.kept_steps
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        record = write_capture(path, plan, values, contexts)
        row = {"id": metadata["generation_id"], "prompt": metadata["prompt"], "model": model, "used_txt": 3}
        row |= {"sites": [str(site) for site in plan.sites], "steps": list(plan.kept_steps), **record._asdict()}
        return values, row

    return make


@pytest.fixture
def collection(tmp_path, write):
    """Writes a collection of 2 generations a group: its folder, and all values by generation."""

    def make(groups=3, *, finished=None, root=True, **changes):
        folder, rows, values = tmp_path / "captures", [], []
        for group in range(groups):
            name = f"groups/{group:06d}"
            of_group = []
            for number in (2 * group, 2 * group + 1):
                recorded, row = write(folder / name / f"{number:016x}.pt", number, **changes)
                of_group.append(row | {"path": f"{name}/{number:016x}.pt"})
                values.append(recorded)
            kept = "index.jsonl" if finished is None or group < finished else "journal.jsonl"
            (folder / name / kept).write_text("".join(json.dumps(row) + "\n" for row in of_group))
            rows += of_group
        (folder / "collection.json").write_text("{}")
        if root:
            (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder, values

    return make


def check_block(block, values, site, step):
    """A block of a capture of every token, written in bfloat16."""
    assert torch.equal(block.values, values[step, site][0].bfloat16())
    assert block.floats() is block.values
    assert (block.site, block.step, block.scale, block.used_txt) == (site, step, None, 3)
    txt = {"img": 0, "txt": TXT, None: TXT}[site.stream]
    assert block.txt_tokens == txt
    assert block.positions.dtype == torch.int32
    assert block.positions.tolist() == [*range(txt), *range(len(block.values) - txt)]


# ---- Captures


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


# ---- Arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("images", [None, 3])
def test_npy_arrays_are_sources(tmp_path, dtype, images):
    shape = (600, 16) if images is None else (images, 20, 16)
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    source = open_source(tmp_path / "x.npy")
    assert (list(source.sites), list(source.steps), source.model, source.d(None)) == ([], [0], None, 16)
    blocks = [source.read(i, None, 0) for i in range(len(source.generations))]
    assert source.tokens(None) == (20 if images else ROWS_PER_PIECE)
    assert [len(block.values) for block in blocks] == ([20] * 3 if images else [256, 256, 88])
    expected = torch.from_numpy(array.astype(np.float16 if dtype == np.float16 else np.float32)).reshape(-1, 16)
    assert torch.equal(torch.cat([block.floats() for block in blocks]), expected)
    assert len({block.generation for block in blocks}) == len(blocks)
    assert blocks[-1].positions.tolist() == (list(range(20)) if images else list(range(512, 600)))
    assert blocks[0].site is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors_arrays_are_sources(tmp_path, dtype):
    array = torch.randn(2, 9, 16).to(dtype)
    save_file({"anything": array}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert torch.equal(torch.stack([source.read(i, None, 0).floats() for i in range(2)]), array)
    assert source.read(0, None, 0).values.dtype == dtype


def test_a_folder_of_arrays_is_read_in_the_order_of_names(tmp_path):
    for number, name in enumerate("ba"):
        np.save(tmp_path / f"{name}.npy", np.full((300, 4), number, np.float32))
    source = open_source(tmp_path)
    assert [one.id for one in source.generations] == ["a.0", "a.1", "b.0", "b.1"]
    assert source.read(2, None, 0).values.unique().tolist() == [0.0]


# ---- What cannot be read


def read_all(path):
    source = open_source(path)
    for number in range(len(source.generations)):
        source.read(number, (list(source.sites) or [None])[0], source.steps[0])


def message(path):
    with pytest.raises(FluxIRError) as caught:
        read_all(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_nothing_there_is_said(tmp_path):
    assert "there is nothing at" in message(tmp_path / "nowhere")
    assert "holds no activations" in message(tmp_path)
    (tmp_path / "a.pt.partial").write_bytes(b"")
    assert "holds only 1 unfinished files" in message(tmp_path)
    (tmp_path / "text.txt").write_text("")
    assert "no file of activations" in message(tmp_path / "text.txt")


def test_a_collection_without_a_finished_generation_is_said(tmp_path):
    (tmp_path / "collection.json").write_text("{}")
    assert "holds no finished generation yet" in message(tmp_path)


def test_a_half_written_capture_is_named(tmp_path, write):
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.pt", number)
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:-500])
    assert "b.pt is not a complete capture file" in message(tmp_path)


def test_a_half_written_or_missing_capture_of_a_collection_is_named(collection):
    folder, _ = collection()
    broken = folder / "groups/000001/0000000000000002.pt"
    broken.write_bytes(broken.read_bytes()[:-500])
    assert "0000000000000002.pt is not a complete capture file" in message(folder)
    broken.unlink()
    assert "0000000000000002.pt: No such file" in message(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "other"}, "the same model: .*b.pt has other, .*a.pt has tiny"),
        ({"width": 32}, "the same widths: .*b.pt has 32, 128, .*a.pt has 64, 256"),
        ({"img_tokens": 20}, "the same tokens"),
        ({"steps": [0]}, "the same steps: .*b.pt has 0, .*a.pt has 0, 2"),
        ({"sites": SITES[:2]}, "the same sites"),
    ],
)
def test_captures_that_do_not_belong_together_are_named(tmp_path, write, changes, says):
    write(tmp_path / "a.pt", 0)
    write(tmp_path / "b.pt", 1, **changes)
    with pytest.raises(FluxIRError, match=says):
        open_source(tmp_path)


def test_a_mixed_collection_is_refused(collection, write):
    folder, _ = collection(2)
    index = folder / "index.jsonl"
    index.write_text(index.read_text().replace('"model": "tiny"', '"model": "other"', 1))
    assert "has one list of model" in message(folder)
    write(folder / "groups/000000/0000000000000000.pt", 0, img_tokens=20)
    index.write_text(index.read_text().replace('"model": "other"', '"model": "tiny"', 1))
    assert "all captures must have the same sizes" in message(folder)


def test_a_broken_line_of_an_index_is_named_by_its_number(collection):
    folder, _ = collection(2)
    lines = (folder / "index.jsonl").read_text().splitlines()
    (folder / "index.jsonl").write_text("\n".join([*lines[:2], "{", *lines[3:]]))
    assert "index.jsonl, line 3, is no row of a collection" in message(folder)


def test_several_pictures_in_one_capture_are_refused(tmp_path, write):
    write(tmp_path / "a.pt", 0, batch=2)
    assert "holds one picture" in message(tmp_path)


def test_sites_and_steps_that_are_not_there_are_named(collection):
    source = open_source(collection(1)[0])
    with pytest.raises(FluxIRError, match=r"double\.0\.img was not captured"):
        source.d(Site.parse("double.0.img"))
    with pytest.raises(FluxIRError, match="step 1 was not captured"):
        source.read(0, source.sites[0], 1)
    with pytest.raises(FluxIRError, match="captures are read by site"):
        source.tokens(None)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((5, 4), np.int64), "float16, bfloat16, float32 or float64: .* is int64"),
        (np.zeros(5, np.float32), r"is \[5\]"),
        (np.zeros((0, 4), np.float32), r"is \[0, 4\]"),
        (np.zeros((2, 2, 2, 2), np.float32), r"\[tokens, d\] or \[images, tokens, d\]"),
    ],
)
def test_arrays_that_are_no_activations_are_refused(tmp_path, array, says):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(FluxIRError, match=says):
        open_source(tmp_path / "x.npy")


def test_half_written_and_mixed_arrays_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 4), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((5, 8), np.float32))
    assert "the same width: " in message(tmp_path)
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    assert "b.npy is not a complete array" in message(tmp_path)
    save_file({"x": torch.zeros(50, 4)}, tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-8])
    assert "c.safetensors is not a complete array" in message(tmp_path / "c.safetensors")
    save_file({"x": torch.zeros(5, 4), "y": torch.zeros(5, 4)}, tmp_path / "d.safetensors")
    assert "holds 2 tensors" in message(tmp_path / "d.safetensors")


def test_plain_arrays_have_no_sites_and_one_step(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 4), np.float32))
    source = open_source(tmp_path)
    with pytest.raises(FluxIRError, match=r"has no sites: got single\.0"):
        source.d(Site.parse("single.0"))
    with pytest.raises(FluxIRError, match="has the step 0 only: got 1"):
        source.read(0, None, 1)
