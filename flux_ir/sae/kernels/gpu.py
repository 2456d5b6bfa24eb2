# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels as its own)
"""TopK autoencoders on a GPU, in Triton. It never ran on one so far, so FLUX_IR_TRITON=1 has to ask for it.

Chosen rows are gathered, or products are dense in bfloat16 where those are faster.
A gathered row moves 2 d bytes per entry, a dense product makes 2 F d operations per token: at 4.3 TB/s and 790 TFLOP/s
they take equally long where F = 184 k. Above that, the weight gradients come from one index of the entries sorted by
feature, shared by both matrices; every row of a gradient is summed by one program and written once, so that the same
step gives the same bits. Nothing waits for the device. Only `choose` imports this file, and only on a GPU, because it
needs Triton. With TRITON_INTERPRET=1 before that import it runs on a CPU: so it is tested where there is no GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from flux_ir.sae.kernels.reference import AdamStep, EncodedTopK
from flux_ir.sae.kernels.selection import largest, top_k

__all__ = ["adam_rows_", "encode_top_k", "sparse_decode", "top_k"]

DENSE_BELOW = 184
# Pre-activations made at a time: 1 GB of bfloat16.
CHUNK_ENTRIES = 1 << 29
# Widths of what one program holds in registers.
COLUMNS, ENTRIES = 512, 16


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
    """As `choose.encode_top_k`."""
    dead = dead if k_aux > 0 else None
    return EncodedTopK(*_EncodeTopKInTriton.apply(x, encoder, b_enc, b_dec, dead, k, k_aux, bf16_copy))


class _EncodeTopKInTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        dead: Tensor | None,
        k: int,
        k_aux: int,
        bf16_copy: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weight = encoder if bf16_copy is None else bf16_copy
        centred = (x if b_dec is None else x - b_dec).to(weight.dtype).contiguous()
        bias = b_enc.to(weight.dtype)
        parts = []
        for chunk in torch.split(centred, max(1024, CHUNK_ENTRIES // len(encoder))):
            pre = torch.addmm(bias, chunk, weight.t())
            aux = () if dead is None else largest(pre.masked_fill(~dead, -torch.inf), min(k_aux, len(dead)))
            parts.append((*largest(pre, k), *aux))
        values, indices, *aux_parts = (torch.cat(part) for part in zip(*parts, strict=True))
        values = values.to(encoder.dtype).relu_()
        aux_values = aux_indices = None
        if dead is not None:
            aux_indices = aux_parts[1]
            aux_values = aux_parts[0].to(encoder.dtype).masked_fill_(~dead[aux_indices], 0)
            ctx.mark_non_differentiable(aux_indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(centred, encoder, values, indices, aux_indices, dead)
        ctx.has_b_dec = b_dec is not None
        return values, indices, aux_values, aux_indices

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, values_gradient: Tensor | None, _: None, aux_gradient: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        centred, encoder, values, indices, aux_indices, dead = ctx.saved_tensors
        codes = []
        if values_gradient is not None:
            codes.append((values_gradient * (values > 0), indices))
        if aux_gradient is not None:
            codes.append((aux_gradient * dead[aux_indices], aux_indices))
        if not codes:
            return (None,) * 8
        gradients = [rows_gradient(gradient, chosen, centred, len(encoder)) for gradient, chosen in codes]
        encoder_gradient, b_enc_gradient = gradients[0]
        for more in gradients[1:]:
            encoder_gradient.add_(more.rows)
            b_enc_gradient.add_(more.sums)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            parts = [weighted_rows(gradient, chosen, encoder, None) for gradient, chosen in codes]
            x_gradient = torch.stack(parts).sum(0).to(encoder.dtype)
        # Every token's x - b_dec goes the same way: no gradient per token is needed.
        b_dec_gradient = -(b_enc_gradient @ encoder) if ctx.has_b_dec else None
        return x_gradient, encoder_gradient, b_enc_gradient, b_dec_gradient, None, None, None, None


def sparse_decode(
    values: Tensor, indices: Tensor, decoder: Tensor, b_dec: Tensor | None, *, bf16_copy: Tensor | None = None
) -> Tensor:
    """As `choose.sparse_decode`."""
    return _SparseDecodeInTriton.apply(values, indices, decoder, b_dec, bf16_copy)


class _SparseDecodeInTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, decoder: Tensor, b_dec: Tensor | None, bf16_copy: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(values, indices, decoder, bf16_copy)
        return weighted_rows(values, indices, decoder if bf16_copy is None else bf16_copy, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, decoder, bf16_copy = ctx.saved_tensors
        weight = decoder if bf16_copy is None else bf16_copy
        for_values, _, for_decoder, for_b_dec, _ = ctx.needs_input_grad
        b_dec_gradient = gradient.sum(0) if for_b_dec else None
        gradient = gradient.to(weight.dtype).contiguous()
        values_gradient = row_products(gradient, indices, weight) if for_values else None
        decoder_gradient = rows_gradient(values, indices, gradient, len(decoder)).rows if for_decoder else None
        return values_gradient, None, decoder_gradient, b_dec_gradient, None


def _is_dense(indices: Tensor, d_sae: int) -> bool:
    return d_sae < DENSE_BELOW * indices.shape[1]


def _dense(values: Tensor, indices: Tensor, d_sae: int, dtype: torch.dtype) -> Tensor:
    z = torch.zeros(len(values), d_sae, dtype=dtype, device=values.device)
    return z.scatter_add_(1, indices, values.to(dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b, summed and returned in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def weighted_rows(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For each token the sum of the `indices` rows of weight [F, d] times `values`, plus `bias`: float32 [n, d]."""
    if _is_dense(indices, len(weight)):
        out = _product(_dense(values, indices, len(weight), weight.dtype), weight)
        return out if bias is None else out.add_(bias)
    (n, k), d = indices.shape, weight.shape[1]
    out = torch.empty(n, d, dtype=torch.float32, device=weight.device)
    grid = (n, triton.cdiv(d, COLUMNS))
    weighted_rows_kernel[grid](
        values.contiguous(), indices, weight, weight if bias is None else bias, out, d, k, bias is not None, COLUMNS
    )
    return out


def row_products(vectors: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """The inner products of each of `vectors` [n, d] with the `indices` rows of weight [F, d]: float32 [n, k]."""
    if _is_dense(indices, len(weight)):
        return (vectors @ weight.t()).gather(1, indices).float()
    (n, k), d = indices.shape, weight.shape[1]
    out = torch.empty(n, k, dtype=torch.float32, device=weight.device)
    row_products_kernel[(n,)](vectors, indices, weight, out, d, k, triton.next_power_of_2(d))
    return out


class RowsGradient(NamedTuple):
    """The gradient [F, d] of a weight matrix and, for its bias, the sums [F] of the values; float32."""

    rows: Tensor
    sums: Tensor


def rows_gradient(values: Tensor, indices: Tensor, vectors: Tensor, d_sae: int) -> RowsGradient:
    """For each feature the sum, over its entries, of value times the token's vector."""
    if _is_dense(indices, d_sae):
        z = _dense(values, indices, d_sae, vectors.dtype)
        return RowsGradient(_product(z.t(), vectors), z.sum(0, dtype=torch.float32))
    d = vectors.shape[1]
    rows = torch.empty(d_sae, d, dtype=torch.float32, device=vectors.device)
    sums = torch.empty(d_sae, dtype=torch.float32, device=vectors.device)
    order, starts = _INDEX.of(indices, d_sae)
    grid = (d_sae, triton.cdiv(d, COLUMNS))
    rows_gradient_kernel[grid](
        values.contiguous(), order, starts, vectors, rows, sums, d, indices.shape[1], COLUMNS, ENTRIES
    )
    return RowsGradient(rows, sums)


class _FeatureIndex:
    """Entries sorted by feature, remembered for the codes last asked for: the decoder's gradient makes it, the
    encoder's, right after it, finds it.
    """

    def __init__(self) -> None:
        self._of: tuple[Tensor, int, int] | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
        """`order` [n k]: entries by feature; `starts` [F + 1]: where each feature's begin."""
        if self._of is not None and self._last is not None:
            known, version, features = self._of
            same = known.data_ptr() == indices.data_ptr() and known.shape == indices.shape
            if same and version == indices._version and features == d_sae:
                return self._last
        sorted_features, order = indices.flatten().to(torch.int32).sort(stable=True)
        edges = torch.arange(d_sae + 1, dtype=torch.int32, device=indices.device)
        self._of = (indices, indices._version, d_sae)  # holds the memory, so that its address stays taken
        self._last = (order, torch.searchsorted(sorted_features, edges))
        return self._last


_INDEX = _FeatureIndex()


@torch.no_grad()
def adam_rows_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    how: AdamStep,
    *,
    bf16_copy: Tensor | None = None,
) -> None:
    """As `choose.adam_rows_`: one program per row."""
    d = weight[0].numel()
    factor = None if how.scale is None else torch.as_tensor(how.scale, dtype=torch.float32, device=weight.device)
    adam_kernel[(len(weight),)](
        weight,
        gradient.contiguous(),
        exp_avg,
        exp_avg_sq,
        weight if bf16_copy is None else bf16_copy,
        weight if factor is None else factor,
        d,
        how.lr / (1 - how.betas[0] ** how.step),
        how.betas[0],
        how.betas[1],
        (1 - how.betas[1] ** how.step) ** 0.5,
        how.eps,
        how.scale is not None,
        how.unit_rows,
        bf16_copy is not None,
        triton.next_power_of_2(d),
        num_warps=8,
    )


# ---- The kernels, in Triton: sums are float32 whatever the operands are. Matrices are contiguous.


@triton.jit  # type: ignore[untyped-decorator]
def weighted_rows_kernel(values, indices, weight, bias, out, d, k, has_bias: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[token] = sum over entries of value * weight[index] (+ bias), `width` columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    inside = columns < d
    total = tl.zeros([width], dtype=tl.float32)
    if has_bias:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for entry in range(k):
        value = tl.load(values + token * k + entry).to(tl.float32)
        row = tl.load(indices + token * k + entry)
        total += value * tl.load(weight + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * d + columns, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def row_products_kernel(vectors, indices, weight, out, d, k, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[token, entry] = <vectors[token], weight[index]>; the token's vector stays in registers (width >= d)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, width)
    inside = columns < d
    vector = tl.load(vectors + token * d + columns, mask=inside, other=0.0).to(tl.float32)
    for entry in range(k):
        row = tl.load(indices + token * k + entry)
        other = tl.load(weight + row * d + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * k + entry, tl.sum(vector * other, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def rows_gradient_kernel(  # type: ignore[no-untyped-def]
    values,
    order,
    starts,
    vectors,
    out,
    sums,
    d,
    k,
    width: tl.constexpr,
    at_once: tl.constexpr,
):
    """out[feature] = sum over the feature's entries of value * vectors[token]; sums[feature] = sum of the values."""
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    inside = columns < d
    start = tl.load(starts + feature)
    end = tl.load(starts + feature + 1)
    total = tl.zeros([width], dtype=tl.float32)
    total_value = tl.zeros([at_once], dtype=tl.float32)
    for first in range(start, end, at_once):
        offsets = first + tl.arange(0, at_once)
        present = offsets < end
        entry = tl.load(order + offsets, mask=present, other=0)
        value = tl.load(values + entry, mask=present, other=0.0).to(tl.float32)
        tokens = (entry // k)[:, None] * d + columns[None, :]
        block = tl.load(vectors + tokens, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * block, axis=0)
        total_value += value
    tl.store(out + feature * d + columns, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sums + feature, tl.sum(total_value, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def adam_kernel(  # type: ignore[no-untyped-def]
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    bf16_copy,
    scale,
    d,
    step_size,
    beta1,
    beta2,
    root_correction,
    eps,
    has_scale: tl.constexpr,
    unit_rows: tl.constexpr,
    has_bf16_copy: tl.constexpr,
    width: tl.constexpr,
):
    """One row: project, Adam, back to length 1, round into the bf16 copy. Everything is read and written once."""
    columns = tl.arange(0, width)
    inside = columns < d
    offsets = tl.program_id(0).to(tl.int64) * d + columns
    w = tl.load(weight + offsets, mask=inside, other=0.0)
    g = tl.load(gradient + offsets, mask=inside, other=0.0)
    if has_scale:
        g *= tl.load(scale)
    if unit_rows:
        g -= tl.sum(g * w, axis=0) * w
    m = tl.load(exp_avg + offsets, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + offsets, mask=inside, other=0.0)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w -= step_size * m / (tl.sqrt(v) / root_correction + eps)
    if unit_rows:
        w /= tl.sqrt(tl.sum(w * w, axis=0))
    tl.store(exp_avg + offsets, m, mask=inside)
    tl.store(exp_avg_sq + offsets, v, mask=inside)
    tl.store(weight + offsets, w, mask=inside)
    if has_bf16_copy:
        tl.store(bf16_copy + offsets, w, mask=inside)
