"""L1, also called standard (Bricken et al. 2023; the penalty as in Conerly et al. 2024): relu, and activations cost."""

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.losses import FeatureRows, LossParts, Rows, TrainingState
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder


class L1(SparseAutoencoder):
    """z = relu(pre); lambda says how sparse it gets."""

    def features_of(self, xn: Rows) -> FeatureRows:
        return self.pre_activations(xn, self.b_enc).relu()

    def loss(self, xn: Rows, state: TrainingState) -> LossParts:
        """||x - x_hat||^2 + lambda sum |z_f| ||d_f||, the mean over tokens."""
        z = self.features_of(xn)
        error = losses.squared_error(self.reconstruct(z), xn)
        return losses.parts(
            error,
            self.config.l1_weight * state.sparsity_scale * losses.l1(z, self.W_dec),
            None,
            fired=losses.fired(z),
            l0=losses.mean_active(z),
            fvu=error / losses.variance(xn, state.across),
        )
