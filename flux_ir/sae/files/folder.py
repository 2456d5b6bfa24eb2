"""Autoencoders on disk, as sae-lens has them: cfg.json, sae_weights.safetensors and, where known, sparsity.safetensors.

feature_activations.safetensors beside them is ours: how strongly each feature is active, the unit of steering.

Always with the normalisation folded in, so that a loader needs to know nothing but the weights. BatchTopK and
Matryoshka are JumpReLU there, as they are at inference. What only this program knows is under `metadata.flux_ir` of
cfg.json, so `load_sae` gives back the class that was saved; saving that again gives the same bytes. Never pickle.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.sae.architectures.config import Architecture, SAEConfig
from flux_ir.sae.architectures.make import bare_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.foreign import check_finite_weights, check_tensors, read_config, read_tensors
from flux_ir.sae.files.sae_lens import KEPT_METADATA, read_sae_lens

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
ACTIVATIONS_FILE = "feature_activations.safetensors"

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
_OWN_METADATA = ("sae_lens_version", "model_name", "hook_name", "site", "steps", "flux_ir")
_PICKLES = {".pt", ".pth", ".pkl", ".bin", ".ckpt"}
_UNIT_TOLERANCE = 1e-4


def save_sae(sae: SparseAutoencoder, folder: Path | str, *, unit_decoder: bool = True) -> Path:
    """Write the autoencoder, folded, to the folder, with its `metadata` and what it knows of each feature.

    Returns the folder. All files are written before the first takes its place, so a disk that runs full leaves what was
    there; cfg.json goes first and comes last, so a folder that has one is complete. `unit_decoder` False admits rows of
    W_dec of other lengths than 1 (other programs' autoencoders have them).

    Raises FluxIRError for weights that are not finite, a decoder that is not normalised, metadata JSON cannot say.
    """
    folder = Path(folder)
    folded = sae.folded()
    tensors = _to_lens(folded)
    _check_weights(tensors, unit_decoder=unit_decoder)
    config = json.dumps(_lens_config(sae), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    written = {WEIGHTS_FILE: tensors} | _feature_files(sae)
    if not (folder / WEIGHTS_FILE).is_file():
        (folder / CONFIG_FILE).unlink(missing_ok=True)
    with ExitStack() as stack:  # files take their places in the opposite order
        stack.enter_context(complete_file(folder / CONFIG_FILE)).write_text(config, encoding="utf-8")
        for name in reversed(written):
            save_file(written[name], stack.enter_context(complete_file(folder / name)))
        for name in (CONFIG_FILE, *(name for name in (SPARSITY_FILE, ACTIVATIONS_FILE) if name not in written)):
            (folder / name).unlink(missing_ok=True)
    return folder


def load_sae(folder: Path | str, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """The autoencoder of a folder: of the class that was saved, with what `save_sae` kept.

    Folders that sae-lens itself wrote are read too, as `sae_lens` says.

    Raises FluxIRError for a missing, broken or pickled file, an unknown architecture, tensors that do not fit or are
    not finite, and settings that cannot be folded into the weights.
    """
    folder = Path(folder)
    _refuse_pickles(folder)
    config_file = folder / CONFIG_FILE
    stored = _read_config(config_file)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    own = stored.get("metadata", {}).get("flux_ir", {})
    if own:
        config = SAEConfig.from_dict(own["config"])
        _check_own(config_file, stored, config)
        sae = bare_sae(config)
        check_tensors(folder / WEIGHTS_FILE, tensors, {name: tuple(t.shape) for name, t in _to_lens(sae).items()})
        check_finite_weights(folder / WEIGHTS_FILE, tensors)
        _from_lens(sae, tensors, folder)
        sae.metadata = dict(own.get("training", {}))
        others = {name: value for name, value in stored["metadata"].items() if name not in _OWN_METADATA}
        if others.get("sae_lens_training_version", "") is None:  # it was trained here
            del others["sae_lens_training_version"]
        if others:
            sae.metadata[KEPT_METADATA] = others
    else:
        sae = read_sae_lens(config_file, stored, tensors)
    _read_feature_files(sae, folder, device)
    return sae.to(device)


def _feature_files(sae: SparseAutoencoder) -> dict[str, dict[str, Tensor]]:
    """The files that say something of each feature, by name, as far as it is known."""
    known = {
        SPARSITY_FILE: {"sparsity": sae.log_frequency},
        ACTIVATIONS_FILE: {"mean_active": sae.mean_active, "max_active": sae.max_active},
    }
    return {
        file: {key: value.detach().float().cpu().contiguous() for key, value in tensors.items() if value is not None}
        for file, tensors in known.items()
        if None not in tensors.values()
    }


def _read_feature_files(sae: SparseAutoencoder, folder: Path, device: torch.device | str) -> None:
    statistics: dict[str, Tensor] = {}
    for file, names in ((SPARSITY_FILE, ("sparsity",)), (ACTIVATIONS_FILE, ("mean_active", "max_active"))):
        if (folder / file).is_file():
            tensors = read_tensors(folder / file)
            check_tensors(folder / file, tensors, dict.fromkeys(names, (sae.config.d_sae,)))
            statistics |= {name: tensor.float().to(device) for name, tensor in tensors.items()}
    sae.log_frequency = statistics.get("sparsity")
    sae.mean_active, sae.max_active = statistics.get("mean_active"), statistics.get("max_active")


def log_frequency_of(frequency: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    """What sparsity.safetensors holds of the share of tokens each feature fires on."""
    return torch.log10(frequency.float() + 1e-10)


def _lens_config(sae: SparseAutoencoder) -> dict[str, Any]:
    config = sae.config
    training = dict(sae.metadata)
    others = training.pop(KEPT_METADATA, {})
    own = {"config": config.to_dict(), "training": training}
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
    metadata = {
        "sae_lens_version": _LENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": config.model,
        "hook_name": config.site,
        "site": config.site,
        "steps": None if config.steps is None else list(config.steps),
        "flux_ir": own,
    }
    lens["metadata"] = metadata | {name: value for name, value in others.items() if metadata.get(name) is None}
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
    """What has a value per feature in the file, by its name there; a single threshold of ours is written for each."""
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
        if tensor.ndim == 0 and sae.config.whitened:
            sae.register_buffer(name, stored.clone())
            continue
        if tensor.ndim == 0 and not torch.equal(stored, stored[:1].expand_as(stored)):
            raise FluxIRError(
                f"all features of a {sae.config.architecture} have one {name}: {folder / WEIGHTS_FILE} has several",
                hint="set its architecture to jumprelu, which has one for each",
            )
        tensor.copy_(stored if tensor.ndim else stored[0])


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
    stored = read_config(path, program="flux-ir or sae-lens")
    if not isinstance(stored.get("metadata", {}), dict):
        raise FluxIRError(f"{path} must be a JSON object: its metadata is none", hint="save the autoencoder again")
    return stored


def _check_own(path: Path, stored: Mapping[str, Any], config: SAEConfig) -> None:
    """Raises FluxIRError where sae-lens would read another config than we do, because one half of it was changed."""
    ours = _PLAIN | {"architecture": _LENS_NAMES[config.architecture]}
    if config.architecture == "topk":
        ours["k"] = config.k
    changed = [name for name, value in ours.items() if stored.get(name, value) != value]
    if changed:
        raise FluxIRError(
            f"{path} says two things: {', '.join(f'{name} {stored[name]!r} and {ours[name]!r}' for name in changed)} "
            "(under metadata.flux_ir.config)",
            hint="change both, or take metadata.flux_ir out of it to have it read as a folder of sae-lens",
        )


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
