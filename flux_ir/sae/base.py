"""The door to this package: what programs that use sparse autoencoders import.

Behind it: `config` what one is, `sparse_autoencoder` what all share, one file per architecture, `losses` the terms of
training, `architectures` how one is made, `files` how one is saved and loaded.
"""

from flux_ir.sae.architectures import make_sae
from flux_ir.sae.config import SAEConfig
from flux_ir.sae.files import load_sae, save_sae
from flux_ir.sae.losses import Across, LossParts, OneProcess, TrainingState
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder, SparseFeatures

__all__ = [
    "Across",
    "LossParts",
    "OneProcess",
    "SAEConfig",
    "SparseAutoencoder",
    "SparseFeatures",
    "TrainingState",
    "load_sae",
    "make_sae",
    "save_sae",
]
