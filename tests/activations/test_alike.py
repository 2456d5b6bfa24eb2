"""Captures that are laid out alike are read in a quicker way, and to the bit as in the other; others are told apart."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flux_ir.activations import capture_file, open_file
from flux_ir.activations.alike import Alike
from flux_ir.activations.capture_source import CaptureSource
from flux_ir.activations.open_file import OpenFile
from flux_ir.activations.spare_memory import SpareMemory
from flux_ir.activations.whole import write_capture
from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import StepContext
from flux_ir.recording.store import CapturePlan, load_capture
from flux_ir.sites import Site, all_sites, match_sites
from tests.activations.page_cache import drop_from_cache, skip_unless_there_is_a_way_past

TXT, IMG = 7, 12
SITES = ("double.1.img", "double.0.txt", "single.0", "single.2.img.neurons")
READ = [Site.parse(name) for name in (*SITES, "single.0.img", "single.0.txt")]


@pytest.fixture
def write(tmp_path, tiny_flux_params):
    """Writes a capture of random values; returns its path."""

    def make(number=0, *, sites=SITES, prompt="a cat", more=None, **changes):
        known = {"txt_tokens": TXT, "img_tokens": IMG, "timesteps": (1.0, 0.75, 0.5, 0.0), "steps": [0, 2]}
        metadata = {"generation_id": f"{number:08x}", "prompt": prompt, "model": "tiny", **(more or {})}
        known |= {"guidance": 1.0, "metadata": metadata, "rounds": True}
        plan = CapturePlan(tiny_flux_params, match_sites(sites, all_sites(2, 3)), **{**known, **changes})
        draw = torch.Generator().manual_seed(number)
        values = {
            (step, site): torch.randn(plan.full_shape(site), generator=draw)
            for step in plan.kept_steps
            for site in plan.sites
        }
        context = StepContext(torch.zeros(plan.full_img_shape), torch.zeros(plan.y_shape), plan.txt_tokens)
        write_capture(tmp_path / f"{number}.pt", plan, values, dict.fromkeys(plan.kept_steps, context))
        return tmp_path / f"{number}.pt"

    return make


@pytest.fixture(params=["at once", "in parts"])
def _sizes(request, monkeypatch):
    """Files are small, and read at once; or they are not, and many pieces are read."""
    if request.param == "in parts":
        monkeypatch.setattr(capture_file, "_SMALL_BYTES", 0)
        monkeypatch.setattr(open_file, "_PIECE_BYTES", 100)


def is_alike(path, first):
    alike = Alike(load_capture(first))
    return alike.holds(alike.opened(str(path)))


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": torch.float32}, {"dtype": torch.float8_e4m3fn}, {"img_positions": [1, 5, 10]}, {"steps": [2]}],
)
def test_what_is_read_quickly_is_what_is_mapped(write, changes):
    paths = [write(number, prompt="long " * 40 * number, more={"seed": 10**number}, **changes) for number in range(5)]
    source = CaptureSource.of_files(paths)
    for index in (3, 0, 4, 1, 2, 3):
        for step in source.steps:
            blocks = source.read_together(index, READ, step)
            for block, site in zip(blocks, READ, strict=True):
                mapped = source.read(index, site, step)
                assert same_bits(block.values, mapped.values.contiguous())
                assert (block.scale is None) == (mapped.scale is None)
                assert block.scale is None or torch.equal(block.scale, mapped.scale)
                assert torch.equal(block.positions, mapped.positions)
                assert block[2:6] == mapped[2:6]
                assert block[7:] == mapped[7:]
    assert [file.is_alike for file in source._files.values()] == [True] * 5  # none of them was parsed


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": SITES[:3]},
        {"steps": [0, 1]},
        {"txt_tokens": 6},
        {"img_tokens": 20},
        {"dtype": torch.float16},
        {"timesteps": (1.0, 0.7, 0.5, 0.0)},
        {"guidance": 2.0},
        {"batch": 2},
        {"img_positions": [1, 2]},
    ],
)
def test_a_file_that_differs_in_anything_else_is_not_alike(write, changes):
    assert is_alike(write(1), write(0))
    assert not is_alike(write(2, **changes), write(0))


def test_other_kept_places_are_not_alike(write):
    first, other = write(0, img_positions=[1, 5]), write(1, img_positions=[1, 6])
    assert not is_alike(other, first)
    positions = [CaptureSource.of_files([first, other]).read_together(i, READ[:1], 0)[0].positions for i in (0, 1)]
    assert [one.tolist() for one in positions] == [[1, 5], [1, 6]]


@pytest.mark.usefixtures("_sizes")
def test_a_file_that_torch_wrote_in_another_way_is_read_as_well(write, tmp_path):
    first, other = write(0), write(1)
    torch.save(torch.load(other), tmp_path / "other name.pt")
    source = CaptureSource.of_files([first, tmp_path / "other name.pt"])
    got = source.read_together(1, READ, 2)
    assert source._files[1].is_alike is False
    for block, site in zip(got, READ, strict=True):
        assert same_bits(block.values, load_capture(other).read(site, 2)[0].contiguous())


@pytest.mark.usefixtures("_sizes")
def test_no_damage_passes_for_a_capture(write):
    first, path = write(0), write(1)
    alike, whole = Alike(load_capture(first)), path.read_bytes()
    for length in (0, 10, 50, 900, len(whole) // 2, len(whole) - 500, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not alike.holds(alike.opened(str(path)))
    path.write_bytes(whole + b"\0")
    assert not alike.holds(alike.opened(str(path)))
    data = load_capture(first).archive.records()["data.pkl"]
    for place in range(data.offset, data.offset + data.nbytes, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not alike.holds(alike.opened(str(path)))


@pytest.mark.usefixtures("_sizes")
def test_a_damaged_directory_never_gives_other_values(write):
    """Checksums of tensors are not looked at, as always; a record that is elsewhere shows by its header."""
    first, path = write(0), write(1)
    source, whole = CaptureSource.of_files([first, path]), path.read_bytes()
    expected = [block.values.clone() for block in source.read_together(1, READ, 2)]
    start = load_capture(path).archive.directory_start
    alike, harmless, told = Alike(load_capture(first)), 0, set()
    for place in range(start, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        file = alike.opened(str(path))
        try:
            alike.announce(file, READ, 2, again=False)
            got = alike.read(file, READ, 2) if alike.is_like(file) else None
        except FluxIRError as error:
            told.add(error.message.split(": ")[-1])
            continue
        harmless += got is not None
        assert got is None or all(map(same_bits, [one.values for one in got], expected))
    assert told <= {"a record does not begin where the directory says", "it ends where a record should begin"}
    assert told
    assert harmless < (len(whole) - start) / 3 / 4


def test_a_file_that_is_cut_short_while_it_is_read_is_named(write, monkeypatch):
    monkeypatch.setattr(capture_file, "_SMALL_BYTES", 0)
    path = write(1)
    source = CaptureSource.of_files([write(0), path])
    source.read_together(1, READ, 0)
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(FluxIRError, match=r"1\.pt is not a complete capture file: it ends"):
        source.read_together(1, READ, 2)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_announcing_changes_nothing_that_is_read(write, again, cached):
    paths = [write(number, prompt="long " * 40 * number) for number in range(20)]
    source = CaptureSource.of_files(paths)
    expected = [[block.values.clone() for block in source.read_together(i, READ, 2)] for i in range(20)]
    source = CaptureSource.of_files(paths)
    if not cached:
        drop_from_cache(paths)
    for index in range(20):
        for step in (0, 2):
            source.announce(index, READ, step, again=again)
    for index in (7, *range(20)):
        got = [block.values for block in source.read_together(index, READ, 2)]
        assert all(map(same_bits, got, expected[index]))


def test_what_is_read_once_passes_the_page_cache(write, monkeypatch, tmp_path):
    skip_unless_there_is_a_way_past(tmp_path)
    monkeypatch.setattr(capture_file, "_SMALL_BYTES", 0)
    monkeypatch.setattr(open_file._places, "randrange", lambda start, stop: start)  # it looks at no other place
    paths = [write(number, img_tokens=4000) for number in range(3)]
    source = CaptureSource.of_files(paths)
    place = load_capture(paths[2]).place_of(READ[0], 2).values
    middle = load_capture(paths[2]).archive.records()[place.record].offset + 100_000
    for again in (False, True):
        drop_from_cache(paths)
        source.announce(2, READ[:1], 2, again=again)
        assert len(source._soon[2]._begun) == 1
        source.read_together(2, READ[:1], 2)
        assert source._files[2]._begun == []
        assert OpenFile(str(paths[2])).is_cached(middle, 1) is again
        source._files.clear()


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [(Path.unlink, r"1\.pt: No such file"), (lambda path: path.write_bytes(b""), r"1\.pt is not a complete capture")],
    ids=["gone", "empty"],
)
def test_a_file_that_is_gone_or_empty_is_told_in_one_line(write, spoil, said):
    source = CaptureSource.of_files([write(0), write(1)])
    spoil(write(1))
    source.announce(1, READ, 0)  # says nothing
    with pytest.raises(FluxIRError, match=said) as caught:
        source.read_together(1, READ, 0)
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("_sizes")
def test_what_is_forgotten_is_read_all_the_same(write):
    paths = [write(number) for number in range(5)]
    source = CaptureSource.of_files(paths)
    expected = [[block.values.clone() for block in source.read_together(i, READ, 2)] for i in range(5)]
    drop_from_cache(paths)
    for index in range(5):
        source.announce(index, READ, 2)
    assert len(source._soon) == 5
    source.forget()
    assert not source._soon
    for index in range(5):
        assert all(map(same_bits, [block.values for block in source.read_together(index, READ, 2)], expected[index]))


def test_threads_do_not_disturb_each_other(write):
    source = CaptureSource.of_files([write(number) for number in range(20)])
    mapped = [source.read(index, READ[2], 0).values.clone() for index in range(20)]

    def read(turn):
        index = turn * 7 % 20
        source.announce(turn % 20, READ, 0)
        return torch.equal(source.read_together(index, READ, 0)[2].values, mapped[index])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(400)))
    assert len(source._files) <= 8


@pytest.mark.usefixtures("_sizes")
def test_files_are_closed_when_nobody_holds_them(write):
    if not Path("/proc/self/fd").exists():
        pytest.skip("asks Linux")
    source = CaptureSource.of_files([write(number) for number in range(20)])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(20):
        source.read_together(index, READ, 0)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8 + 1  # the first one is mapped


def test_memory_is_given_out_again_only_when_no_view_of_it_is_left():
    spare = SpareMemory(2)
    one = spare.bytes(100)
    place, view = one.data_ptr(), one[4:6].view(torch.int16)
    del one
    assert spare.bytes(100).data_ptr() != place
    del view
    assert place in {spare.bytes(80).data_ptr(), (held := spare.bytes(80)).data_ptr()}
    assert spare.bytes(200).numel() == 200
    assert held.numel() == 80
    assert spare.bytes(0).numel() == 0
