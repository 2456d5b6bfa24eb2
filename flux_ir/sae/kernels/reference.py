"""The arithmetic of TopK autoencoders as the papers write it: dense, differentiable by PyTorch, and slow.

Nothing trains with this file. `cpu` and `gpu` give the same numbers without the dense matrices, and their tests compare
them with what is here. Notation: n tokens, d their width, F features, k active features per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class EncodedTopK(NamedTuple):
    """The chosen features of each token, and those for the auxiliary loss.

    `values` [n, k] are never negative; `indices` [n, k] int64. `aux_values` [n, a], a at most k_aux, are
    pre-activations of dead features, of either sign; a slot for which no dead feature was left holds the value 0 and
    gets no gradient.
    Both aux fields are None where no auxiliary features were asked for or, on a CPU, where no feature is dead.
    """

    values: Tensor
    indices: Tensor
    aux_values: Tensor | None
    aux_indices: Tensor | None


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of `pre` [n, F] and their columns [n, k], largest first."""
    values, indices = pre.topk(k, dim=-1)
    return values, indices


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
    """TopK codes of x [n, d]: relu of the k largest of (x - b_dec) encoder^T + b_enc (Gao et al. 2024, eq. 1).

    `bf16_copy` is for the fast paths: here every product is made with `encoder` itself.
    """
    pre = F.linear(x if b_dec is None else x - b_dec, encoder, b_enc)
    values, indices = top_k(pre, k)
    aux_values, aux_indices = None, None
    if dead is not None and k_aux > 0:
        aux_values, aux_indices = top_k(pre.masked_fill(~dead, -torch.inf), min(k_aux, pre.shape[1]))
        aux_values = aux_values.masked_fill(aux_values == -torch.inf, 0)
    return EncodedTopK(values.relu(), indices, aux_values, aux_indices)


def sparse_decode(
    values: Tensor, indices: Tensor, decoder: Tensor, b_dec: Tensor | None, *, bf16_copy: Tensor | None = None
) -> Tensor:
    """Reconstructions [n, d]: z decoder + b_dec, z [n, F] being zero but for `values` at `indices`."""
    z = values.new_zeros(values.shape[0], decoder.shape[0]).scatter_add(1, indices, values)
    x_hat = z @ decoder
    return x_hat if b_dec is None else x_hat + b_dec


class AdamStep(NamedTuple):
    """The arguments of one step of Adam besides its tensors."""

    step: int
    """Counted from 1."""
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    unit_rows: bool = False
    """Rows of the weight have length 1 before and after: what of the gradient would only change the length is taken
    away first."""
    scale: Tensor | float | None = None
    """What the gradient is multiplied by (clipping)."""


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
    """One step of Adam (Kingma & Ba 2015) in place; `bf16_copy` becomes the rounded weight."""
    if how.scale is not None:
        gradient = gradient * how.scale
    if how.unit_rows:  # g - <g, w> w: what is left of the gradient is tangential to the unit sphere
        gradient = gradient - (gradient * weight).sum(-1, keepdim=True) * weight
    exp_avg.mul_(how.betas[0]).add_(gradient, alpha=1 - how.betas[0])
    exp_avg_sq.mul_(how.betas[1]).addcmul_(gradient, gradient, value=1 - how.betas[1])
    corrected_sq = exp_avg_sq / (1 - how.betas[1] ** how.step)
    weight.sub_(how.lr / (1 - how.betas[0] ** how.step) * exp_avg / (corrected_sq.sqrt() + how.eps))
    if how.unit_rows:
        weight.div_(weight.norm(dim=-1, keepdim=True))
    if bf16_copy is not None:
        bf16_copy.copy_(weight)
