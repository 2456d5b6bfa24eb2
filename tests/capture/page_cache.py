"""What the page cache holds of a file."""

import os

import pytest

from flux_ir.capture.open_file import OpenFile


def drop_from_cache(paths):
    """These files come from the disk again, where the system can be told so."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def skip_unless_there_is_a_way_past(folder):
    """Skips on systems and file systems (tmpfs) where all reading is through the page cache."""
    path = folder / "probe"
    path.write_bytes(bytes(8192))
    drop_from_cache([path])
    if OpenFile(str(path)).is_cached(0, 1) or not hasattr(os, "O_DIRECT"):
        pytest.skip("no way past the page cache here")
