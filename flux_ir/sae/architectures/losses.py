"""The terms of every loss, as pure functions, and what a training step takes and returns.

All of it in normalised space and in float32. Means over tokens are means over the tokens of one process: gradients are
averaged over processes afterwards. Where a term is not linear in such a mean (a variance in a denominator, a squared
L0), `Across` gives the mean over all of them, so that one process and many take the same step.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scalar = Float[Tensor, ""]
Rows = Float[Tensor, "n d_in"]
FeatureRows = Float[Tensor, "n d_sae"]

_TINY = 1e-12  # keeps a perfect reconstruction, or a batch of equal tokens, from dividing by zero


@runtime_checkable
class Across(Protocol):
    """Small tensors over all processes that train together. Nothing here carries a gradient."""

    def mean(self, value: Tensor) -> Tensor:
        """All-reduce: the mean of every process's `value`."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """All-gather: every process's `value`, one after the other along the first axis."""
        ...


class OneProcess:
    """The only process there is."""

    def mean(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Tensor) -> Tensor:
        return value


class TrainingState(NamedTuple):
    """What a loss takes beside its tokens. The trainer keeps all schedules."""

    optimiser_step: int
    tokens_seen: int
    """Over all processes."""
    dead: Bool[Tensor, "d_sae"] | None
    """The features without an activation above 0 for too many tokens; None: no auxiliary loss in this step."""
    k: int
    """Active features in this step (it may be annealed)."""
    sparsity_scale: float = 1.0
    """0 to 1: what the penalty of l1, gated and jumprelu is multiplied by while it warms up."""
    across: Across = OneProcess()


class LossParts(NamedTuple):
    """One step's loss. `total` is the sum of the three parts after it, which carry their coefficients."""

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    fired: Tensor
    """bool [d_sae]: features with an activation above 0 on any token of the batch, of this process."""
    l0: Tensor
    """Mean active features per token of this process, without gradient."""
    fvu: Tensor
    """Unexplained share of the batch's variance, without gradient. For a training curve; `metrics` measures it well."""


def squared_error(of: Rows, to: Rows) -> Scalar:
    """Mean over tokens of ||of - to||^2."""
    return (of - to).square().sum(dim=1).mean()


def variance(x: Rows, across: Across) -> Scalar:
    """Mean over the tokens of all processes of ||x - mean||^2, without gradient."""
    x = x.detach()
    mean = across.mean(x.mean(dim=0))
    return across.mean((x - mean).square().sum(dim=1).mean()).clamp_min(_TINY)


def auxk(residual: Rows, reconstruction: Rows, across: Across) -> Scalar:
    """AuxK: the share of the residual's variance that dead features leave unexplained (Gao et al. 2024, A.2).

    1 is what the residual's mean alone would leave.

    `residual` is a target, so it gets no gradient; `reconstruction` is without b_dec, which the residual is free of.
    """
    target = residual.detach()
    return squared_error(reconstruction, target) / variance(target, across)


def l1(z: FeatureRows, decoder: Float[Tensor, "d_sae d_in"]) -> Scalar:
    """Mean over tokens of sum_f |z_f| ||d_f||: the decoder norm enters no other term of a loss."""
    return (z.abs() * decoder.norm(dim=1)).sum(dim=1).mean()


def l0_penalty(l0: Scalar, target: float | None, across: Across) -> Scalar:
    """L0 itself, or ((L0 / target) - 1)^2, with the L0 over all processes and the gradient of this one's."""
    if target is None:
        return l0
    over_all = l0 + (across.mean(l0.detach()) - l0.detach())
    return (over_all / target - 1).square()


def mean_active(values: Float[Tensor, "n _features"]) -> Scalar:
    """L0: mean number of activations above 0 per token, without gradient."""
    return (values.detach() > 0).sum(dim=1).float().mean()


def fired(z: FeatureRows) -> Bool[Tensor, "d_sae"]:
    """The features with an activation above 0 on any token."""
    return (z.detach() > 0).any(dim=0)


def fired_sparse(
    values: Float[Tensor, "n _chosen"], indices: Int[Tensor, "n _chosen"], d_sae: int
) -> Bool[Tensor, "{d_sae}"]:
    """`fired` of chosen activations. To be among the k largest is not enough: the value must be above 0."""
    counts = torch.zeros(d_sae, dtype=torch.float32, device=values.device)
    # Adding up, because a mask of indices would make the host wait for the device.
    return counts.index_add_(0, indices.flatten(), (values.detach() > 0).flatten().float()) > 0


def parts(
    reconstruction: Scalar,
    sparsity: Scalar | None,
    auxiliary: Scalar | None,
    *,
    fired: Bool[Tensor, "d_sae"],
    l0: Scalar,
    fvu: Scalar,
) -> LossParts:
    """The loss of its parts; one that is None counts 0."""
    zero = torch.zeros_like(reconstruction.detach())
    sparsity = zero if sparsity is None else sparsity
    auxiliary = zero if auxiliary is None else auxiliary
    total = reconstruction + sparsity + auxiliary
    return LossParts(total, reconstruction, sparsity, auxiliary, fired, l0.detach(), fvu.detach())
