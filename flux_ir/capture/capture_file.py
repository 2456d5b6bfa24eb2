"""A capture file that is read straight into memory, not mapped: large reads from the disk, and no page faults."""

import os
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from flux_ir.capture.archive import LOCAL_HEADER, Archive, header_bytes
from flux_ir.errors import FluxIRError

CAN_READ = hasattr(os, "preadv")  # not on Windows
_PICKLE = "data.pkl"
_CUT_SHORT = "it was damaged or cut short: capture again"
# Where the zip format puts what: in a record's entry of the directory, and in the end of the directory.
_ENTRY_BYTES, _CRC, _SIZES, _OFFSET = 46, 16, 20, 42
# The end, as torch.save writes it: for large files, a pointer to that, and for others.
_END_BYTES, _START, _POINTED, _SHORT_START = 56 + 20 + 22, 48, 56 + 8, 56 + 20 + 16
_SMALL_BYTES = 2**20  # a file that is fetched from the disk whole, as soon as it is open
_AROUND = 256  # bytes of a record's header at most; a longer one is left to others
_TOO_LARGE = 2**32 - 1  # stands for a number that is kept elsewhere


class CaptureFile:
    """An open file. It is closed when nobody holds it any more. May be used by several threads."""

    def __init__(self, path: str) -> None:
        self._fd = -1
        self.path, self._fd = path, os.open(path, os.O_RDONLY)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        if self.size <= _SMALL_BYTES:
            self._soon(0, self.size)
        self.headers: Mapping[str, int] = {}
        """Where the header of each record begins in the file."""
        self._starts: dict[str, int] = {}

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def bytes_at(self, place: int, nbytes: int) -> bytes:
        """Bytes of the file; fewer at its end."""
        return os.pread(self._fd, nbytes, place)

    def start_of(self, record: str) -> int:
        """Where the bytes of a record begin. Raises zipfile.BadZipFile unless its header is where it should be."""
        if record not in self._starts:
            header = self.headers[record]
            self._starts[record] = header + header_bytes(self.bytes_at(header, LOCAL_HEADER.size))
        return self._starts[record]

    def soon(self, record: str, offset: int, nbytes: int) -> None:
        """Ask the system to bring these bytes of a record into memory meanwhile."""
        self._soon(self.headers[record] + offset, nbytes)

    def _soon(self, place: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, place, nbytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, memory: Tensor, record: str, offset: int) -> None:
        """Fill the memory uint8 [n] with the bytes of a record from `offset` on.

        Raises FluxIRError if the file cannot be read, or has been cut short since it was opened.
        """
        left = memoryview(memory.numpy().data)
        try:
            place = self.start_of(record) + offset
            while left and (count := os.preadv(self._fd, [left], place)):
                left, place = left[count:], place + count
        except OSError as error:
            raise FluxIRError(
                f"cannot read the capture {self.path}: {error.strerror}", hint="check the disk"
            ) from error
        except zipfile.BadZipFile as error:
            raise FluxIRError(f"{self.path} is not a complete capture file: {error}", hint=_CUT_SHORT) from error
        if left:
            raise FluxIRError(
                f"{self.path} is not a complete capture file: it ends {len(left)} bytes before a tensor does",
                hint=_CUT_SHORT,
            )


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
