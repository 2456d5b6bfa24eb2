"""Files on a disk, read into memory that is used again: through the page cache, or past it.

What is read once gains nothing from the page cache: filling it takes several times the processor time of a disk that
writes where the bytes are wanted (`O_DIRECT`), and it pushes out what others keep there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random
from threading import Lock

from torch import Tensor

from flux_ir.activations.spare_memory import SpareMemory

CAN_READ = hasattr(os, "preadv")  # not on Windows
_CAN_PASS, _CAN_LOOK = hasattr(os, "O_DIRECT"), hasattr(os, "RWF_NOWAIT")  # on Linux
_BLOCK = 4096  # what is read past the page cache, and the memory for it, are blocks
_LOOKS = 2
_places = Random(0)  # where it is looked; nothing that is read depends on it
_PIECE_BYTES = 2**19  # read at once: Linux reads ahead of whoever reads on in pieces, in large pages


class OpenFile:
    """A file to read from. It is closed when nobody holds it any more. May be used by several threads.

    Raises OSError if it cannot be opened or read.
    """

    def __init__(self, path: str) -> None:
        self._fd = self._past = -1
        self._can_pass, self._lock = _CAN_PASS, Lock()
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
        left, filled = memoryview(memory.numpy().data), 0
        while count := os.preadv(self._fd, [left[filled : filled + _PIECE_BYTES]], place + filled):
            filled += count
        return memory[:filled]

    def descriptor(self, *, past_cache: bool) -> int:
        """What to read from. Not every file system has a way past the page cache."""
        if not past_cache:
            return self._fd
        with self._lock:
            if self._past < 0 and self._can_pass:
                self._can_pass = False
                with suppress(OSError):
                    self._past = self._opened_again(os.O_DIRECT)
        return self._past if self._past >= 0 else self._fd

    @contextmanager
    def descriptor_alone(self) -> Iterator[int]:
        """One that nobody else reads from: Linux reads ahead well where it sees one place move on, not several."""
        try:
            alone = self._opened_again(0)
        except OSError:
            yield self._fd
            return
        try:
            yield alone
        finally:
            os.close(alone)

    def _opened_again(self, flags: int) -> int:
        """The same file, whatever has the name by now. Raises OSError where there is no such way."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | flags)

    def is_cached(self, place: int, nbytes: int) -> bool:
        """Whether the page cache seems to have these bytes; False where nobody knows.

        A few are looked at, others each time: to look at a page can bring it into the cache.
        """
        last, byte = min(place + nbytes, self.size), bytearray(1)
        if place >= last:
            return True
        looked_at = [_places.randrange(place, last) for _ in range(_LOOKS)]
        try:
            return _CAN_LOOK and all(os.preadv(self._fd, [byte], one, os.RWF_NOWAIT) for one in looked_at)
        except OSError:  # it would have to wait for the disk
            return False


class Prepared:
    """Bytes to read and the memory for them: all that is left to do is to ask the system, which any thread may."""

    def __init__(self, file: OpenFile, place: int, nbytes: int, spare: SpareMemory, *, past_cache: bool) -> None:
        self.file, self.place, self.nbytes, self._spare = file, place, nbytes, spare
        self._before = place % _BLOCK
        blocks = -(-(self._before + nbytes) // _BLOCK) * _BLOCK
        memory = spare.bytes(blocks + _BLOCK)
        self._memory = memory[-memory.data_ptr() % _BLOCK :][:blocks]
        self._view = memoryview(self._memory.numpy().data)
        self._descriptor, self._filled = file.descriptor(past_cache=past_cache), -1
        self._in_pieces = self._descriptor == file.descriptor(past_cache=False) and blocks > _PIECE_BYTES

    def fill(self) -> None:
        """Asks the system. Errors are left to `result`."""
        with suppress(OSError):
            if self._in_pieces:
                with self.file.descriptor_alone() as descriptor:
                    self._filled = self._read(descriptor, _PIECE_BYTES)
            else:
                self._filled = self._read(self._descriptor, self._view.nbytes)

    def _read(self, descriptor: int, piece: int) -> int:
        filled, start = 0, self.place - self._before
        while count := os.preadv(descriptor, [self._view[filled : filled + piece]], start + filled):
            filled += count
            if start + filled >= self.file.size:  # no more than the last block may be cut short
                break
        return filled

    def result(self) -> Tensor:
        """The bytes, uint8 [nbytes]; fewer at the end of the file. Raises OSError if there is no way to read them."""
        if self._filled < 0:
            return self.file.read(self.place, self.nbytes, self._spare)
        return self._memory[self._before : min(self._before + self.nbytes, self._filled)]
