"""The arithmetic of sparse autoencoders, by the path that suits the device and the sizes. Everyone imports from here.

All functions take float32 master weights; `bf16_copy` (kept fresh by `adam_rows_`) is what `cpu` and `gpu`
make the large products with, where it is given. Codes have the form values [n, k], indices [n, k] int64.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from torch import Tensor

from flux_ir.sae.kernels import cpu, reference
from flux_ir.sae.kernels.reference import AdamStep, EncodedTopK

__all__ = [
    "AdamStep",
    "EncodedTopK",
    "KernelPath",
    "adam_rows_",
    "encode_top_k",
    "path_for",
    "sparse_decode",
    "top_k",
    "using",
]

KernelPath = Literal["reference", "cpu", "gpu"]
ASKED_FOR = "FLUX_IR_TRITON"
_FORCED: list[KernelPath] = []


def path_for(tensor: Tensor) -> KernelPath:
    """The path that works on `tensor`. Each path then chooses between sparse and dense products by the sizes.

    On a GPU that is the reference, which makes its products with the float32 masters whatever `bf16_copy` is, unless
    the environment variable FLUX_IR_TRITON is 1: Triton's kernels never ran on one. They sum in float32, so float64
    goes to the reference in any case, and everything where there is no Triton (it comes with PyTorch for Linux).
    """
    if _FORCED:
        return _FORCED[-1]
    if tensor.device.type == "cpu":
        return "cpu"
    usable = tensor.is_cuda and tensor.element_size() <= 4 and os.environ.get(ASKED_FOR) == "1" and _has_triton()
    return "gpu" if usable else "reference"


@contextmanager
def using(path: KernelPath) -> Iterator[None]:
    """Everything goes this path while the `with` lasts: for tests and benchmarks."""
    _FORCED.append(path)
    try:
        yield
    finally:
        _FORCED.pop()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _path(tensor: Tensor) -> ModuleType:
    match path_for(tensor):
        case "cpu":
            return cpu
        case "gpu":
            return import_module("flux_ir.sae.kernels.gpu")  # the one import of Triton
        case _:
            return reference


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of `pre` [n, F] and their columns (int64) [n, k], in any order.

    Of equal entries any may be chosen. Differentiable: the gradient reaches the chosen entries.
    """
    return _path(pre).top_k(pre, k)


def encode_top_k(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    dead: Tensor | None = None,
    k_aux: int = 0,
    bf16_copy: Tensor | None = None,
) -> EncodedTopK:
    """TopK codes of x [n, d]: relu of the k largest of (x - b_dec) encoder^T + b_enc, encoder [F, d].

    `dead` [F] marks the features among which each token's `k_aux` auxiliary ones are chosen, by their pre-activations,
    which may be negative and are returned as they are. Gradients reach encoder, b_enc and b_dec, through chosen entries
    with a positive value and through all auxiliary ones, and x only where x requires them. `bf16_copy` is that of
    `encoder`.
    """
    return _path(x).encode_top_k(x, encoder, b_enc, k, b_dec=b_dec, dead=dead, k_aux=k_aux, bf16_copy=bf16_copy)


def sparse_decode(
    values: Tensor, indices: Tensor, decoder: Tensor, b_dec: Tensor | None, *, bf16_copy: Tensor | None = None
) -> Tensor:
    """Reconstructions [n, d]: the sum of the `indices` rows of decoder [F, d] times `values`, plus b_dec.

    Gradients reach values, decoder and b_dec. `bf16_copy` is that of `decoder`.
    """
    return _path(values).sparse_decode(values, indices, decoder, b_dec, bf16_copy=bf16_copy)


def adam_rows_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    how: AdamStep,
    *,
    bf16_copy: Tensor | None = None,
) -> None:
    """One step of Adam in place, in one pass over the rows; `gradient` may be overwritten.

    `bf16_copy` becomes the bfloat16 of the result.
    """
    _path(weight).adam_rows_(weight, gradient, exp_avg, exp_avg_sq, how, bf16_copy=bf16_copy)
