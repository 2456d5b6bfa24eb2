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
PIXELS_IN_A_PIECE = 2 * 128 * 128  # more small pictures in one call leave the cache, and are slower one by one


def threads_per_picture(pixels: int, threads: int) -> int:
    """How many of `threads` work on a picture of so many pixels."""
    return min(threads, max(1, pixels // PIXELS_PER_THREAD))


def side_by_side(work: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
    """`work(batch)` on the CPU, piece by piece: `pixels` is the size of the picture that each row stands for."""
    available = torch.get_num_threads()
    share = threads_per_picture(pixels, available)
    pieces = torch.split(batch, max(1, PIXELS_IN_A_PIECE // pixels))
    try:
        with ThreadPoolExecutor(
            available // share, "pictures", initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            return torch.cat(list(pool.map(work, pieces)))
    finally:
        torch.set_num_threads(available)  # a thread sets the number for itself, and for all that start later
