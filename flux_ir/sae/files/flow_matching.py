"""The hub folders of earlier autoencoders for flow-matching models: `config.json` and `model.safetensors`, TopK only.

There `features` is the width of the activations and `pages` the number of features. Only reading: ours are read by
more programs as they stand.
"""

from pathlib import Path

from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.foreign import (
    check_finite_weights,
    check_settings,
    check_tensors,
    filled,
    read_config,
    read_tensors,
    whole_number,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def load_flow_matching(folder: Path) -> SparseAutoencoder:
    """Read such a folder. Its decoder rows may have other lengths than 1; they are kept. Raises FluxIRError."""
    path = folder / CONFIG_FILE
    stored = read_config(path, program="such a program")
    d_in, d_sae, k = (whole_number(stored, name, path) for name in ("features", "pages", "k"))
    check_settings(path, stored, ("features", "pages", "k"), program="the program that made it")
    tensors = read_tensors(folder / WEIGHTS_FILE)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "bias": (d_in,),
    }
    check_tensors(folder / WEIGHTS_FILE, tensors, shapes)
    check_finite_weights(folder / WEIGHTS_FILE, tensors)
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["bias"],
    }
    return filled(SAEConfig(architecture="topk", d_in=d_in, d_sae=d_sae, k=k), weights)
