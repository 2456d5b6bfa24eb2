"""What reading and writing other programs' folders has in common: configs, tensors, and what a mismatch is called."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures import bare_sae
from flux_ir.sae.config import SAEConfig
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder


def read_config(path: Path, *, program: str) -> dict[str, Any]:
    """A config file as a dictionary. Raises FluxIRError if it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FluxIRError(f"cannot read {path}: {error.strerror}", hint=f"name a folder that {program} saved") from None
    except ValueError as error:
        raise FluxIRError(f"{path} must be a JSON object: {error}", hint="fetch the folder again") from None
    if not isinstance(config, dict):
        raise FluxIRError(f"{path} must be a JSON object: it is not", hint="fetch the folder again")
    return config


def field(config: Mapping[str, Any], name: str, path: Path) -> Any:
    """One field of a config. Raises FluxIRError if it is not there."""
    if name not in config:
        raise FluxIRError(
            f"{path} must have the field {name!r}: it has {', '.join(config) or 'none'}", hint="check the file"
        )
    return config[name]


def check_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises FluxIRError unless there are tensors of exactly these names and shapes."""
    faults = [f"it lacks {name}" for name in shapes if name not in tensors]
    faults += [f"it has {name} too many" for name in tensors if name not in shapes]
    faults += [
        f"{name} has the shape {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if faults:
        raise FluxIRError(
            f"{path} must hold the weights its config describes: {'; '.join(faults)}",
            hint="config and weights are of different autoencoders: fetch both from one folder",
        )


@torch.no_grad()
def filled(config: SAEConfig, tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    """An autoencoder with these parameters and buffers, by our names; W_enc [d_in, d_sae] stands for `encoder`."""
    sae = bare_sae(config)
    for name, tensor in tensors.items():
        target = sae.encoder if name == "W_enc" else getattr(sae, name)
        target.copy_(tensor.T if name == "W_enc" else tensor)
    return sae


def refuse(sae: SparseAutoencoder, program: str, known: tuple[str, ...]) -> FluxIRError:
    """That a program has no such architecture."""
    return FluxIRError(
        f"{program} has no architecture {sae.config.architecture}: it has {', '.join(known)}",
        hint="the folder flux-ir trains is read by sae-lens as it stands, whatever the architecture",
    )
