"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder named after the site. It knows TopK alone."""

import math
from pathlib import Path

from safetensors.torch import save_file

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, write_json
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.foreign import (
    check_finite_weights,
    check_settings,
    check_tensors,
    filled,
    read_config,
    read_tensors,
    refuse,
    whole_number,
)

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
_NOT_OURS = {"activation": "topk", "skip_connection": False, "transcode": False}
# `normalize_decoder` and `multi_topk` are about training: the weights compute the same with and without.
_KNOWN = {*_NOT_OURS, "d_in", "k", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk"}


def save_sparsify(sae: SparseAutoencoder, folder: Path) -> Path:
    """Write a TopK autoencoder, its normalisation folded in. Raises FluxIRError for other architectures."""
    config = sae.config
    if config.architecture != "topk":
        raise refuse(sae, "sparsify", ("topk",))
    folded = sae.folded()
    tensors = {
        "encoder.weight": folded.encoder,
        "encoder.bias": folded.b_enc,
        "W_dec": folded.W_dec,
        "b_dec": folded.b_dec,
    }
    with complete_file(folder / WEIGHTS_FILE) as beside:
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, beside)
    described = {
        "expansion_factor": math.ceil(config.d_sae / config.d_in),
        "normalize_decoder": True,
        "num_latents": config.d_sae,
        "k": config.k,
        **_NOT_OURS,
        "multi_topk": False,
        "d_in": config.d_in,
    }
    write_json(folder / CONFIG_FILE, described)
    return folder


def load_sparsify(folder: Path) -> SparseAutoencoder:
    """Read a sparsify folder. Its last part is taken for the site, as sparsify names them.

    Raises FluxIRError for transcoders, group maximum and skip connections, which are no TopK autoencoders.
    """
    path, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    stored = read_config(path, program="sparsify")
    d_in = whole_number(stored, "d_in", path)
    different = {name: stored[name] for name, value in _NOT_OURS.items() if stored.get(name, value) != value}
    if different:
        raise FluxIRError(
            f"{path} must describe a plain TopK autoencoder: it has {different}", hint="use it with sparsify itself"
        )
    check_settings(path, stored, _KNOWN, program="sparsify")
    d_sae = stored.get("num_latents") or d_in * whole_number(stored, "expansion_factor", path)
    tensors = read_tensors(weights_file)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_tensors(weights_file, tensors, shapes)
    check_finite_weights(weights_file, tensors)
    k = whole_number(stored, "k", path)
    config = SAEConfig(architecture="topk", d_in=d_in, d_sae=d_sae, k=k, site=folder.name)
    weights = {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    return filled(config, weights | {name: tensors[name] for name in ("W_dec", "b_dec")})
