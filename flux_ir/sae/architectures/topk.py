"""TopK (Gao et al. 2024): of each token, the k largest pre-activations, those of them above 0."""

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.losses import FeatureRows, LossParts, Rows, Scalar, TrainingState
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder, SparseFeatures
from flux_ir.sae.kernels.choose import EncodedTopK, encode_top_k, sparse_decode


class TopK(SparseAutoencoder):
    """k features per token, and AuxK: k_aux of the dead ones learn what the living leave unexplained."""

    def sparse_features(self, xn: Rows) -> SparseFeatures:
        encoded = encode_top_k(
            xn, self.encoder, self.b_enc, self.config.k, b_dec=self.b_dec, bf16_copy=self.encoder_bf16
        )
        return SparseFeatures(encoded.values, encoded.indices, self.config.d_sae)

    def features_of(self, xn: Rows) -> FeatureRows:
        return self.sparse_features(xn).dense()

    def loss(self, xn: Rows, state: TrainingState) -> LossParts:
        """The error in units of the batch's variance (as in Gao et al. 2024), and AuxK."""
        encoded = encode_top_k(
            xn,
            self.encoder,
            self.b_enc,
            state.k,
            b_dec=self.b_dec,
            dead=state.dead,
            k_aux=self.config.aux_features,
            bf16_copy=self.encoder_bf16,
        )
        x_hat = sparse_decode(encoded.values, encoded.indices, self.W_dec, self.b_dec, bf16_copy=self.decoder_bf16)
        fvu = losses.squared_error(x_hat, xn) / losses.variance(xn, state.across)
        auxiliary = auxiliary_loss(self, xn - x_hat, encoded, state)
        return losses.parts(
            fvu,
            None,
            auxiliary,
            fired=losses.fired_sparse(encoded.values, encoded.indices, self.config.d_sae),
            l0=losses.mean_active(encoded.values),
            fvu=fvu,
        )


def auxiliary_loss(
    sae: SparseAutoencoder,
    residual: Rows,
    encoded: EncodedTopK,
    state: TrainingState,
) -> Scalar | None:
    """AuxK with its coefficient; None, or 0, where no feature is dead.

    The values are pre-activations of either sign: a dead feature whose pre-activations are all below 0 would never get
    a gradient, and so never live, were they cut off at 0.
    """
    if encoded.aux_values is None or encoded.aux_indices is None or state.dead is None:
        return None
    # x_hat holds b_dec already, so the residual is reconstructed without it.
    explained = sparse_decode(encoded.aux_values, encoded.aux_indices, sae.W_dec, None, bf16_copy=sae.decoder_bf16)
    weight = sae.config.aux_coefficient * state.dead.any()  # stays on the device: to ask would make the host wait
    return weight * losses.auxk(residual, explained, state.across)
