"""Bytes are the same whichever way they come from the disk."""

import errno
import os
from pathlib import Path

import pytest
import torch

from flux_ir.capture import open_file
from flux_ir.capture.open_file import OpenFile
from flux_ir.capture.read_ahead import ReadAhead
from flux_ir.capture.spare_memory import SpareMemory
from tests.capture.page_cache import drop_from_cache, skip_unless_there_is_a_way_past

SIZE = 3 * 4096 + 1234
PARTS = [
    (0, SIZE),
    (0, 1),
    (1, 4096),
    (4095, 2),
    (4096, 4096),
    (5000, 3000),
    (SIZE - 1, 1),
    (SIZE - 5000, 9000),
    (SIZE, 5),
]


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "file"
    path.write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", ["read", "read_past_cache", "begun", "begun again"])
def test_every_way_gives_the_bytes_of_the_file(path, cached, way):
    if not cached:
        drop_from_cache([path])
    whole, file, spare = path.read_bytes(), OpenFile(str(path)), SpareMemory(2)
    for place, nbytes in PARTS:
        if way.startswith("begun"):
            begun = ReadAhead(spare).begin(file, place, nbytes, again=way == "begun again")
            assert begun.covers(place, nbytes)
            got = begun.bytes(place, nbytes)
        else:
            got = getattr(file, way)(place, nbytes, spare)
        assert got.numpy().tobytes() == whole[place : place + nbytes]


def test_a_part_of_what_was_begun(path):
    begun = ReadAhead(SpareMemory(2)).begin(OpenFile(str(path)), 100, 9000, again=False)
    assert begun.bytes(200, 8000).numpy().tobytes() == path.read_bytes()[200:8200]
    assert not any(begun.covers(*part) for part in [(99, 10), (9000, 200), (0, 20000)])


def test_a_file_system_without_a_way_past_is_read_as_ever(path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(open_file.os, "open", refuse)
    file = OpenFile(str(path))
    assert file.read_past_cache(5, 5000, SpareMemory(1)).numpy().tobytes() == path.read_bytes()[5:5005]


def test_what_the_page_cache_has_is_known(tmp_path, monkeypatch):
    skip_unless_there_is_a_way_past(tmp_path)
    size, path = 4 * 2**20, tmp_path / "large"
    path.write_bytes(bytes(size))
    file = OpenFile(str(path))
    assert file.is_cached(0, size)  # it has just been written
    drop_from_cache([path])
    for _ in range(3):  # looking does not fill the cache
        assert not file.is_cached(0, size)
    file.read_past_cache(0, size, SpareMemory(1))
    assert not file.is_cached(0, size)  # nor does reading past it
    file.read(0, size, SpareMemory(1))
    assert file.is_cached(0, size)
    assert file.is_cached(0, size + 300)  # as far as there is a file
    monkeypatch.setattr(open_file, "_CAN_LOOK", False)
    assert not file.is_cached(0, size)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux")
def test_a_file_is_closed_when_nobody_holds_it(path):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    file = OpenFile(str(path))
    file.read_past_cache(0, 10, SpareMemory(1))
    assert open_files() > before
    del file
    assert open_files() == before
