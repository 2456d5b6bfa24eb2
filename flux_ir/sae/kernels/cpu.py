"""TopK autoencoders on a CPU: only the encoder's product is dense, and nothing of the size tokens x features is kept.

What it builds on, measured with d = 768, F = 12,288, k = 32 on one core with AVX-512: `embedding_bag` is the decoder,
and, over entries sorted by feature, the gradient of both weight matrices (2 ms where a dense product takes 100). Where
few features share many entries (auxiliary features, tests) the dense product over the used features wins: `_Used`.
Numbers agree with `reference`; with a bf16 copy of the weights, to bfloat16's accuracy.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flux_ir.sae.kernels.reference import AdamStep, EncodedTopK
from flux_ir.sae.kernels.selection import largest, top_k
from flux_ir.sae.kernels.spare_memory import SpareMemory

__all__ = ["adam_rows_", "encode_top_k", "sparse_decode", "top_k"]

# An entry costs about 170 ns in the three sparse products, a feature and token 11 ns in the three dense ones.
DENSE_BELOW = 16
# Pre-activations in work at a time: a few MB, so that they are chosen from before they leave the cache.
CHUNK_ENTRIES = 3 << 20
# Entries of a matrix that Adam works on at a time: they, their gradient and both moments stay in the L2 cache.
ADAM_ENTRIES = 1 << 17
# Rows of a weight gradient made at a time: a few MB.
FEATURES_AT_ONCE = 1024


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
    """As `choose.encode_top_k`: the pre-activations of a few hundred tokens at a time, chosen from at once."""
    dead_features = None
    if dead is not None and k_aux > 0:
        dead_features = dead.nonzero()[:, 0]
        dead_features = dead_features if len(dead_features) else None
    return EncodedTopK(*_EncodeTopKOnCPU.apply(x, encoder, b_enc, b_dec, dead_features, k, k_aux, bf16_copy))


class _EncodeTopKOnCPU(torch.autograd.Function):
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
        centred = (x if b_dec is None else x - b_dec).to(weight.dtype)
        bias = b_enc.to(weight.dtype)
        rows = max(128, CHUNK_ENTRIES // len(encoder))
        scratch = weight.new_empty(min(rows, len(x)), len(encoder))
        parts = []
        for chunk in torch.split(centred, rows):
            pre = torch.mm(chunk, weight.t(), out=scratch[: len(chunk)]).add_(bias)
            aux = () if dead is None else largest(pre[:, dead], min(k_aux, len(dead)))
            parts.append((*largest(pre, k), *aux))
        values, indices, *aux_parts = (torch.cat(part) for part in zip(*parts, strict=True))
        values = values.to(encoder.dtype).relu_()
        aux_values = aux_indices = None
        if dead is not None:
            aux_values, aux_indices = aux_parts[0].to(encoder.dtype), dead[aux_parts[1]]
            ctx.mark_non_differentiable(aux_indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(centred, encoder, values, indices, aux_indices)
        ctx.has_b_dec = b_dec is not None
        return values, indices, aux_values, aux_indices

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, values_gradient: Tensor | None, _: None, aux_gradient: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        centred, encoder, values, indices, aux_indices = ctx.saved_tensors
        codes = []
        if values_gradient is not None:
            codes.append((values_gradient * (values > 0), indices))
        if aux_gradient is not None:
            codes.append((aux_gradient, aux_indices))
        needs_x, needs_encoder = ctx.needs_input_grad[:2]
        b_enc_gradient = encoder.new_zeros(len(encoder))
        encoder_gradient = x_gradient = b_dec_gradient = None
        for gradient, chosen in codes:
            b_enc_gradient.index_add_(0, chosen.flatten(), gradient.flatten())
            if needs_encoder:
                part = rows_gradient(gradient, chosen, centred, len(encoder), encoder.dtype)
                encoder_gradient = part if encoder_gradient is None else encoder_gradient.add_(part)
            if needs_x:
                part = weighted_rows(gradient, chosen, encoder)
                x_gradient = part if x_gradient is None else x_gradient.add_(part)
        if ctx.has_b_dec:  # every token's x - b_dec goes the same way: no gradient per token is needed
            b_dec_gradient = -(b_enc_gradient @ encoder)
        return x_gradient, encoder_gradient, b_enc_gradient, b_dec_gradient, None, None, None, None


def sparse_decode(
    values: Tensor, indices: Tensor, decoder: Tensor, b_dec: Tensor | None, *, bf16_copy: Tensor | None = None
) -> Tensor:
    """As `choose.sparse_decode`."""
    x_hat: Tensor = _SparseDecodeOnCPU.apply(values, indices, decoder, bf16_copy)
    return x_hat if b_dec is None else x_hat + b_dec


class _SparseDecodeOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, decoder: Tensor, bf16_copy: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, indices, decoder, bf16_copy)
        return weighted_rows(values, indices, decoder if bf16_copy is None else bf16_copy).to(decoder.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, decoder, bf16_copy = ctx.saved_tensors
        weight = decoder if bf16_copy is None else bf16_copy
        gradient = gradient.to(weight.dtype).contiguous()
        values_gradient = decoder_gradient = None
        if ctx.needs_input_grad[0]:
            values_gradient = row_products(gradient, indices, weight).to(values.dtype)
        if ctx.needs_input_grad[2]:
            decoder_gradient = rows_gradient(values, indices, gradient, len(decoder), decoder.dtype)
        return values_gradient, None, decoder_gradient, None


class _Used(NamedTuple):
    """The features that a code uses, if they are so few that dense products over them are faster."""

    features: Tensor  # [u]
    columns: Tensor  # [n, k] the column that each entry's feature has among them

    @classmethod
    def of(cls, indices: Tensor, d_sae: int) -> "_Used | None":
        used = torch.bincount(indices.flatten(), minlength=d_sae) > 0
        if int(used.sum()) > DENSE_BELOW * indices.shape[1]:
            return None
        return cls(used.nonzero()[:, 0], (used.cumsum(0) - 1)[indices])

    def dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes [n, u] of the used features."""
        z = values.new_zeros(len(values), len(self.features), dtype=dtype)
        return z.scatter_add_(1, self.columns, values.to(dtype))


def weighted_rows(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """For each token the sum of the `indices` rows of weight [F, d] times `values`: [n, d]."""
    used = _Used.of(indices, len(weight))
    if used is not None:
        return used.dense(values, weight.dtype) @ weight[used.features]
    return F.embedding_bag(indices, weight.detach(), mode="sum", per_sample_weights=values.detach().to(weight.dtype))


def row_products(vectors: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """The inner products of each of `vectors` [n, d] with the `indices` rows of weight [F, d]: [n, k]."""
    used = _Used.of(indices, len(weight))
    if used is not None:
        return (vectors @ weight[used.features].t()).gather(1, used.columns)
    n, k = indices.shape
    starts = torch.arange(0, n * k, k)
    tokens = torch.arange(n).repeat_interleave(k)
    # What embedding_bag's own backward calls: no copy of the chosen rows is made.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, weight, indices.flatten(), starts, tokens, 0
    )
    return products.view(n, k)


def rows_gradient(values: Tensor, indices: Tensor, vectors: Tensor, d_sae: int, dtype: torch.dtype) -> Tensor:
    """The gradient [F, d] of a weight matrix: for each feature the sum, over its entries, of value times the token's
    vector. Entries are sorted by feature; each row of the result is written once.
    """
    gradient = _GRADIENTS.empty((d_sae, vectors.shape[1]), dtype)
    used = _Used.of(indices, d_sae)
    if used is not None:
        part = used.dense(values, vectors.dtype).t() @ vectors
        return gradient.zero_().index_copy_(0, used.features, part.to(dtype))
    # By embedding_bag 2 ms, where MKL's sparse product takes 38 and index_add_ 135 (one thread, N = 2,048, k = 32).
    entries = values.flatten().nonzero()[:, 0]
    features = indices.flatten()[entries]
    entries = entries[features.to(torch.int32).sort(stable=True).indices]
    tokens, weights = entries // indices.shape[1], values.flatten()[entries].to(vectors.dtype)
    ends = torch.bincount(features, minlength=d_sae).cumsum(0)
    start = 0
    for rows, row_ends in zip(
        torch.split(gradient, FEATURES_AT_ONCE), torch.split(ends, FEATURES_AT_ONCE), strict=True
    ):
        own = slice(start, int(row_ends[-1]))
        starts = F.pad(row_ends[:-1] - start, (1, 0))
        rows.copy_(F.embedding_bag(tokens[own], vectors, starts, mode="sum", per_sample_weights=weights[own]))
        start = own.stop
    return gradient


# In fresh memory the 38 MB of one gradient (d = 768, F = 12,288) cost 18 ms of page faults, more than computing them.
_GRADIENTS = SpareMemory(most=4)


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
    """As `choose.adam_rows_`, over blocks of rows that stay in the cache from the projection to the bf16 copy."""
    rows = max(1, ADAM_ENTRIES * len(weight) // max(1, weight.numel()))
    steps, (beta1, beta2) = [torch.tensor(float(how.step))], how.betas
    bf16_copies = torch.split(weight, rows) if bf16_copy is None else torch.split(bf16_copy, rows)
    blocks = zip(
        torch.split(weight, rows),
        torch.split(gradient, rows),
        torch.split(exp_avg, rows),
        torch.split(exp_avg_sq, rows),
        strict=True,
    )
    for (w, g, m, v), rounded in zip(blocks, bf16_copies, strict=True):
        if how.scale is not None:
            g.mul_(how.scale)
        if how.unit_rows:
            g.addcmul_(torch.linalg.vecdot(g, w)[:, None], w, value=-1)
        torch._fused_adam_(
            [w], [g], [m], [v], [], steps,
            lr=how.lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=how.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        if how.unit_rows:
            w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
        if bf16_copy is not None:
            rounded.copy_(w)
