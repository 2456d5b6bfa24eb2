"""Where a model's files are. First what the user names, then what is on disk, and only then the hub.

The order: arguments (`--checkpoint`, `--ae_checkpoint`), environment variables, the package, the hub's cache, the hub. A
path that is named but missing is an error, never a download. What is found is checked (`contents`); `weights` loads it.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models import hub
from flux_ir.models.contents import Part, WeightSource, inspect
from flux_ir.models.headers import INDEX_SUFFIX, shards
from flux_ir.models.hub import Announce
from flux_ir.models.registry import ModelSpec

_SUBFOLDERS: dict[Part, str] = {"transformer": "transformer", "autoencoder": "vae"}
_DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", f"diffusion_pytorch_model{INDEX_SUFFIX}")

class ModelSource(NamedTuple):
    """Everything a model needs, found and checked."""

    transformer: WeightSource
    autoencoder: WeightSource
    text: TextSource


def locate_model(
    spec: ModelSpec,
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    *,
    announce: Announce | None = None,
) -> ModelSource:
    """All parts of the model. Everything on disk is found and checked first, so a mistake shows before any download."""
    transformer = _transformer_on_disk(spec, checkpoint)
    autoencoder = _autoencoder_on_disk(spec, ae_checkpoint, checkpoint)
    t5, clip = encoder_on_disk(spec, "t5", checkpoint), encoder_on_disk(spec, "clip", checkpoint)
    return ModelSource(
        # Small files first: they tell whether the hub gives access at all.
        autoencoder=autoencoder or _download(spec, "autoencoder", announce),
        text=TextSource(
            clip=clip or download_encoder(spec, "clip", announce), t5=t5 or download_encoder(spec, "t5", announce)
        ),
        transformer=transformer or _download(spec, "transformer", announce),
    )


def locate_transformer(
    spec: ModelSpec, checkpoint: str | Path | None = None, *, announce: Announce | None = None
) -> WeightSource:
    """The transformer's weights. `checkpoint` is a file, or a folder in the diffusers or the published layout."""
    return _transformer_on_disk(spec, checkpoint) or _download(spec, "transformer", announce)


def locate_autoencoder(
    spec: ModelSpec,
    ae_checkpoint: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    announce: Announce | None = None,
) -> WeightSource:
    """The autoencoder's weights. Without `ae_checkpoint`, those that lie in the folder of `checkpoint` are taken."""
    return _autoencoder_on_disk(spec, ae_checkpoint, checkpoint) or _download(spec, "autoencoder", announce)


def _transformer_on_disk(spec: ModelSpec, checkpoint: str | Path | None) -> WeightSource | None:
    given = given(checkpoint, "--checkpoint", spec.transformer_env)
    if given is not None:
        return inspect(spec, "transformer", _weight_file(spec, "transformer", given), given.origin)
    return _shipped(spec, "transformer") or _cached(spec, "transformer")


def _autoencoder_on_disk(
    spec: ModelSpec, ae_checkpoint: str | Path | None, checkpoint: str | Path | None
) -> WeightSource | None:
    given = given(ae_checkpoint, "--ae_checkpoint", spec.autoencoder_env)
    if given is not None:
        return inspect(spec, "autoencoder", _weight_file(spec, "autoencoder", given), given.origin)
    given = given(checkpoint, "--checkpoint", spec.transformer_env)
    if given is not None and (beside := _inmodel_folder(spec, "autoencoder", model_folder(given.path))):
        return inspect(spec, "autoencoder", beside, given.origin)
    return _shipped(spec, "autoencoder") or _cached(spec, "autoencoder")


# What the user named


def _weight_file(spec: ModelSpec, part: Part, given: Given) -> Path:
    """The file (or index of shards) a path stands for: itself, or what lies in the folder."""
    if given.path.is_file():
        return given.path
    found = _inmodel_folder(spec, part, given.path) or first_file(given.path, _DIFFUSERS_FILES)
    if found is not None:
        return found
    indexes = sorted(given.path.glob(f"*{INDEX_SUFFIX}"))
    candidates = indexes or sorted(given.path.glob("*.safetensors"))
    if len(candidates) == 1:
        return candidates[0]
    problem = f"has {len(candidates)} safetensors files and no index" if candidates else "has none"
    raise FluxIRError(
        f"{given.origin} must lead to the {part} of {spec.name}: the folder {given.path} {problem}",
        hint=f"name the file itself, or a folder with {_file_name(spec, part)} or {_SUBFOLDERS[part]}/",
    )


def _inmodel_folder(spec: ModelSpec, part: Part, folder: Path) -> Path | None:
    in_subfolder = (f"{_SUBFOLDERS[part]}/{name}" for name in _DIFFUSERS_FILES)
    return first_file(folder, (_file_name(spec, part), *in_subfolder))


# What ships in the package


def _shipped(spec: ModelSpec, part: Part) -> WeightSource | None:
    if spec.assets is None:
        return None
    return inspect(spec, part, verified(spec, _file_name(spec, part)), PACKAGE)


# The hub's cache, and the hub


def _cached(spec: ModelSpec, part: Part) -> WeightSource | None:
    """The published single file, or the diffusers layout if all its shards are there."""
    if spec.repo_id is None:
        return None
    for name in (_file_name(spec, part), *(f"{_SUBFOLDERS[part]}/{name}" for name in _DIFFUSERS_FILES)):
        path = hub.cached(spec.repo_id, name)
        if path is not None and shards_present(path):
            return inspect(spec, part, path, CACHE)
    return None


def _download(spec: ModelSpec, part: Part, announce: Announce | None) -> WeightSource:
    path = hub.download(hub.repository(spec), _file_name(spec, part), announce)
    return inspect(spec, part, path, HUB)


# Files of one part


def _file_name(spec: ModelSpec, part: Part) -> str:
    return spec.transformer_file if part == "transformer" else spec.autoencoder_file


