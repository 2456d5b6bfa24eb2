"""Memory that is used again when the last tensor on it is gone: fresh pages cost more than what is computed into them.

A fresh allocation of this size comes from the kernel page by page: clearing the 38 MB of one gradient takes longer than
computing it.
"""

import math
import weakref
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SpareMemory:
    """Makes tensors on the CPU from memory that is free again, of which it keeps at most `most` pieces."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._free: dict[int, NDArray[np.uint8]] = {}
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of unknown content that shares memory with no other in use."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory = self._take(nbytes)
        # The tensor's storage holds `loan` and nothing else does, so its end is the end of every tensor made of it.
        # Giving back takes no lock: it may happen in any thread, at any moment, in one that holds the lock too.
        loan = memory[:nbytes]
        weakref.finalize(loan, self._free.__setitem__, id(memory), memory).atexit = False
        return torch.from_numpy(loan).view(dtype).view(shape)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        """The smallest piece that is large enough, or a new one."""
        with self._lock:
            free = sorted(self._free.items(), key=lambda item: item[1].nbytes)
            fitting = next((key for key, memory in free if memory.nbytes >= nbytes), None)
            for key, _ in free[: max(0, len(free) - self.most)]:
                if key != fitting:
                    self._free.pop(key, None)
            if fitting is not None:
                return self._free.pop(fitting)
        return np.empty(nbytes, np.uint8)
