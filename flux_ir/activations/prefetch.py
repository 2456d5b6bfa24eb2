"""Activations that never touch a disk: the same blocks of tokens as a collection's, computed while they are consumed.

`stream_blocks` runs any maker of blocks ahead of its consumer, in a thread of its own and bounded in bytes. The maker
that samples and records is `live.live_blocks`.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from threading import Condition, Thread

from flux_ir.activations.blocks import TokenBlock

BlockMaker = Callable[[], Iterator[TokenBlock]]
"""Begins the blocks anew: the same ones in the same order every time."""


def block_bytes(block: TokenBlock) -> int:
    """Bytes of a block's tensors."""
    return sum(part.nbytes for part in (block.values, block.scale, block.positions) if part is not None)


@contextmanager
def stream_blocks(make_blocks: BlockMaker, *, capacity_bytes: int) -> Iterator[Iterator[TokenBlock]]:
    """The blocks of `make_blocks()`, made ahead in a thread: at most `capacity_bytes` wait, or one larger block alone.

    Besides those that wait there is the block being made, and what its maker holds. What fails there is raised here,
    behind the blocks that were made before it. Leaving the `with` early ends the thread as soon as the block at hand is
    made, and closes the maker.
    """
    ahead = _RunAhead(make_blocks, capacity_bytes)
    ahead.thread.start()
    try:
        yield ahead.blocks()
    finally:
        ahead.leave()
        ahead.thread.join()


def running_ahead(make_blocks: BlockMaker, *, capacity_bytes: int) -> BlockMaker:
    """The same blocks as `make_blocks`, made ahead as `stream_blocks` does; the thread ends when an iterator closes."""

    def ahead() -> Iterator[TokenBlock]:
        with stream_blocks(make_blocks, capacity_bytes=capacity_bytes) as blocks:
            yield from blocks

    return ahead


class _RunAhead:
    """The thread, and the queue between it and the consumer."""

    def __init__(self, make_blocks: BlockMaker, capacity_bytes: int) -> None:
        self.make_blocks, self.capacity_bytes = make_blocks, capacity_bytes
        self.thread = Thread(target=self._run, name="stream", daemon=True)
        self._waiting: deque[TokenBlock] = deque()
        self._waiting_bytes = 0
        self._finished, self._left = False, False
        self._failure: BaseException | None = None
        self._changed = Condition()

    def blocks(self) -> Generator[TokenBlock, None, None]:
        """What the consumer iterates over."""
        while (block := self._take()) is not None:
            yield block

    def leave(self) -> None:
        """The consumer wants no more."""
        with self._changed:
            self._left = True
            self._waiting.clear()
            self._changed.notify_all()

    def _take(self) -> TokenBlock | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._finished or self._left)
            if self._waiting:
                block = self._waiting.popleft()
                self._waiting_bytes -= block_bytes(block)
                self._changed.notify_all()
                return block
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    def _put(self, block: TokenBlock) -> bool:
        """Hand a block over; waits while there is no room. Returns whether the consumer is still there."""
        nbytes = block_bytes(block)
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._has_room(nbytes))
            if not self._left:
                self._waiting.append(block)
                self._waiting_bytes += nbytes
                self._changed.notify_all()
            return not self._left

    def _has_room(self, nbytes: int) -> bool:
        return not self._waiting or self._waiting_bytes + nbytes <= self.capacity_bytes

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._make_all()
        except BaseException as error:  # noqa: BLE001 (raised in the thread of the consumer)
            failure = error
        with self._changed:
            self._finished, self._failure = True, failure
            self._changed.notify_all()

    def _make_all(self) -> None:
        blocks = self.make_blocks()
        try:
            while not self._left and (block := next(blocks, None)) is not None:
                if not self._put(block):
                    return
                del block  # it must not outlive its place in the queue
        finally:
            if isinstance(blocks, Generator):
                blocks.close()  # in this thread, where its own `with` blocks were entered
