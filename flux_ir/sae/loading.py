"""Reads ahead: rows of a feed go into the slots of a pool in the feed's order, on a thread if asked.

What is read depends on the order of the requests alone, never on how far the thread has come.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flux_ir.sae.chunks import Chunk
from flux_ir.sae.pool import Pool, Slots

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
        """Ends the thread after the slots that it is filling, and what reads the chunks."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()

    def _fill(self, slots: Slots) -> int:
        filled = 0
        while filled < len(slots):
            chunk = self._current()
            if chunk is None:
                break
            rows = chunk.kept[self._offset : self._offset + len(slots) - filled]
            if len(rows):
                self.pool.put(slots[filled : filled + len(rows)], chunk, rows)
            filled += len(rows)
            self._offset += len(rows)
            if self._offset >= len(chunk.kept):
                self._chunk, self._ordinal, self._offset = None, chunk.ordinal + 1, 0
        self.pool.chunk_of_slot[slots[filled:]] = -1
        return filled

    def _current(self) -> Chunk | None:
        if self._chunk is None:
            self._chunk = next(self._chunks, None)
            self._ordinal = self._chunk.ordinal if self._chunk else _PAST_THE_END
        return self._chunk


def already(filled: int) -> Future[int]:
    """The result of filling that was over before."""
    done: Future[int] = Future()
    done.set_result(filled)
    return done


def refill_pool(pool: Pool, chunk: Chunk, slots: Slots, rows: NDArray[np.int32]) -> None:
    """Put these rows of a chunk back where they were: any slots, any order of rows."""
    order = np.argsort(rows, kind="stable")
    pool.put(slots[order], chunk, rows[order].astype(np.int64))
