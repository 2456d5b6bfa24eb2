"""Spans of files, read into memory that is used again: through the page cache, or past it.

Through the page cache a span is read in small pieces, one after the other. Linux then reads ahead of
them in large folios, which costs it half the time of single pages: measured with 2 MB spans in random
order from a cold disk, 0.21 CPU seconds per GB and 2.2 GB/s, against 0.35 and 1.3 with one read per
span (`benchmarks/sae_data.py`). What it reads ahead beyond the span is left in the page cache, so
this is the way where the data fit there.

Where they do not, that would be read in vain. Then a span is one read with O_DIRECT, which leaves the
page cache to others: 0.14 CPU seconds per GB.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.errors import FluxIRError

PIECE_BYTES = 128 * 2**10
_OPEN_FILES = 128
_BLOCK_BYTES = 4096  # what O_DIRECT counts in: of offsets, lengths and addresses
_VALUE_BYTES = 16  # values of all types lie on such offsets, or they are read through the page cache
_O_DIRECT: int | None = getattr(os, "O_DIRECT", None)


class Span(NamedTuple):
    """A part of a file [bytes]."""

    offset: int
    nbytes: int


class Memory:
    """Memory to read into, used again by every read: one thread's, for one read at a time.

    `page_cache`: whether what is read is left there.
    """

    def __init__(self, *, page_cache: bool = True) -> None:
        self.page_cache = page_cache
        self._bytes = np.empty(0, np.uint8)

    def bytes(self, nbytes: int) -> NDArray[np.uint8]:
        """So many bytes, at an address that O_DIRECT takes."""
        if self._bytes.nbytes < nbytes:
            mapped = mmap.mmap(-1, nbytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapped.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = np.frombuffer(mapped, np.uint8)
        return self._bytes[:nbytes]


class SpanReader:
    """Reads spans of files, of which the last few stay open. May be used by several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, bool], _OpenFile] = OrderedDict()
        self._lock = Lock()

    def read(self, path: Path | str, spans: Sequence[Span], memory: Memory | None = None) -> NDArray[np.uint8]:
        """The bytes of the spans, one after the other; with `memory` they lie there.

        Raises FluxIRError for a file that is missing or too short.
        """
        try:
            if memory is not None and not memory.page_cache and len(spans) == 1:
                found = self._read_past(str(path), spans[0], memory)
                if found is not None:
                    return found
            nbytes = sum(span.nbytes for span in spans)
            into = np.empty(nbytes, np.uint8) if memory is None else memory.bytes(nbytes)
            file, filled = self._opened(str(path), direct=False), 0
            for offset, length in spans:
                for first in range(0, length, PIECE_BYTES):
                    piece = into[filled : filled + min(PIECE_BYTES, length - first)]
                    file.fill(piece, offset + first)
                    filled += len(piece)
        except (OSError, EOFError) as error:
            raise FluxIRError(
                f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
                hint="it was moved, or is not as it was when it was opened: start again",
            ) from error
        return into

    def tensor(
        self,
        path: Path | str,
        spans: Sequence[Span],
        dtype: torch.dtype,
        shape: Sequence[int],
        memory: Memory | None = None,
    ) -> Tensor:
        """The spans as one tensor."""
        if not prod(shape):
            return torch.empty(*shape, dtype=dtype)
        return torch.from_numpy(self.read(path, spans, memory)).view(dtype).view(*shape)

    def _read_past(self, path: str, span: Span, memory: Memory) -> NDArray[np.uint8] | None:
        """The span, read past the page cache; None where that is not possible."""
        if _O_DIRECT is None or span.offset % _VALUE_BYTES:
            return None
        before = span.offset % _BLOCK_BYTES
        length = -(-(before + span.nbytes) // _BLOCK_BYTES) * _BLOCK_BYTES
        into = memory.bytes(length)
        try:
            file = self._opened(path, direct=True)
            count = os.preadv(file.descriptor, [into.data], span.offset - before)
        except OSError:  # not every file system can; who reads through the cache finds what else is wrong
            return None
        # After a short read the whole span is read again, through the page cache.
        return into[before : before + span.nbytes] if count >= before + span.nbytes else None

    def _opened(self, path: str, *, direct: bool) -> "_OpenFile":
        with self._lock:
            file = self._open.get((path, direct))
            if file is None:
                file = self._open[path, direct] = _OpenFile(path, _O_DIRECT or 0 if direct else 0)
            self._open.move_to_end((path, direct))
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)  # closed when its last reader is done
        return file


class _OpenFile:
    def __init__(self, path: str, flags: int) -> None:
        self.descriptor = -1
        self._lock = Lock()
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def fill(self, into: NDArray[np.uint8], offset: int) -> None:
        """Read until `into` is full: a read may give a part."""
        while len(into):
            count = self._read(into, offset)
            if not count:
                raise EOFError("it is cut short")
            into, offset = into[count:], offset + count

    def _read(self, into: NDArray[np.uint8], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [into.data], offset)
        with self._lock:  # Windows: a descriptor has one position
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            content = os.read(self.descriptor, len(into))
        into[: len(content)] = np.frombuffer(content, np.uint8)
        return len(content)
