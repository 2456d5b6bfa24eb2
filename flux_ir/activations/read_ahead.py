"""Reads that begin before anybody waits for them, on threads that do nothing else.

Threads of Python take turns, and a turn can cost as much as opening a file. So whoever begins a read prepares it, and
small files are read several in a row.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from torch import Tensor

from flux_ir.activations.open_file import OpenFile, Prepared

_THREADS = 3  # with one the disk would be idle between its reads
_GROUP = 16  # small files


class BegunRead:
    """Bytes of a file from a place on, on their way."""

    def __init__(self, ahead: "ReadAhead", group: "Group", prepared: Prepared) -> None:
        self._ahead, self._group, self._prepared = ahead, group, prepared

    def covers(self, place: int, nbytes: int) -> bool:
        """Whether these bytes of the file are among them."""
        start = self._prepared.place
        return start <= place and place + nbytes <= start + self._prepared.nbytes

    def bytes(self, place: int, nbytes: int) -> Tensor:
        """Waits for these bytes, uint8 [nbytes]; fewer at the end of the file. Raises OSError as reading does."""
        self._ahead.wait_for(self._group)
        return self._prepared.result()[place - self._prepared.place :][:nbytes]


class ReadAhead:
    """Reads in the order in which reads are begun, a few at a time. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._next, self._not_cached = Group(), 0

    def is_needed(self, file: OpenFile) -> bool:
        """Whether the page cache lacks some of a small file. Where one is lacking, the next few are not looked for."""
        if not self._not_cached % _GROUP and file.is_cached(0, file.size):
            return False
        self._not_cached += 1
        return True

    def begin(self, prepared: Prepared) -> BegunRead:
        """Read this soon. Does not wait."""
        group = Group()
        group.reads.append(prepared)
        self._submit(group)
        return BegunRead(self, group, prepared)

    def begin_small(self, prepared: Prepared) -> BegunRead:
        """Read this with others, as soon as there are a few of them or somebody waits. Does not wait."""
        with self._lock:
            group = self._next
            group.reads.append(prepared)
        if len(group.reads) >= _GROUP:
            self._submit(group)
        return BegunRead(self, group, prepared)

    def wait_for(self, group: "Group") -> None:
        """Returns when all of it has been read."""
        self._submit(group)
        assert group.done is not None
        group.done.result()

    def _submit(self, group: "Group") -> None:
        with self._lock:
            if group.done is None:
                self._next = Group() if self._next is group else self._next
                self._threads = self._threads or ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
                group.done = self._threads.submit(group.fill)


class Group:
    """What one thread reads in a row."""

    def __init__(self) -> None:
        self.reads: list[Prepared] = []
        self.done: Future[None] | None = None

    def fill(self) -> None:
        """Reads it all."""
        for read in self.reads:
            read.fill()
        self.reads = []
