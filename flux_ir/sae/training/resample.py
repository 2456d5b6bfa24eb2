"""Resampling of dead features (Bricken et al. 2023, "Neuron resampling"): they start again where the error is largest.

AuxK of the TopK family makes this unnecessary there; L1, JumpReLU and Gated have nothing else.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder

_ENCODER_SHARE = 0.2  # of the mean length of living encoder rows
_ROWS_AT_ONCE = 4096


@torch.no_grad()
def resample_dead_(
    sae: SparseAutoencoder,
    dead: Bool[Tensor, "d_sae"],
    xn: Float[Tensor, "n d_in"],
    *,
    generator: torch.Generator,
) -> Int[Tensor, "_resampled"]:
    """Give dead features new weights in place, and return which features these are, ascending.

    Each gets a token of `xn` (normalised; many more than there are dead features), drawn with a probability that grows
    as the square of its loss, none twice. W_dec takes its direction from b_dec, of length 1; the encoder the same at a
    fifth of the mean length of living rows; biases become 0 and other per-feature values the mean of the living ones.
    Where fewer tokens have an error than features are dead, only so many are resampled.

    `generator` is on the CPU. The optimiser's moments and bf16 copies of the weights are the caller's to reset.
    """
    if dead.all():
        raise FluxIRError(
            "resampling needs a living feature to take its scale from: all are dead",
            hint="lower the sparsity penalty or the learning rate",
        )
    squared_loss = _losses(sae, xn).square().cpu()
    features = dead.nonzero().flatten()[: int((squared_loss > 0).sum())]
    if len(features) == 0:
        return features
    chosen = torch.multinomial(squared_loss, len(features), replacement=False, generator=generator)
    directions = F.normalize(xn[chosen.to(xn.device)] - sae.b_dec, dim=1)
    alive = ~dead
    length = sae.encoder[alive].norm(dim=1).mean()
    sae.W_dec[features] = directions
    if not sae.config.tied:
        sae.encoder[features] = _ENCODER_SHARE * length * directions
    for name, parameter in sae.named_parameters():
        if parameter.shape == dead.shape and name != "b_dec":
            parameter[features] = 0 if name.startswith("b_") else parameter[alive].mean()
    return features


def _losses(sae: SparseAutoencoder, xn: Tensor) -> Tensor:
    """||xn - x_hat||^2 of each token, without holding the features of all at once."""
    errors = [rows - sae.reconstruct(sae.features_of(rows)) for rows in torch.split(xn, _ROWS_AT_ONCE)]
    return torch.cat([error.square().sum(dim=1) for error in errors])
