"""What the page cache holds of a file."""

import os

import pytest

from flux_ir.activations.open_file import OpenFile, Prepared
from flux_ir.activations.spare_memory import SpareMemory


def drop_from_cache(paths):
    """These files come from the disk again, where the system can be told so."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def skip_unless_there_is_a_way_past(folder):
    """Skips where all reading is through the page cache, or nobody knows what it has: other systems, tmpfs, ZFS."""
    path = folder / "probe"
    path.write_bytes(bytes(2**20))
    file = OpenFile(str(path))
    part = Prepared(file, 0, 2**20, SpareMemory(1), past_cache=True)
    seen = [file.is_cached(0, 2**20)]
    drop_from_cache([path])
    seen.append(file.is_cached(0, 2**20))
    part.fill()
    if [*seen, file.is_cached(0, 2**20)] != [True, False, False]:
        pytest.skip("no way past the page cache here")
