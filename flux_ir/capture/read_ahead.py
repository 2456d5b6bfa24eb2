"""Work for the disk that begins before anybody waits for it, on threads that do nothing else.

Threads of Python take turns, and each turn costs about as much as opening a file: so large parts of files are read on
them, but small files are only announced, several at once.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from torch import Tensor

from flux_ir.capture.open_file import OpenFile
from flux_ir.capture.spare_memory import SpareMemory

_THREADS = 2  # with one the disk would be idle between its reads
_FILES_AT_ONCE = 8


class BegunRead:
    """Bytes of a file from `place` on, on their way."""

    def __init__(self, place: int, nbytes: int, read: Future[Tensor]) -> None:
        self.place, self.nbytes, self._read = place, nbytes, read

    def covers(self, place: int, nbytes: int) -> bool:
        """Whether these bytes of the file are among them."""
        return self.place <= place and place + nbytes <= self.place + self.nbytes

    def bytes(self, place: int, nbytes: int) -> Tensor:
        """Waits for these bytes, uint8 [nbytes]; fewer at the end of the file. Raises OSError as reading does."""
        return self._read.result()[place - self.place :][:nbytes]


class ReadAhead:
    """Reads parts of any files, a few at a time, in the order in which they are begun."""

    def __init__(self, spare: SpareMemory) -> None:
        self._spare = spare
        self._lock = Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._announced: list[OpenFile] = []

    def begin(self, file: OpenFile, place: int, nbytes: int, *, again: bool) -> BegunRead:
        """Read these bytes, past the page cache unless they are read `again`. Does not wait."""
        read = file.read if again else file.read_past_cache
        return BegunRead(place, nbytes, self._started().submit(read, place, nbytes, self._spare))

    def announce(self, file: OpenFile) -> None:
        """Have the system fetch a small file, when there are a few of them. Does not wait."""
        with self._lock:
            self._announced.append(file)
            if len(self._announced) < _FILES_AT_ONCE:
                return
            files, self._announced = self._announced, []
        self._started().submit(_announce, files)

    def _started(self) -> ThreadPoolExecutor:
        with self._lock:
            self._threads = self._threads or ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
            return self._threads


def _announce(files: Sequence[OpenFile]) -> None:
    for file in files:
        file.announce()
