"""A capture file that is read straight into memory, not mapped: large reads from the disk, and no page faults."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from torch import Tensor

from flux_ir.capture.archive import LOCAL_HEADER, Archive, header_bytes
from flux_ir.capture.spare_memory import SpareMemory
from flux_ir.errors import FluxIRError

CAN_READ = hasattr(os, "preadv")  # not on Windows
CAN_ANNOUNCE = CAN_READ and hasattr(os, "posix_fadvise")  # on Linux alone
_PICKLE = "data.pkl"
# Where the zip format puts what: in a record's entry of the directory, and in the end of the directory.
_ENTRY_BYTES, _CRC, _SIZES, _OFFSET = 46, 16, 20, 42
# The end, as torch.save writes it: for large files, a pointer to that, and for others.
_END_BYTES, _START, _POINTED, _SHORT_START = 56 + 20 + 22, 48, 56 + 8, 56 + 20 + 16
_PIECE_BYTES = 2**19  # read at once: Linux reads ahead of whoever reads on in pieces, in large pages
_SMALL_BYTES = 2**20
_AROUND = 256  # bytes of a record's header at most; a longer one is left to others
_MARGIN = 4096  # metadata of another length move what follows
_TOO_LARGE = 2**32 - 1  # stands for a number that is kept elsewhere

Place = tuple[int, int]
"""Where bytes begin in a file, and how many they are; 0: all to the end."""


class CaptureFile:
    """An open file. It is closed when nobody holds it any more. May be used by several threads.

    Of a small file all is read at once by `load`: every look at it would cost as much.
    """

    def __init__(self, path: str) -> None:
        self._fd = -1
        self.path, self._fd = path, os.open(path, os.O_RDONLY)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        self.headers: Mapping[str, int] = {}
        """Where the header of each record begins in the file."""
        self._starts: dict[str, int] = {}
        self._announced: Sequence[Place] = []
        self.content: Tensor | None = None
        """All of a small file, uint8 [size], once it is loaded."""
        self.is_alike: bool | None = None
        """Whether it is laid out as others are (`alike`); None: nobody has looked."""

    def announce(self, places: Sequence[Place]) -> None:
        """Have the system fetch these bytes, without waiting for them. It may as well not."""
        if CAN_ANNOUNCE and self.content is None and places != self._announced:
            self._announced = places
            with suppress(OSError):  # who reads finds out
                for place, nbytes in places:
                    os.posix_fadvise(self._fd, place, nbytes, os.POSIX_FADV_WILLNEED)

    def load(self, spare: SpareMemory) -> None:
        """Read a small file whole, into memory that `spare` gives; nothing for a large one."""
        if self.size <= _SMALL_BYTES:
            content = spare.bytes(self.size)
            self._fill(content, 0)
            self.content = content

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone before
        if self._fd >= 0:
            close(self._fd)

    def bytes_at(self, place: int, nbytes: int) -> bytes:
        """Bytes of the file; fewer at its end."""
        if self.content is None:
            return os.pread(self._fd, nbytes, place)
        return self.content.numpy()[place : place + nbytes].tobytes()

    def start_of(self, record: str) -> int:
        """Where the bytes of a record begin. Raises FluxIRError unless its header is where it should be."""
        if record not in self._starts:
            header = self.headers[record]
            with self._told():
                self._starts[record] = header + header_bytes(self.bytes_at(header, LOCAL_HEADER.size))
        return self._starts[record]

    def read_into(self, memory: Tensor, record: str, offset: int) -> None:
        """Fill the memory uint8 [n] with the bytes of a record from `offset` on.

        Raises FluxIRError if the file cannot be read, or has been cut short since it was opened.
        """
        place = self.start_of(record) + offset
        with self._told():
            self._fill(memory, place)

    def part(self, record: str, offset: int, nbytes: int) -> Tensor:
        """Bytes of a record where they lie in `content`. Raises FluxIRError if it ends before them."""
        assert self.content is not None
        place = self.start_of(record) + offset
        found = self.content[place : place + nbytes]
        with self._told():
            if found.numel() < nbytes:
                raise zipfile.BadZipFile(f"it ends {nbytes - found.numel()} bytes early")
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot read the capture {self.path}: {error.strerror}"
            raise FluxIRError(message, hint="check the disk") from error
        except zipfile.BadZipFile as error:
            hint = "it was damaged or cut short: capture again"
            raise FluxIRError(f"{self.path} is not a complete capture file: {error}", hint=hint) from error

    def _fill(self, memory: Tensor, place: int) -> None:
        left = memoryview(memory.numpy().data)
        while left and (count := os.preadv(self._fd, [left[:_PIECE_BYTES]], place)):
            left, place = left[count:], place + count
        if left:
            raise zipfile.BadZipFile(f"it ends {len(left)} bytes early")


class Directory:
    """The directory of a file of `torch.save`, to compare others with: byte by byte, but for what may differ.

    These are checksums, where records lie, and how long `data.pkl` is, which holds the metadata.
    """

    def __init__(self, archive: Archive) -> None:
        file = CaptureFile(str(archive.path))
        infos = list(archive.infos.values())
        entries = [_ENTRY_BYTES + len(one.orig_filename.encode()) + len(one.extra) + len(one.comment) for one in infos]
        places = np.cumsum([0, *entries])
        self.names = list(archive.infos)
        self._headers = {name: info.header_offset for name, info in archive.infos.items()}
        self._start, self._small = archive.directory_start, file.size <= _SMALL_BYTES
        self.tail_bytes = file.size - archive.directory_start
        tail = np.frombuffer(file.bytes_at(archive.directory_start, self.tail_bytes), np.uint8)
        self._pickle, self._end = int(places[self.names.index(_PICKLE)]), int(places[-1])
        self._offsets = (places[:-1, None] + np.arange(_OFFSET, _OFFSET + 4)).ravel()
        self._same = np.full(self.tail_bytes, 0xFF, np.uint8)
        self._same[self._offsets] = 0
        self._same[(places[:-1, None] + np.arange(_CRC, _CRC + 4)).ravel()] = 0
        self._same[self._pickle + _SIZES : self._pickle + _SIZES + 8] = 0
        for at, width in ((_START, 8), (_POINTED, 8), (_SHORT_START, 4)):
            self._same[self._end + at : self._end + at + width] = 0
        self._expected = (tail & self._same).tobytes()
        plain = all(one.compress_type == 0 and one.file_size < _TOO_LARGE for one in infos)
        # files beyond 4 GB say more in their entries
        self.usable = plain and self.tail_bytes == self._end + _END_BYTES

    def about(self, parts: Sequence[tuple[str, int, int]]) -> list[Place]:
        """About where these bytes of records (name, offset, number) are in such a file, and all that is read before."""
        if self._small:
            return [(0, 0)]
        starts = [self._headers[name] + offset - _MARGIN for name, offset, _ in parts]
        near = [(max(start, 0), nbytes + 2 * _MARGIN) for start, (*_, nbytes) in zip(starts, parts, strict=True)]
        return [(self._headers[_PICKLE], _MARGIN), (max(self._start - _MARGIN, 0), 0), *near]

    def found_in(self, file: CaptureFile) -> tuple[dict[str, int], bytes] | None:
        """Where the headers of records are, and the content of `data.pkl`; None: the directory is another."""
        start = file.size - self.tail_bytes
        if not self.usable or start < 0:
            return None
        tail = file.bytes_at(start, self.tail_bytes)
        here = np.frombuffer(tail, np.uint8)
        if len(tail) != self.tail_bytes or (here & self._same).tobytes() != self._expected:
            return None
        starts = (_number(tail, self._end + _START, 8), _number(tail, self._end + _SHORT_START))
        if starts != (start, start) or _number(tail, self._end + _POINTED, 8) != start + self._end:
            return None
        headers = dict(zip(self.names, here[self._offsets].view("<u4").tolist(), strict=True))
        crc, packed, nbytes = (_number(tail, self._pickle + at) for at in (_CRC, _SIZES, _SIZES + 4))
        place = headers[_PICKLE]
        around = file.bytes_at(place, _AROUND + nbytes)
        data = around[header_bytes(around[: LOCAL_HEADER.size]) :][:nbytes]
        whole = packed == nbytes == len(data) and zlib.crc32(data) == crc
        return (headers, data) if whole and _TOO_LARGE not in headers.values() else None


def _number(tail: bytes, place: int, width: int = 4) -> int:
    return int.from_bytes(tail[place : place + width], "little")
