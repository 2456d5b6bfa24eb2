"""A capture file that is read straight into memory, not mapped: large reads from the disk, and no page faults."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from flux_ir.activations.open_file import OpenFile, Prepared
from flux_ir.activations.read_ahead import BegunRead, ReadAhead
from flux_ir.activations.spare_memory import SpareMemory
from flux_ir.errors import FluxIRError
from flux_ir.recording.archive import LOCAL_HEADER, Archive, header_bytes

_PICKLE = "data.pkl"
# Where the zip format puts what: in a record's entry of the directory, and in the end of the directory.
_ENTRY_BYTES, _CRC, _SIZES, _OFFSET = 46, 16, 20, 42
# The end, as torch.save writes it: for large files, a pointer to that, and for others.
_END_BYTES, _START, _POINTED, _SHORT_START = 56 + 20 + 22, 48, 56 + 8, 56 + 20 + 16
_SMALL_BYTES = 2**20
_AROUND = 256  # bytes of a record's header at most; a longer one is left to others
_TOO_LARGE = 2**32 - 1  # stands for a number that is kept elsewhere


class CaptureFile:
    """An open file, whose bytes come into memory that `spare` gives. May be used by several threads.

    Of a small file all is read at once by `load`: every look at it would cost as much.
    """

    def __init__(self, path: str, spare: SpareMemory) -> None:
        self._file, self._spare = OpenFile(path), spare
        self.path, self.size = path, self._file.size
        self.headers: Mapping[str, int] = {}
        """Where the header of each record begins in the file."""
        self._starts: dict[str, int] = {}
        self._looked_at, self._begun = False, list[BegunRead]()
        self._content: Tensor | None = None
        self.is_alike: bool | None = None
        """Whether it is laid out as others are (`alike`); None: nobody has looked."""

    def begin_small(self, ahead: ReadAhead, *, again: bool) -> None:
        """Begin to read all of a small file, unless the page cache has it. What is read `again` comes into that."""
        if not self._looked_at:
            self._looked_at = True
            if ahead.is_needed(self._file):
                self._begun.append(ahead.begin_small(self._prepared(0, self.size, again=again)))

    def begin(self, ahead: ReadAhead, parts: Sequence[tuple[str, int, int]], *, again: bool) -> None:
        """The same for these bytes of a large file's records: name, offset, number."""
        places = [(self.headers[name] + offset, nbytes + _AROUND) for name, offset, nbytes in parts]
        missing = [place for place in places if self._begun_for(*place) is None]
        if not all(self._file.is_cached(*place) for place in missing):
            self._begun.extend(ahead.begin(self._prepared(*place, again=again)) for place in missing)

    def _prepared(self, place: int, nbytes: int, *, again: bool) -> Prepared:
        return Prepared(self._file, place, nbytes, self._spare, past_cache=not again)

    @property
    def is_small(self) -> bool:
        """Whether all of it is read at once."""
        return self.size <= _SMALL_BYTES

    def load(self) -> None:
        """Read a small file whole; nothing of a large one."""
        if self.is_small:
            begun = self._in_memory(0, self.size)
            self._content = self._file.read(0, self.size, self._spare) if begun is None else begun
            self._begun.clear()

    def bytes_at(self, place: int, nbytes: int) -> bytes:
        """A few bytes of the file; fewer at its end."""
        found = self._in_memory(place, nbytes)
        return self._file.bytes_at(place, nbytes) if found is None else found.numpy().tobytes()

    def _in_memory(self, place: int, nbytes: int) -> Tensor | None:
        """Bytes that need not be asked for; fewer at the end of the file."""
        if self._content is not None:
            return self._content[place : place + nbytes]
        begun = self._begun_for(place, nbytes)
        return None if begun is None else begun.bytes(place, nbytes)

    def _begun_for(self, place: int, nbytes: int) -> BegunRead | None:
        return next((read for read in tuple(self._begun) if read.covers(place, nbytes)), None)

    def read(self, record: str, offset: int, nbytes: int) -> Tensor:
        """Bytes of a record from `offset` on, uint8 [nbytes]. What was begun is had once.

        Raises FluxIRError if the file cannot be read, or has been cut short since it was opened.
        """
        try:
            place = self.start_of(record) + offset
            found = self._in_memory(place, nbytes)
            if found is None:
                found = self._file.read(place, nbytes, self._spare)
            elif (begun := self._begun_for(place, nbytes)) is not None:
                with suppress(ValueError):  # another thread had it at the same time
                    self._begun.remove(begun)
        except OSError as error:
            message = f"cannot read the capture {self.path}: {error.strerror}"
            raise FluxIRError(message, hint="check the disk") from error
        except zipfile.BadZipFile as error:
            raise self._incomplete(error) from error
        if found.numel() < nbytes:
            raise self._incomplete(f"it ends {nbytes - found.numel()} bytes early")
        return found

    def start_of(self, record: str) -> int:
        """Where the bytes of a record begin. Raises zipfile.BadZipFile unless its header is where it should be."""
        if record not in self._starts:
            header = self.headers[record]
            self._starts[record] = header + header_bytes(self.bytes_at(header, LOCAL_HEADER.size))
        return self._starts[record]

    def _incomplete(self, reason: object) -> FluxIRError:
        hint = "it was damaged or cut short: capture again"
        return FluxIRError(f"{self.path} is not a complete capture file: {reason}", hint=hint)


class Directory:
    """The directory of a file of `torch.save`, to compare others with: byte by byte, but for what may differ.

    These are checksums, where records lie, and how long `data.pkl` is, which holds the metadata.
    """

    def __init__(self, archive: Archive) -> None:
        file = OpenFile(str(archive.path))
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
