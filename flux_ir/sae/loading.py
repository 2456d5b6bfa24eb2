"""Reads ahead, on threads if asked: one opens, maps and checks chunks, another moves their rows into slots of the pool.

What is read depends on the order of the requests alone, never on how far the threads have come.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flux_ir.sae.chunks import Chunk
from flux_ir.sae.pool import Pool, Slots

_PAST_THE_END = 2**31 - 1
_CHUNKS_AHEAD = 2


class Loader:
    """Fills slots with the chunk `first`, from its kept row `offset` on, and then with what follows in `chunks`."""

    def __init__(
        self, pool: Pool, first: Chunk | None, chunks: Iterator[Chunk], *, offset: int = 0, prefetch: bool = True
    ) -> None:
        self.pool = pool
        self._source, self._chunk = chunks, first
        self._chunks = ReadAhead(chunks) if prefetch else chunks
        self._ordinal, self._offset = first.ordinal if first else _PAST_THE_END, offset
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokens") if prefetch else None

    @property
    def cursor(self) -> tuple[int, int]:
        """The number of the next chunk and how many of its kept rows are read. Only when nothing is under way."""
        return self._ordinal, self._offset

    def fill(self, slots: Slots) -> Future[int]:
        """Begin to fill these slots; the result is how many of them, the first ones, could be: fewer at the end."""
        if self._thread is not None:
            return self._thread.submit(self._fill, slots)
        done: Future[int] = Future()
        try:
            done.set_result(self._fill(slots))
        except Exception as error:  # noqa: BLE001 (raised where the result is asked for, as the thread does)
            done.set_exception(error)
        return done

    def close(self) -> None:
        """Ends the threads after what they are at, and what reads the chunks."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if isinstance(self._chunks, ReadAhead):
            self._chunks.close()
        if isinstance(self._source, Generator):
            self._source.close()

    def _fill(self, slots: Slots) -> int:
        filled = 0
        while filled < len(slots):
            if self._chunk is None:
                self._chunk = next(self._chunks, None)
                self._ordinal = self._chunk.ordinal if self._chunk else _PAST_THE_END
            if self._chunk is None:
                break
            filled += self._move(self._chunk, slots[filled:])
        self.pool.chunk_of_slot[slots[filled:]] = -1
        return filled

    def _move(self, chunk: Chunk, slots: Slots) -> int:
        """As many of the chunk's rows as there are, and as there are slots for."""
        rows = chunk.kept[self._offset : self._offset + len(slots)]
        if len(rows):
            self.pool.put(slots[: len(rows)], chunk, rows)
        self._offset += len(rows)
        if self._offset >= len(chunk.kept):
            self._chunk, self._ordinal, self._offset = None, chunk.ordinal + 1, 0
        return len(rows)


class ReadAhead:
    """The same chunks, the next two of which are read in a thread: checking them brings them into memory."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chunks")
        self._ahead: deque[Future[Chunk | None]] = deque()

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> Chunk:
        while len(self._ahead) <= _CHUNKS_AHEAD:
            self._ahead.append(self._thread.submit(next, self._chunks, None))
        chunk = self._ahead.popleft().result()
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Ends the thread after the chunk that it is reading."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def already(filled: int) -> Future[int]:
    """The result of filling that was over before."""
    done: Future[int] = Future()
    done.set_result(filled)
    return done


def refill_pool(pool: Pool, chunk: Chunk, slots: Slots, rows: NDArray[np.int32]) -> None:
    """Put these rows of a chunk back where they were: any slots, any order of rows."""
    order = np.argsort(rows, kind="stable")
    pool.put(slots[order], chunk, rows[order].astype(np.int64))
