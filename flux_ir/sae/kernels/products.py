"""The two dense products of an autoencoder, made in bfloat16 where asked, with gradients for float32 masters.

Plain autograd would compute the gradient of the tokens only to sum it into b_dec: a third of the encoder's work. Summed
over tokens it is the gradient of the biases times the encoder, which is one vector times one matrix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product a @ b with both rounded to `dtype`, in the dtype of `a`.

    On a GPU the sums stay float32; a CPU has no such product, so there a bfloat16 result is rounded as well.
    """
    if dtype == a.dtype == b.dtype:
        return a @ b
    a_rounded, b_rounded = a.to(dtype), b.to(dtype)
    if a.is_cuda and a.dtype == torch.float32:
        return torch.mm(a_rounded, b_rounded, out_dtype=torch.float32)
    return (a_rounded @ b_rounded).to(a.dtype)


class PreActivations(torch.autograd.Function):
    """(x - b_dec) encoder^T [+ bias]: x [n, d], encoder [F, d]. `bf16_copy`: a rounded copy of the encoder, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        bias: Tensor | None,
        b_dec: Tensor,
        bf16_copy: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        centred = x - b_dec
        ctx.save_for_backward(centred, encoder)
        ctx.dtype, ctx.has_bias = dtype, bias is not None
        pre = product(centred, (encoder if bf16_copy is None else bf16_copy).T, dtype)
        return pre if bias is None else pre.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, encoder = ctx.saved_tensors
        for_x, for_encoder, _, for_b_dec, *_ = ctx.needs_input_grad
        d_bias = gradient.sum(dim=0)
        d_x = product(gradient, encoder, ctx.dtype) if for_x else None
        d_encoder = product(gradient.T, centred, ctx.dtype) if for_encoder else None
        d_b_dec = -(d_bias @ encoder) if for_b_dec else None
        return d_x, d_encoder, d_bias if ctx.has_bias else None, d_b_dec, None, None


class Reconstruction(torch.autograd.Function):
    """z decoder: z [n, F], decoder [F, d]. `bf16_copy`: a rounded copy of the decoder, or None."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, decoder: Tensor, bf16_copy: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(z, decoder)
        ctx.dtype = dtype
        return product(z, decoder if bf16_copy is None else bf16_copy, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, decoder = ctx.saved_tensors
        d_z = product(gradient, decoder.T, ctx.dtype) if ctx.needs_input_grad[0] else None
        d_decoder = product(z.T, gradient, ctx.dtype) if ctx.needs_input_grad[1] else None
        return d_z, d_decoder, None, None
