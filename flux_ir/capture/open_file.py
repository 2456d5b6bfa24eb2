"""Files on a disk, read into memory that is used again: through the page cache, or past it.

What is read once gains nothing from the page cache: filling it takes several times the processor time of a disk that
writes where the bytes are wanted (`O_DIRECT`), and it pushes out what others keep there.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from random import randrange

from torch import Tensor

from flux_ir.capture.spare_memory import SpareMemory

CAN_READ = hasattr(os, "preadv")  # not on Windows
_CAN_ANNOUNCE, _CAN_PASS, _CAN_LOOK = (
    hasattr(os, name) for name in ("posix_fadvise", "O_DIRECT", "RWF_NOWAIT")
)  # Linux
_BLOCK = 4096  # what is read past the page cache, and the memory for it, are blocks
_LOOKS = 2
_PIECE_BYTES = 2**19  # read at once: Linux reads ahead of whoever reads on in pieces, in large pages


class OpenFile:
    """A file to read from. It is closed when nobody holds it any more. May be used by several threads.

    Raises OSError if it cannot be opened or read.
    """

    def __init__(self, path: str) -> None:
        self._fd = self._past = -1
        self.path, self._fd = path, os.open(path, os.O_RDONLY)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone before
        for descriptor in (self._fd, self._past):
            if descriptor >= 0:
                close(descriptor)

    def bytes_at(self, place: int, nbytes: int) -> bytes:
        """A few bytes of the file; fewer at its end."""
        return os.pread(self._fd, nbytes, place)

    def read(self, place: int, nbytes: int, spare: SpareMemory) -> Tensor:
        """Bytes from `place` on, uint8 [nbytes]; fewer at the end of the file."""
        memory = spare.bytes(nbytes)
        return memory[: _filled(self._fd, memory, place, _PIECE_BYTES)]

    def read_past_cache(self, place: int, nbytes: int, spare: SpareMemory) -> Tensor:
        """The same, straight from the disk where the file system can."""
        before = place % _BLOCK
        blocks = -(-(before + nbytes) // _BLOCK) * _BLOCK
        memory = spare.bytes(blocks + _BLOCK)
        memory = memory[-memory.data_ptr() % _BLOCK :][:blocks]
        with suppress(OSError):
            if self._past < 0 and _CAN_PASS:
                self._past = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            return memory[before : min(_filled(self._past, memory, place - before, blocks), before + nbytes)]
        return self.read(place, nbytes, spare)

    def announce(self) -> None:
        """Have the system fetch all of the file into the page cache. It may as well not."""
        if _CAN_ANNOUNCE:
            with suppress(OSError):  # who reads finds out
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def is_cached(self, place: int, nbytes: int) -> bool:
        """Whether the page cache seems to have these bytes; False where nobody knows.

        A few are looked at, others each time: to look at a page can bring it into the cache.
        """
        byte = bytearray(1)
        looked_at = (randrange(place, min(place + nbytes, self.size)) for _ in range(_LOOKS))
        try:
            return _CAN_LOOK and all(os.preadv(self._fd, [byte], one, os.RWF_NOWAIT) for one in looked_at)
        except OSError:  # it would have to wait for the disk
            return False


def _filled(descriptor: int, memory: Tensor, place: int, at_once: int) -> int:
    """Reads until the memory is full or the file ends, and says how much it was."""
    left = memoryview(memory.numpy().data)
    while left and (count := os.preadv(descriptor, [left[:at_once]], place)):
        left, place = left[count:], place + count
    return memory.numel() - len(left)
