"""Reads ahead, on a thread if asked: chunks are read and checked, and their rows moved into slots of the pool.

What is read depends on the order of the requests alone, never on how far the thread has come. One thread does it all;
the disk is told beforehand what will be read.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flux_ir.sae.chunks import Chunk
from flux_ir.sae.pool import Origin, Pool, Slots

_PAST_THE_END = 2**31 - 1


class Loader:
    """Fills slots with the chunk `first`, from its kept row `offset` on, and then with what follows in `chunks`."""

    def __init__(
        self, pool: Pool, first: Chunk | None, chunks: Iterator[Chunk], *, offset: int = 0, prefetch: bool = True
    ) -> None:
        self.pool = pool
        self._chunks, self._chunk = chunks, first
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
        """Ends the thread after what it is at, and what reads the chunks."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def _fill(self, slots: Slots) -> int:
        filled = 0
        moved: list[Origin] = []
        while filled < len(slots):
            if self._chunk is None:
                self._chunk = next(self._chunks, None)
                self._ordinal = self._chunk.ordinal if self._chunk else _PAST_THE_END
            if self._chunk is None:
                break
            moved.append(self._move(self._chunk, slots[filled:]))
            filled += len(moved[-1].rows)
        self.pool.describe(slots[:filled], moved)
        self.pool.chunk_of_slot[slots[filled:]] = -1
        return filled

    def _move(self, chunk: Chunk, slots: Slots) -> Origin:
        """As many of the chunk's rows as there are, and as there are slots for."""
        rows = chunk.kept[self._offset : self._offset + len(slots)]
        if len(rows):
            self.pool.put_values(slots[: len(rows)], chunk, rows)
        self._offset += len(rows)
        if self._offset >= len(chunk.kept):  # its memory is free for the next
            self._chunk, self._ordinal, self._offset = None, chunk.ordinal + 1, 0
        return Origin.of(chunk, rows)


def already(filled: int) -> Future[int]:
    """The result of filling that was over before."""
    done: Future[int] = Future()
    done.set_result(filled)
    return done


def refill_pool(pool: Pool, chunk: Chunk, slots: Slots, rows: NDArray[np.int32]) -> None:
    """Put these rows of a chunk back where they were: any slots, any order of rows."""
    order = np.argsort(rows, kind="stable")
    pool.put(slots[order], chunk, rows[order].astype(np.int64))
