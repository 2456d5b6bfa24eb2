"""Every architecture by its name, and how one is made."""

import torch
from jaxtyping import Float
from torch import Tensor

from flux_ir.sae.architectures.batch_topk import BatchTopK, Matryoshka
from flux_ir.sae.architectures.config import Architecture, SAEConfig
from flux_ir.sae.architectures.gated import Gated
from flux_ir.sae.architectures.initialise import initialise_, normalisation_of
from flux_ir.sae.architectures.jumprelu import JumpReLU
from flux_ir.sae.architectures.l1 import L1
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.architectures.topk import TopK

CLASSES: dict[Architecture, type[SparseAutoencoder]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "l1": L1,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "matryoshka": Matryoshka,
}


def bare_sae(config: SAEConfig) -> SparseAutoencoder:
    """An autoencoder of this architecture with zeros for weights: to be filled."""
    return CLASSES[config.architecture](config)


def make_sae(
    config: SAEConfig,
    *,
    sample: Float[Tensor, "n d_in"] | None = None,
    mean: Float[Tensor, "d_in"] | None = None,
    scale: float | Tensor | None = None,
    device: torch.device | str = "cpu",
) -> SparseAutoencoder:
    """A fresh autoencoder, ready to be trained; all its draws come from `config.seed`, whatever the device.

    `sample` are raw tokens: b_dec starts at their mean or geometric median, and where `mean` and `scale` of the data
    are not given, the normalisation is taken from them too (better from 1e5 tokens or more). With none of them there
    is no normalisation and b_dec starts at 0.
    """
    sae = bare_sae(config)
    if sample is not None and (mean is None or scale is None):
        mean, scale = normalisation_of(sample)
    if mean is not None and scale is not None:
        sae.set_normalisation(mean.to("cpu", torch.float32), scale)
    initialise_(sae, None if sample is None else sae.normalise(sample.cpu()))
    return sae.to(device)
