"""Memory that is used again: fresh pages cost more than what is copied into them."""

import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SpareMemory:
    """Gives out memory, and gives it out again when the last tensor that used it is gone. `keep` pieces wait for that.

    May be used by several threads.
    """

    def __init__(self, keep: int) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=keep)

    def bytes(self, nbytes: int) -> Tensor:
        """An uninitialised tensor uint8 [nbytes]."""
        memory = self._taken()
        if memory is None or memory.nbytes < nbytes:  # one that is too small is not kept
            memory = np.empty(max(nbytes, 1), np.uint8)
        # The tensor's storage holds `loan` and nothing else does, so its end is the end of every view of the tensor.
        loan = memory[:nbytes]
        weakref.finalize(loan, self._free.append, memory)
        return torch.from_numpy(loan)

    def _taken(self) -> NDArray[np.uint8] | None:
        try:
            return self._free.pop()
        except IndexError:
            return None
