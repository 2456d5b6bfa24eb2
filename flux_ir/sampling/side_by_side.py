"""Pictures on a CPU: several at a time, each on its own share of the cores.

Threads that share a small picture wait for each other at every layer, and all the more where other programs run; those
that have one each never do. What a picture's share is depends on its size alone, so that a picture has the same bits by
itself and among others.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PIXELS_PER_THREAD = 256 * 256  # with fewer, a second thread gains less than it waits


def threads_per_picture(pixels: int, threads: int) -> int:
    """How many of `threads` work on a picture of so many pixels."""
    return min(threads, max(1, pixels // PIXELS_PER_THREAD))


def side_by_side(work: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
    """`work(batch)` on the CPU, row by row: `pixels` is the size of the picture that each row stands for.

    One row at a time is also faster than several together: what a layer hands to the next stays in the cache.
    """
    available = torch.get_num_threads()
    share = threads_per_picture(pixels, available)
    workers = available // share
    try:
        with ThreadPoolExecutor(workers, "pictures", initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return torch.cat(list(pool.map(work, batch.chunk(len(batch)))))
    finally:
        torch.set_num_threads(available)  # a thread sets the number for itself, and for all that start later
