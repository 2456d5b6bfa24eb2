"""The two ways in which threads work here: `in_order`, a bounded ordered map, and `ahead`, a bounded prefetch.

Both keep the order of what they are given, hold a bounded number of results, raise in the consumer's thread what failed
in theirs, and end when the consumer leaves (Ctrl-C and full disks above all): what has not begun is dropped then. The
writer of a capture file has a thread of its own (`recording.writer`), and the shuffle buffer's threads put rows side by
side into one memory (`sae.data.buffer`).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Generic, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(
    work: Callable[[Given], Made],
    items: Iterable[Given],
    workers: int,
    *,
    most: int | None = None,
    eager: bool = False,
    torch_threads: int | None,
) -> Generator[Made, None, None]:
    """`work` of every item, by so many threads, in the order of the items.

    At most `most` items are taken before the first of their results is asked for (None: twice as many as threads), so
    memory stays flat. With `torch_threads` each thread computes on so many cores: on one, what it makes has the same
    bits however many threads there are. None is for work that does not compute with torch.

    `eager` gives a result as soon as it is there, where items take longer to come than the work on them; else so many
    are taken first, so that threads have work while the consumer is busy.
    """
    if torch_threads is None:
        pool = ThreadPoolExecutor(workers, "in_order")
    else:
        import torch  # not above: who only draws pictures needs none, and starts sooner

        available = torch.get_num_threads()
        pool = ThreadPoolExecutor(workers, "in_order", initializer=torch.set_num_threads, initargs=(torch_threads,))
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            while waiting and (len(waiting) >= (most or 2 * workers) or (eager and waiting[0].done())):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if torch_threads is not None:
            torch.set_num_threads(available)  # a thread sets the number for itself, and for all that start later


@contextmanager
def ahead(
    make: Callable[[], Iterator[Made]], *, capacity: int, size: Callable[[Made], int]
) -> Iterator[Iterator[Made]]:
    """What `make()` yields, made ahead in a thread: `capacity` of `size` waits, or a larger one alone.

    Besides those that wait there is the one being made, and what its maker holds. What fails there is raised here,
    behind what was made before it. Leaving the `with` early ends the thread as soon as the result at hand is made, and
    closes the maker.
    """
    running = _Ahead(make, capacity, size)
    running.thread.start()
    try:
        yield running.results()
    finally:
        running.leave()
        running.thread.join()


class _Ahead(Generic[Made]):
    """The thread, and the queue between it and the consumer."""

    def __init__(self, make: Callable[[], Iterator[Made]], capacity: int, size: Callable[[Made], int]) -> None:
        self.make, self.capacity, self.size = make, capacity, size
        self.thread = Thread(target=self._run, name="ahead", daemon=True)
        self._waiting: deque[Made] = deque()
        self._held = 0
        self._finished, self._left = False, False
        self._failure: BaseException | None = None
        self._changed = Condition()

    def results(self) -> Generator[Made, None, None]:
        """What the consumer iterates over."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finished or self._left)
                if not self._waiting:
                    break
                result = self._waiting.popleft()
                self._held -= self.size(result)
                self._changed.notify_all()
            yield result
            del result  # it must not outlive its place in the queue
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def leave(self) -> None:
        """The consumer wants no more."""
        with self._changed:
            self._left = True
            self._waiting.clear()
            self._changed.notify_all()

    def _put(self, result: Made) -> bool:
        """Hand a result over; waits while there is no room. Returns whether the consumer is still there."""
        size = self.size(result)
        with self._changed:
            self._changed.wait_for(lambda: self._left or not self._waiting or self._held + size <= self.capacity)
            if not self._left:
                self._waiting.append(result)
                self._held += size
                self._changed.notify_all()
            return not self._left

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
        results = self.make()
        try:
            for result in results:
                if not self._put(result):
                    return
                del result  # it must not outlive its place in the queue
        finally:
            if isinstance(results, Generator):
                results.close()  # in this thread, where its own `with` blocks were entered
