"""Numbers beside the pictures: how far each block's answer is from the final one. Computed in float64.

`LinearCKA` compares whole sites; `features.compare` and `studies.likeness` use it.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.shapes import Pixels

EPSILON = 1e-12


def cosine(value: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between two tensors, taken as one long vector each."""
    a, b = value.double().flatten(), reference.double().flatten()
    return (a @ b / (a.norm() * b.norm()).clamp_min(EPSILON)).item()


def relative_distance(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||: 0 where they are equal, 1 where `value` is as far off as zero would be."""
    a, b = value.double().flatten(), reference.double().flatten()
    return ((a - b).norm() / b.norm().clamp_min(EPSILON)).item()


def psnr_db(pixels: Pixels, reference: Pixels) -> float | None:
    """Peak signal-to-noise ratio [dB] between pictures of bytes; None for equal ones, whose ratio is infinite."""
    # In numpy, which keeps to one core: the others are decoding meanwhile.
    mean_squared_error = float(np.square(np.subtract(pixels.numpy(), reference.numpy(), dtype=np.float64)).mean())
    return None if mean_squared_error == 0 else 10 * math.log10(255**2 / mean_squared_error)


def json_number(value: float | None) -> float | str | None:
    """`value` rounded to six digits for a JSON file, which has no number for infinity or NaN: these are told as text.

    None, which stands for what was not measured or for the ratio of equal pictures, stays apart from them.
    """
    if value is None or math.isfinite(value):
        return None if value is None else float(f"{value:.6g}")
    return str(value)


class HSIC(NamedTuple):
    """The unbiased HSIC of two places, each with itself and both with each other: what CKA is a ratio of."""

    own_x: float
    cross: float
    own_y: float


def cka_of(parts: Iterable[HSIC]) -> float:
    """CKA over several sets of tokens, each centred by itself: of the sums of their HSIC.

    Every HSIC is unbiased, and so is their mean, however few tokens a set has (Nguyen et al., 2021, eq. 3). NaN where
    one place is constant in every set.
    """
    own_x, cross, own_y = (math.fsum(values) for values in zip(*parts, strict=True))
    return cross / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else math.nan


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al., 2019) of two places' activations of the same tokens, debiased.

    HSIC is the unbiased estimate of Song et al. (2012, eq. 5): 1 for equal places, whatever rotation or scale is
    between them, and about 0 for independent ones, below it at times, however few tokens there are for the width.
    The estimate takes tokens to be independent draws. Of linear kernels all its sums can be had without the kernel's
    matrix of tokens by tokens, so tokens may come in any number of batches; memory is that of the widths' products.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._offsets: tuple[Tensor, Tensor] | None = None
        self._pairs: dict[tuple[int, int], _KernelSums] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """More tokens: row i of `x` [n, d1] and of `y` [n, d2] are the same token at the two places."""
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise FluxIRError(
                f"CKA compares the same tokens at two places: got {list(x.shape)} and {list(y.shape)}",
                hint="give one row per token, in the same order",
            )
        x, y = x.double(), y.double()
        if self._offsets is None:  # HSIC is that of any shifted values; near zero the sums keep their digits
            self._offsets = x.mean(0), y.mean(0)
        sides = [side - offset for side, offset in zip((x, y), self._offsets, strict=True)]
        for a, b in ((0, 0), (0, 1), (1, 1)):
            self._pairs.setdefault((a, b), _KernelSums()).add(sides[a], sides[b])
        self.tokens += len(x)

    def value(self) -> float:
        """The alignment so far, at most 1. NaN where one place is constant. Raises FluxIRError for too few tokens."""
        return cka_of([self.hsic()])

    def hsic(self) -> HSIC:
        """What it is the ratio of. Raises FluxIRError for too few tokens."""
        if self.tokens < 4:
            raise FluxIRError(f"debiased CKA takes 4 tokens or more: got {self.tokens}", hint="read more images")
        return HSIC(*(self._pairs[pair].hsic(self.tokens) for pair in ((0, 0), (0, 1), (1, 1))))


class _KernelSums:
    """What the unbiased HSIC of K = x x^T and L = y y^T, both without their diagonals, is made from."""

    def __init__(self) -> None:
        self.products = torch.zeros(())  # x^T y
        self.sums = torch.zeros(()), torch.zeros(())  # of x and of y
        self.by_other = torch.zeros(()), torch.zeros(())  # sum of x_i L_ii, and of y_i K_ii
        self.diagonals = torch.zeros(()), torch.zeros(())  # trace of K and of L
        self.both = torch.zeros(())  # sum of K_ii L_ii

    def add(self, x: Tensor, y: Tensor) -> None:
        k, l = x.square().sum(1), y.square().sum(1)  # noqa: E741 (the paper's name)
        self.products = self.products + x.T @ y
        self.sums = self.sums[0] + x.sum(0), self.sums[1] + y.sum(0)
        self.by_other = self.by_other[0] + l @ x, self.by_other[1] + k @ y
        self.diagonals = self.diagonals[0] + k.sum(), self.diagonals[1] + l.sum()
        self.both = self.both + k @ l

    def hsic(self, n: int) -> float:
        (sum_x, sum_y), (x_by_l, y_by_k), (trace_k, trace_l) = self.sums, self.by_other, self.diagonals
        trace = self.products.square().sum() - self.both  # of K L
        all_k, all_l = sum_x @ sum_x - trace_k, sum_y @ sum_y - trace_l  # 1^T K 1
        middle = sum_x @ self.products @ sum_y - sum_x @ x_by_l - sum_y @ y_by_k + self.both  # 1^T K L 1
        total = trace + all_k * all_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * middle
        return float(total / (n * (n - 3)))
