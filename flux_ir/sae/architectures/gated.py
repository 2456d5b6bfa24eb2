"""Gated (Rajamanoharan et al. 2024a): one half of the encoder says whether a feature is active, the other how much.

So the penalty that keeps features off does not also shrink the ones that are on.
"""

import torch
from torch import Tensor, nn

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.losses import FeatureRows, LossParts, Rows, TrainingState
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.kernels.products import Reconstruction


class Gated(SparseAutoencoder):
    """z = 1[pi_gate > 0] relu(pi_mag): both from the same rows of the encoder, pi_mag scaled by exp(r_mag).

    `b_enc` is the bias of the gate (b_gate in files).
    """

    in_feature_units = ("b_enc", "b_mag")

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))

    def features_of(self, xn: Rows) -> FeatureRows:
        return self._gate_and_features(xn)[1]

    def loss(self, xn: Rows, state: TrainingState) -> LossParts:
        """||x - x_hat||^2 + lambda sum relu(pi_gate) + ||x - x_hat of relu(pi_gate)||^2, the mean over tokens (eq. 8).

        The gate's step has no gradient: the gate learns from the second and the third term alone. In the third the
        decoder is held, so that it is trained for the features and not for the gates. The code has ||d_f|| in the
        second term, as `l1` does: rows of the decoder have length 1.
        """
        gate, z = self._gate_and_features(xn)
        opened = gate.relu()
        error = losses.squared_error(self.reconstruct(z), xn)
        return losses.parts(
            error,
            self.config.l1_weight * state.sparsity_scale * losses.l1(opened, self.W_dec),
            losses.squared_error(self._reconstruct_held(opened), xn),
            fired=losses.fired(z),
            l0=losses.mean_active(z),
            fvu=error / losses.variance(xn, state.across),
        )

    def _gate_and_features(self, xn: Rows) -> tuple[Tensor, Tensor]:
        """pi_gate and z."""
        pre = self.pre_activations(xn, None)
        gate = pre + self.b_enc
        magnitude = pre * self.r_mag.exp() + self.b_mag
        return gate, torch.where(gate > 0, magnitude, 0).relu()

    def _reconstruct_held(self, z: Tensor) -> Tensor:
        """The reconstruction with W_dec and b_dec as constants."""
        dtype = self.compute_dtype or z.dtype
        return Reconstruction.apply(z, self.W_dec.detach(), self.decoder_bf16, dtype) + self.b_dec.detach()
