"""What readers of other programs' folders share: configs, tensors, and the errors where they do not fit."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.checkpoints.headers import read_header
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.jumprelu import JumpReLU
from flux_ir.sae.architectures.make import bare_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder

LFS_POINTER = b"version https://git-lfs"  # how the text begins that Git LFS leaves instead of a large file
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")  # others are codes that need scales (fp8), or no numbers


def read_config(path: Path, *, program: str) -> dict[str, Any]:
    """A config file as a dictionary. Raises FluxIRError if it is missing or no JSON object."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FluxIRError(f"cannot read {path}: {error.strerror}", hint=f"name a folder that {program} saved") from None
    check_pointer(path, data)
    return read_json(path, hint="fetch the folder again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises FluxIRError for a file that is missing, cut short or a Git LFS pointer, and for types that hold no weights.
    """
    if not path.is_file():
        raise FluxIRError(f"{path.parent} holds no {path.name}", hint="copy the whole folder")
    coded = {name: entry.dtype for name, entry in read_header(path).items() if entry.dtype not in _WEIGHT_TYPES}
    if coded:
        raise FluxIRError(
            f"{path} must hold plain weights: {_listed(coded)}",
            hint="store them as float32 or bfloat16 where it was made",
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FluxIRError(f"{path} is not a whole safetensors file: {error}", hint="fetch the file again") from None


def check_pointer(path: Path, data: bytes) -> None:
    """Raises FluxIRError if this is the beginning of a Git LFS pointer."""
    if data.startswith(LFS_POINTER):
        raise FluxIRError(
            f"{path} is a Git LFS pointer, not the file itself", hint="fetch the file with `git lfs pull`"
        )


def field(config: Mapping[str, Any], name: str, path: Path) -> Any:
    """One field of a config. Raises FluxIRError if it is not there."""
    if name not in config:
        raise FluxIRError(
            f"{path} must have the field {name!r}: it has {', '.join(config) or 'none'}", hint="check the file"
        )
    return config[name]


def whole_number(config: Mapping[str, Any], name: str, path: Path) -> int:
    """A field that counts something. Raises FluxIRError if it is missing or no whole number above 0."""
    value = field(config, name, path)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FluxIRError(f"{name} in {path} must be a whole number above 0: it is {value!r}", hint="check the file")
    return value


def agreed_k(path: Path, said: Mapping[str, Any]) -> int:
    """The k of a folder. `said` has what each place that may hold it says, None where it says nothing.

    Raises FluxIRError if two differ, or if none says it: every guess would give other features.
    """
    given = {where: value for where, value in said.items() if value is not None}
    if not given:
        raise FluxIRError(
            f"{path} must say its k, the number of active features: neither {' nor '.join(said)} does",
            hint="add it to the config; it is a setting of the training",
        )
    for where in given:
        whole_number(given, where, path)
    if len(set(given.values())) > 1:
        values = ", ".join(f"{where}: {value}" for where, value in given.items())
        raise FluxIRError(f"{path} and its weights must have one k: {values}", hint="fetch both from one folder")
    return int(next(iter(given.values())))


def check_settings(path: Path, stored: Mapping[str, Any], known: Collection[str], *, program: str) -> None:
    """Raises FluxIRError for settings that are switched on and not known here: what they change is not known either."""
    unknown = {name: value for name, value in stored.items() if name not in known and not is_off(value)}
    if unknown:
        raise FluxIRError(
            f"{path} has settings that are not known here: {_listed(unknown)}",
            hint=f"use it with {program}; or take them out of the file, if they do not change what the weights compute",
        )


def is_off(value: Any) -> bool:
    """Whether a setting says nothing: null, false, 0, "", "none", and lists and objects of nothing else."""
    if isinstance(value, str):
        return value.lower() in ("", "none")
    if isinstance(value, Mapping):
        return all(map(is_off, value.values()))
    if isinstance(value, list):
        return all(map(is_off, value))
    return not value


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    optional: Collection[str] = (),
) -> None:
    """Raises FluxIRError unless there are tensors of exactly these names and shapes."""
    faults = [f"it lacks {name}" for name in shapes if name not in tensors and name not in optional]
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


def check_finite_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises FluxIRError for weights that are NaN or infinite."""
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise FluxIRError(
            f"weights must be finite: {', '.join(wrong)} in {path} is not",
            hint="its training diverged, or the file is damaged: fetch it again, or use an earlier checkpoint",
        )


@torch.no_grad()
def filled(config: SAEConfig, tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    """An autoencoder with these parameters and buffers, by our names; W_enc [d_in, d_sae] stands for `encoder`."""
    sae = bare_sae(config)
    for name, tensor in tensors.items():
        target = sae.encoder if name == "W_enc" else getattr(sae, name)
        target.copy_(tensor.T if name == "W_enc" else tensor)
    if isinstance(sae, JumpReLU):  # others have thresholds of 0 and less, which are 0: ours are above it
        sae.threshold.clamp_min_(torch.finfo(sae.threshold.dtype).tiny)
    return sae


def refuse(sae: SparseAutoencoder, program: str, known: tuple[str, ...]) -> FluxIRError:
    """The error for an architecture that a program does not have."""
    return FluxIRError(
        f"{program} has no architecture {sae.config.architecture}: it has {', '.join(known)}",
        hint="the folder flux-ir trains is read by sae-lens as it stands, whatever the architecture",
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in values.items())
