"""Autoencoders on disk, as sae-lens has them: cfg.json, sae_weights.safetensors and, where known, sparsity.safetensors.

Always with the normalisation folded in, so that a loader needs to know nothing but the weights. BatchTopK and
Matryoshka are JumpReLU there, as they are at inference. What only this program knows stands under `metadata.flux_ir` of
cfg.json, so `load_sae` gives back the class that was saved; saving that again gives the same bytes. Never pickle.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file, write_json
from flux_ir.models.headers import TensorEntry, read_header
from flux_ir.sae.architectures import bare_sae
from flux_ir.sae.config import Architecture, SAEConfig
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"

_LENS_VERSION = "6.0.0"  # the first with this layout of cfg.json
_LENS_NAMES: dict[Architecture, str] = {
    "topk": "topk",
    "batch_topk": "jumprelu",
    "l1": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "matryoshka": "jumprelu",
}
_PLAIN: dict[str, Any] = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
_PICKLES = {".pt", ".pth", ".pkl", ".bin", ".ckpt"}
_UNIT_TOLERANCE = 1e-4


def save_sae(sae: SparseAutoencoder, folder: Path | str, *, unit_decoder: bool = True) -> Path:
    """Write the autoencoder, folded, to the folder, with its `metadata` and `log_frequency`. Returns the folder.

    cfg.json comes last and goes first, so a folder that has one is complete. `unit_decoder` False admits rows of W_dec
    of other lengths than 1 (other programs' autoencoders have them).

    Raises FluxIRError for weights that are not finite, a decoder that is not normalised, metadata JSON cannot say.
    """
    folder = Path(folder)
    folded = sae.folded()
    tensors = _to_lens(folded)
    _check_weights(tensors, unit_decoder=unit_decoder)
    config = _lens_config(sae)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _write_tensors(folder / WEIGHTS_FILE, tensors)
    if sae.log_frequency is None:
        (folder / SPARSITY_FILE).unlink(missing_ok=True)
    else:
        _write_tensors(folder / SPARSITY_FILE, {"sparsity": sae.log_frequency.detach().float().cpu().contiguous()})
    write_json(folder / CONFIG_FILE, config)
    return folder


def load_sae(folder: Path | str, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """The autoencoder of a folder: of the class that was saved, with what `save_sae` kept.

    Folders that sae-lens itself wrote are read too: topk, standard (as l1), jumprelu and gated, without normalisation.

    Raises FluxIRError for a missing, broken or pickled file, an architecture there is not, tensors that do not fit.
    """
    folder = Path(folder)
    _refuse_pickles(folder)
    stored = _read_config(folder / CONFIG_FILE)
    own = stored.get("metadata", {}).get("flux_ir", {})
    config = SAEConfig.from_dict(own["config"]) if own else _config_of_lens(stored, folder)
    sae = bare_sae(config)
    _check_header(folder / WEIGHTS_FILE, _to_lens(sae))
    _from_lens(sae, load_file(folder / WEIGHTS_FILE), folder)
    sae.metadata = dict(own.get("training", {}))
    if (folder / SPARSITY_FILE).is_file():
        _check_header(folder / SPARSITY_FILE, {"sparsity": sae.b_enc})
        sae.log_frequency = load_file(folder / SPARSITY_FILE)["sparsity"].float().to(device)
    return sae.to(device)


def log_frequency_of(frequency: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    """What sparsity.safetensors holds of the share of tokens each feature fires on."""
    return torch.log10(frequency.float() + 1e-10)


def _lens_config(sae: SparseAutoencoder) -> dict[str, Any]:
    config = sae.config
    own = {"config": config.to_dict(), "training": sae.metadata}
    lens: dict[str, Any] = {
        "architecture": _LENS_NAMES[config.architecture],
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        **_PLAIN,
    }
    if config.architecture == "topk":
        lens["k"] = config.k
    lens["metadata"] = {
        "sae_lens_version": _LENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": config.model,
        "hook_name": config.site,
        "site": config.site,
        "steps": None if config.steps is None else list(config.steps),
        "flux_ir": own,
    }
    try:
        return dict(json.loads(json.dumps(lens, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise FluxIRError(
            f"metadata of an autoencoder must be what JSON can say: {error}",
            hint="give numbers, text, lists and dictionaries; no NaN, no tensors",
        ) from error


def _to_lens(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The tensors under sae-lens's names, contiguous, on the CPU."""
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    for name, tensor in _per_feature(sae).items():
        tensors[name] = tensor.expand(sae.config.d_sae)
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def _per_feature(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """What has a value per feature in the file, by its name there: one of ours may stand for all of them."""
    names = {
        "topk": {"b_enc": "b_enc"},
        "l1": {"b_enc": "b_enc"},
        "gated": {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"},
    }.get(sae.config.architecture, {"b_enc": "b_enc", "threshold": "threshold"})
    return {theirs: getattr(sae, ours) for ours, theirs in names.items()}


@torch.no_grad()
def _from_lens(sae: SparseAutoencoder, tensors: Mapping[str, Tensor], folder: Path) -> None:
    sae.encoder.copy_(tensors["W_enc"].T)
    sae.W_dec.copy_(tensors["W_dec"])
    if sae.config.tied and not torch.equal(tensors["W_enc"].T, tensors["W_dec"]):
        raise FluxIRError(
            f"the encoder in {folder / WEIGHTS_FILE} must be the decoder transposed, as its config says: it is not",
            hint="the file was changed after it was saved; save it with tied false",
        )
    sae.b_dec.copy_(tensors["b_dec"])
    for name, tensor in _per_feature(sae).items():
        stored = tensors[name]
        if tensor.ndim == 0 and not torch.equal(stored, stored[:1].expand_as(stored)):
            raise FluxIRError(
                f"all features of a {sae.config.architecture} have one {name}: {folder / WEIGHTS_FILE} has several",
                hint="set its architecture to jumprelu, which has one for each",
            )
        tensor.copy_(stored if tensor.ndim else stored[0])


def _config_of_lens(stored: Mapping[str, Any], folder: Path) -> SAEConfig:
    """The config of a file that sae-lens wrote."""
    ours: dict[str, Architecture] = {"topk": "topk", "standard": "l1", "jumprelu": "jumprelu", "gated": "gated"}
    where = folder / CONFIG_FILE
    missing = [name for name in ("architecture", "d_in", "d_sae") if name not in stored]
    if missing:
        raise FluxIRError(
            f"{where} must be the config of a sparse autoencoder: it lacks {', '.join(missing)}",
            hint="name a folder that flux-ir or sae-lens saved",
        )
    if stored["architecture"] not in ours:
        raise FluxIRError(
            f"{where} is of the architecture {stored['architecture']!r}, which is not known here",
            hint=f"known are {', '.join(ours)}",
        )
    different = {name: stored[name] for name, value in _PLAIN.items() if stored.get(name, value) != value}
    if different:
        raise FluxIRError(
            f"{where} must describe weights that work on plain activations: it has {different}",
            hint="fold its normalisation into the weights with sae-lens, then save it again",
        )
    metadata = stored.get("metadata", {})
    return SAEConfig(
        architecture=ours[stored["architecture"]],
        d_in=stored["d_in"],
        d_sae=stored["d_sae"],
        k=stored.get("k", 1),
        site=metadata.get("hook_name"),
        model=metadata.get("model_name"),
    )


def _refuse_pickles(folder: Path) -> None:
    if folder.is_file() and folder.suffix in _PICKLES:
        raise FluxIRError(
            f"{folder} may be a pickle, which can run any program when read: it was not opened",
            hint="export it as safetensors where it was made, and name the folder",
        )
    if not folder.is_dir():
        raise FluxIRError(
            f"{folder} must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}: there is no such folder",
            hint="name the folder that training left",
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles and not (folder / WEIGHTS_FILE).is_file():
        raise FluxIRError(
            f"{folder} holds {pickles[0]} and no {WEIGHTS_FILE}: a pickle can run any program when read",
            hint="export it as safetensors where it was made",
        )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FluxIRError(
            f"{path.parent} holds no {CONFIG_FILE}, so it is no autoencoder, or one that was never saved whole",
            hint="name the folder that training left",
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or not isinstance(stored.get("metadata", {}), dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise FluxIRError(f"{path} must be a JSON object: {error}", hint="save the autoencoder again") from error
    return stored


def _check_header(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Raises FluxIRError unless the file has tensors of these names and shapes; only its header is read."""
    if not path.is_file():
        raise FluxIRError(f"{path.parent} holds no {path.name}", hint="copy the whole folder")
    entries = read_header(path)
    faults = [f"it lacks {name}" for name in expected if name not in entries]
    faults += [f"it has {name} too many" for name in entries if name not in expected]
    faults += [_shape_fault(name, entries[name], expected[name]) for name in expected if name in entries]
    faults = [fault for fault in faults if fault]
    if faults:
        raise FluxIRError(
            f"{path} must hold what {CONFIG_FILE} describes: {'; '.join(faults)}",
            hint="the two files are of different autoencoders: copy both from one folder",
        )


def _shape_fault(name: str, entry: TensorEntry, expected: Tensor) -> str:
    shape = tuple(expected.shape)
    return "" if entry.shape == shape else f"{name} has the shape {list(entry.shape)}, not {list(shape)}"


def _check_weights(tensors: Mapping[str, Tensor], *, unit_decoder: bool) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FluxIRError(
                f"weights must be finite: {name} is not", hint="training diverged: lower the learning rate"
            )
    lengths = tensors["W_dec"].norm(dim=1)
    worst = (lengths - 1).abs().max().item() if math.prod(lengths.shape) else 0.0
    if unit_decoder and worst > _UNIT_TOLERANCE:
        raise FluxIRError(
            f"rows of W_dec must have length 1 in the file: one is off by {worst:.2g}",
            hint="call normalise_decoder() before saving",
        )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with complete_file(path) as beside:
        save_file(tensors, beside)
