"""BatchTopK (Bussmann et al. 2024): of a batch of N tokens, the N k largest activations, however they fall on tokens.

A single token has no batch, so afterwards a feature is active above a threshold: the running mean of the smallest
activation that training kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.losses import Across, FeatureRows, LossParts, Rows, TrainingState
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.architectures.topk import auxiliary_loss
from flux_ir.sae.kernels.choose import EncodedTopK, encode_top_k, sparse_decode

_CANDIDATES = 4
"""Columns that are looked at per token at first, in units of k. A token with more of the batch's largest is noticed."""


class BatchTopK(SparseAutoencoder):
    """k features per token on average. The buffer `threshold` is 0 until the first training step."""

    in_feature_units = ("b_enc", "threshold")
    threshold: Tensor
    threshold_updates: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """Sizes of the dictionaries that each have to reconstruct: here the whole one."""
        return (self.config.d_sae,)

    def features_of(self, xn: Rows) -> FeatureRows:
        pre = self.pre_activations(xn, self.b_enc)
        return torch.where(pre > self.threshold, pre.relu(), 0)

    def loss(self, xn: Rows, state: TrainingState) -> LossParts:
        """Mean error of the nested dictionaries in units of the batch's variance, and AuxK."""
        chosen = self._choose(xn, state)
        x_hat: Tensor = self.b_dec
        fvus = []
        variance = losses.variance(xn, state.across)
        for values, indices in chosen.groups:
            x_hat = x_hat + sparse_decode(values, indices, self.W_dec, None, bf16_copy=self.decoder_bf16)
            fvus.append(losses.squared_error(x_hat, xn) / variance)
        reconstruction = torch.stack(fvus).mean()
        auxiliary = auxiliary_loss(self, xn - x_hat, chosen.encoded, state)
        self._update_threshold(chosen.smallest)
        return losses.parts(
            reconstruction,
            None,
            auxiliary,
            fired=losses.fired_sparse(chosen.values, chosen.indices, self.config.d_sae),
            l0=losses.mean_active(chosen.values),
            fvu=fvus[-1],
        )

    def _choose(self, xn: Rows, state: TrainingState) -> "_Chosen":
        """The largest activations of the batch, exactly, found among the largest of each token.

        That is right unless all columns looked at of some token were taken; then more are looked at. The host has to
        wait for this answer; with it come the widths that keep the decoder from working on columns of zeros.
        """
        columns = min(_CANDIDATES * state.k, self.config.d_sae)
        while True:
            encoded = self._encode(xn, state, columns)
            kept, smallest = _largest_of_batch(encoded.values, state.k, state.across)
            groups = _group_of(encoded.indices, self.nested_sizes)
            widths = [(kept & (groups == group)).sum(dim=1).max() for group in range(len(self.nested_sizes))]
            # All processes look again, or none: they gather together.
            full = state.across.mean(kept.all(dim=1).any().float())
            looked_too_little, *most = torch.stack([full, *widths]).tolist()
            if not looked_too_little or columns == self.config.d_sae:
                break
            columns = min(2 * columns, self.config.d_sae)
        values = torch.where(kept, encoded.values, 0)
        parts = []
        for group, width in enumerate(most):
            of_group, columns_of_group = torch.where(groups == group, values, 0).topk(max(1, int(width)), dim=1)
            parts.append((of_group, encoded.indices.gather(1, columns_of_group)))
        return _Chosen(values, encoded.indices, parts, smallest, encoded)

    def _encode(self, xn: Rows, state: TrainingState, columns: int) -> EncodedTopK:
        return encode_top_k(
            xn,
            self.encoder,
            self.b_enc,
            columns,
            b_dec=self.b_dec,
            dead=state.dead,
            k_aux=self.config.aux_features,
            bf16_copy=self.encoder_bf16,
        )

    @torch.no_grad()
    def _update_threshold(self, smallest: Tensor) -> None:
        """The running mean of the smallest kept activation; a batch without any leaves it as it is.

        It starts as the first value and forgets the early ones sooner: after n steps it is of about the last n / 9.
        """
        decay = (self.threshold_updates / (self.threshold_updates + 9)).clamp_max(self.config.threshold_decay)
        has_activation = torch.isfinite(smallest)
        mean = decay * self.threshold + (1 - decay) * smallest.nan_to_num(posinf=0.0)
        self.threshold.copy_(torch.where(has_activation, mean, self.threshold))
        self.threshold_updates.add_(has_activation)


class _Chosen(NamedTuple):
    """Kept activations [n, columns], zeros among them; the same by nested group without most of the zeros."""

    values: Tensor
    indices: Tensor
    groups: Sequence[tuple[Tensor, Tensor]]
    smallest: Tensor
    encoded: EncodedTopK


@torch.no_grad()
def _largest_of_batch(values: Tensor, k: int, across: Across) -> tuple[Tensor, Tensor]:
    """Which of the values [n, columns] are kept, and the smallest of them (infinity if none is above 0).

    Over the batches of all processes together, so that many take the step that one would.
    """
    everyone = across.gather(values)
    smallest = everyone.flatten().topk(everyone.shape[0] * k, sorted=False).values.min()
    kept = (values >= smallest) & (values > 0)
    positive = torch.where(everyone > 0, everyone, torch.inf)
    return kept, torch.where(positive >= smallest, positive, torch.inf).min()


def _group_of(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which of the nested dictionaries is the first to have each feature."""
    return torch.bucketize(indices, torch.tensor(sizes, device=indices.device), right=True)


class Matryoshka(BatchTopK):
    """Matryoshka (Bussmann et al. 2025): BatchTopK whose nested dictionaries, the first features, each reconstruct.

    The loss is the mean of their errors. The activations are chosen once, from the whole dictionary.
    """

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, ascending."""
        return self.config.nested_sizes
