"""Bytes are the same whichever way they come from the disk."""

import errno
import os
from pathlib import Path

import pytest
import torch

from flux_ir.activations import open_file
from flux_ir.activations.open_file import OpenFile, Prepared
from flux_ir.activations.read_ahead import ReadAhead
from flux_ir.activations.spare_memory import SpareMemory
from tests.activations.page_cache import drop_from_cache, skip_unless_there_is_a_way_past

SIZE = 3 * 4096 + 1234
PARTS = [(0, SIZE), (0, 1), (1, 4096), (4095, 2), (4096, 4096), (5000, 3000), (SIZE - 1, 1), (SIZE - 5000, 9000)]


LINUX = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux")


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "file"
    path.write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    return path


def prepared(file, place, nbytes, *, past_cache=True):
    return Prepared(file, place, nbytes, SpareMemory(1), past_cache=past_cache)


def read_prepared(*args, **how):
    part = prepared(*args, **how)
    part.fill()
    return part.result()


WAYS = {
    "through": lambda file, *part: file.read(*part, SpareMemory(1)),
    "past": read_prepared,
    "prepared, through": lambda *part: read_prepared(*part, past_cache=False),
    "begun": lambda file, *part: ReadAhead().begin(prepared(file, *part)).bytes(*part),
    "begun, small": lambda file, *part: ReadAhead().begin_small(prepared(file, *part)).bytes(*part),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_bytes_of_the_file(path, cached, way):
    if not cached:
        drop_from_cache([path])
    file, whole = OpenFile(str(path)), path.read_bytes()
    for place, nbytes in [*PARTS, (SIZE, 5)]:
        assert WAYS[way](file, place, nbytes).numpy().tobytes() == whole[place : place + nbytes]


@LINUX
@pytest.mark.parametrize("alone", [True, False])
def test_large_parts_come_through_the_page_cache_in_pieces(path, monkeypatch, alone):
    monkeypatch.setattr(open_file, "_PIECE_BYTES", 1000)
    if not alone:  # a system where a file cannot be opened again by its descriptor
        monkeypatch.setattr(OpenFile, "_opened_again", lambda *_: os.open("/nowhere/at/all", os.O_RDONLY))
    read, sizes, known = [], [], os.preadv

    def listen(descriptor, views, *place):
        read.append(descriptor)
        sizes.extend(view.nbytes for view in views)
        return known(descriptor, views, *place)

    monkeypatch.setattr(open_file.os, "preadv", listen)
    file, whole, before = OpenFile(str(path)), path.read_bytes(), open_files()
    for place, nbytes in PARTS:
        assert read_prepared(file, place, nbytes, past_cache=False).numpy().tobytes() == whole[place : place + nbytes]
    assert max(sizes) == 1000
    assert (file.descriptor(past_cache=False) in read) != alone
    assert open_files() == before


def test_small_files_are_read_a_few_at_a_time_or_when_somebody_waits(path):
    file, ahead, whole = OpenFile(str(path)), ReadAhead(), path.read_bytes()
    begun = [ahead.begin_small(prepared(file, *PARTS[i % len(PARTS)])) for i in range(19)]
    assert [read._group.done is not None for read in begun] == [True] * 16 + [False] * 3
    for i in (18, 3, 17, *range(19)):
        place, nbytes = PARTS[i % len(PARTS)]
        assert begun[i].bytes(place, nbytes).numpy().tobytes() == whole[place : place + nbytes]


def test_a_part_of_what_was_begun(path):
    begun = ReadAhead().begin(prepared(OpenFile(str(path)), 100, 9000))
    assert begun.bytes(200, 8000).numpy().tobytes() == path.read_bytes()[200:8200]
    assert begun.covers(100, 9000)
    assert not any(begun.covers(*part) for part in [(99, 10), (9000, 200), (0, 20000)])


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_a_file_system_without_a_way_past_is_read_as_ever(path, monkeypatch, refused):
    file, known = OpenFile(str(path)), getattr(os, refused)

    def refuse(first, second, *more):
        if second & os.O_DIRECT if refused == "open" else first == file._past:
            raise OSError(errno.EINVAL, "Invalid argument")
        return known(first, second, *more)

    if refused == "preadv" and file.descriptor(past_cache=True) == file.descriptor(past_cache=False):
        pytest.skip("there is no way past the page cache here")
    monkeypatch.setattr(open_file.os, refused, refuse)
    assert read_prepared(file, 5, 5000).numpy().tobytes() == path.read_bytes()[5:5005]


def test_a_file_that_takes_the_place_of_another_is_not_read_for_it(path, tmp_path):
    whole, file = path.read_bytes(), OpenFile(str(path))
    (tmp_path / "new").write_bytes(bytes(SIZE))
    (tmp_path / "new").rename(path)
    assert read_prepared(file, 0, SIZE).numpy().tobytes() == whole


def test_a_disk_that_fails_is_told_when_the_bytes_are_wanted(path, monkeypatch):
    part = prepared(OpenFile(str(path)), 5, 5000)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(open_file.os, "preadv", fail)
    begun = ReadAhead().begin(part)
    with pytest.raises(OSError, match="Input/output error"):
        begun.bytes(5, 5000)


def test_what_the_page_cache_has_is_known(tmp_path, monkeypatch):
    skip_unless_there_is_a_way_past(tmp_path)
    size, path = 4 * 2**20, tmp_path / "large"
    path.write_bytes(bytes(size))
    file = OpenFile(str(path))
    assert file.is_cached(0, size)  # it has just been written
    drop_from_cache([path])
    for _ in range(3):  # looking does not fill the cache
        assert not file.is_cached(0, size)
    read_prepared(file, 0, size)
    assert not file.is_cached(0, size)  # nor does reading past it
    read_prepared(file, 0, size, past_cache=False)
    assert file.is_cached(0, size)
    assert file.is_cached(0, size + 300)  # as far as there is a file
    assert file.is_cached(size, 10)  # there is nothing
    monkeypatch.setattr(open_file, "_CAN_LOOK", False)
    assert not file.is_cached(0, size)


def test_where_one_small_file_is_missing_the_next_ones_are_not_looked_for(path, monkeypatch):
    ahead, looked = ReadAhead(), []
    file = OpenFile(str(path))
    monkeypatch.setattr(OpenFile, "is_cached", lambda *_: looked.append(1) or len(looked) < 4)
    assert [ahead.is_needed(file) for _ in range(20)] == [False] * 3 + [True] * 17
    assert len(looked) == 5


@LINUX
def test_a_file_is_closed_when_nobody_holds_it(path):
    before = open_files()
    file = OpenFile(str(path))
    read_prepared(file, 0, 10)
    assert open_files() > before
    del file
    assert open_files() == before
