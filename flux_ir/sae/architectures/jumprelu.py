"""JumpReLU (Rajamanoharan et al. 2024b): each feature has a threshold of its own, learnt, below which it is 0.

A threshold moves the loss only by the jumps of activations that cross it. So its gradient is an estimate: the density
of pre-activations at the threshold, taken with a rectangle `bandwidth` wide that is centred on it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.losses import FeatureRows, LossParts, Rows, TrainingState
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder

_START_VALUES = 2**24  # pre-activations looked at to start from
_LOWEST = 1e-3  # of the bandwidth: where a threshold lands that was stepped to 0 or below


class JumpReLU(SparseAutoencoder):
    """z = pre where pre > threshold, else 0.

    The thresholds are stored as they are, not as logarithms, which Adam could only change by a factor per step. They
    stay above 0 because `keep_valid` runs before every loss and every export.
    """

    in_feature_units = ("b_enc", "threshold")

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.bandwidth = config.bandwidth * math.sqrt(config.d_in)
        """In normalised space, where a token is about sqrt(d_in) long."""
        self.threshold = nn.Parameter(torch.full((config.d_sae,), self.bandwidth))

    def features_of(self, xn: Rows) -> FeatureRows:
        pre = self.pre_activations(xn, self.b_enc)
        return torch.where(pre > self.threshold, pre, 0).relu()

    def loss(self, xn: Rows, state: TrainingState) -> LossParts:
        """The error in units of the batch's variance (the papers' tokens have length 1), and the L0 penalty."""
        self.keep_valid()
        pre = self.pre_activations(xn, self.b_enc)  # not cut at 0 and not thresholded: both gradients look at it whole
        z = _Jump.apply(pre, self.threshold, self.bandwidth)
        l0 = _Step.apply(pre, self.threshold, self.bandwidth).sum(dim=1).mean()
        penalty = losses.l0_penalty(l0, self.config.target_l0, state.across)
        fvu = losses.squared_error(self.reconstruct(z), xn) / losses.variance(xn, state.across)
        return losses.parts(
            fvu,
            self.config.l0_weight * state.sparsity_scale * penalty,
            None,
            fired=losses.fired(z),
            l0=l0,
            fvu=fvu,
        )

    @torch.no_grad()
    def start_from(self, xn: Rows) -> None:
        """With a target L0, one threshold for all that has so many features active. Otherwise a bandwidth, as it is.

        A threshold moves by about the learning rate per step: from near 0, where half of all features are active, it
        would take thousands of steps to come where the target is, and the penalty would drown the error till then.
        """
        if self.config.target_l0 is None:
            return
        some = xn[: max(1, _START_VALUES // self.config.d_sae)]
        pre = self.pre_activations(some, self.b_enc).flatten()
        active = min(max(1, round(self.config.target_l0 * len(some))), len(pre))
        self.threshold.copy_(pre.topk(active, sorted=False).values.min().clamp_min(self.bandwidth))

    @torch.no_grad()
    def keep_valid(self) -> None:
        """Put thresholds that a step took to 0 or below just above it; the others stay as they are."""
        self.threshold.copy_(torch.where(self.threshold > 0, self.threshold, _LOWEST * self.bandwidth))


class _Jump(torch.autograd.Function):
    """pre H(pre - threshold): eq. 11 of the paper, and the same jump seen from the pre-activation."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        crossing = gradient * threshold * _density(pre, threshold, ctx.bandwidth)
        return torch.where(pre > threshold, gradient, 0) + crossing, -crossing.sum(dim=0), None


class _Step(torch.autograd.Function):
    """H(pre - threshold): eq. 12 of the paper, and the same from the pre-activation."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        crossing = gradient * _density(pre, threshold, ctx.bandwidth)
        return crossing, -crossing.sum(dim=0), None


def _density(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel, 1 / bandwidth where pre is within bandwidth / 2 of the threshold, else 0."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth
