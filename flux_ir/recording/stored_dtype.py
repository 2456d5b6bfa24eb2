"""Keeping activations in fewer bits: plain rounding, and float8 with one scale per token.

float8_e4m3fn ends at 448 and has 3 bits of mantissa, so every token is first scaled to that range. Then no value is off
by more than 1/16 of itself or, where that is more, 2^-18 of the token's largest value.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
READ_AS = torch.bfloat16
"""What float8 with scales is read as."""
ROUNDED = (torch.bfloat16, torch.float16, torch.float32, FLOAT8)
"""What activations can be rounded to."""


class Scaled(NamedTuple):
    """Tokens in float8 and what to multiply each with: float32, of the shape of `values` without its last axis."""

    values: Tensor
    scale: Tensor


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in another float dtype. Outlier dimensions pass 65504, where float16 ends: they are clamped to it."""
    if dtype == torch.float16 and value.dtype != torch.float16:
        largest = torch.finfo(dtype).max
        # bfloat16 has no 65504: clamped in it, values would end at 65536, which is infinity in float16.
        exact = value.float() if value.dtype.itemsize < 4 else value
        return exact.clamp(-largest, largest).to(dtype)
    return value.to(dtype)


def scaled(value: Tensor) -> Scaled:
    """Tokens [..., tokens, d] as float8, each divided by its scale: its largest absolute value / 448.

    The scale of a token of zeros is 1, also where its values are too small for a normal float32 scale.
    """
    exact = value.float()
    scale = exact.abs().amax(-1) / FLOAT8_MAX
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return Scaled((exact / scale[..., None]).to(FLOAT8), scale)


def dequantised(values: Tensor, scale: Tensor | None) -> Tensor:
    """Stored values to compute with: times their scale in float32, rounded to bfloat16; without one as they are."""
    if scale is None:
        return values
    return (values.float() * scale[..., None]).to(READ_AS)
