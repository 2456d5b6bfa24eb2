"""Paths of weight files: those the user named, those that belong together, those that ship in the package."""

import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.headers import is_index, shards
from flux_ir.models.registry import ModelSpec

PACKAGE, CACHE, HUB = "the package", "the hub's cache", "the hub"
RECORDED = "the capture's metadata"
"""Where a path stands that was written down when a capture was made."""
COMPONENT_FOLDERS = ("transformer", "vae")
"""Where the diffusers layout keeps the weights of our two networks."""
_MODEL_FOLDERS = (*COMPONENT_FOLDERS, "diffusion_models", "unet", "checkpoints", "text_encoders", "clip")
"""Those, and where ComfyUI keeps networks: what belongs to them lies in folders beside."""

VARIANTS = ("", ".bf16", ".fp16")
"""What diffusers and transformers put into the names of weights that were saved in another precision."""


class NamedPath(NamedTuple):
    """A path that exists, and the flag or variable that named it."""

    path: Path
    origin: str


def named_path(argument: str | Path | None, flag: str, variables: tuple[str, ...]) -> NamedPath | None:
    """The argument, else the first variable that is set. Raises FluxIRError if that path does not exist."""
    named = [(str(argument), flag)] if argument is not None else []
    named += [(os.environ[variable], variable) for variable in variables if os.environ.get(variable)]
    if not named:
        return None
    text, origin = named[0]
    path = Path(text).expanduser()
    if not text or not path.exists():
        hint = f"correct {origin}, or leave it out to use the next source"
        if origin == RECORDED:
            hint = "put it back where it was, or name weights with --checkpoint and --ae_checkpoint"
        raise FluxIRError(f"{origin} must name a file or a folder that exists: got {text!r}", hint=hint)
    return NamedPath(path, origin)


def model_folder(path: Path) -> Path:
    """The folder whose files belong together: a file's own, or the one above `transformer/`, `vae/` and their like."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name in _MODEL_FOLDERS else folder


def weight_names(stem: str) -> tuple[str, ...]:
    """What weights that diffusers or transformers saved may be called: one file, or an index; the plain name first."""
    files = [(f"{stem}{v}.safetensors", f"{stem}.safetensors.index{v}.json") for v in VARIANTS]
    return tuple(name for pair in files for name in pair)


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files that the folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def shards_present(path: Path) -> bool:
    """Whether every file of an index is there; a file that is no index is whole by itself."""
    return not is_index(path) or all(shard.is_file() for shard in shards(path))


def repository(spec: ModelSpec) -> str:
    """The model's repository. Raises FluxIRError for a model that is not on the hub."""
    if spec.repo_id is None:
        raise FluxIRError(f"{spec.name} is neither in the package nor on the hub", hint="pass it with --checkpoint")
    return spec.repo_id


def verified(spec: ModelSpec, relative: str) -> Path:
    """A shipped file, its bytes held against the digest in the provenance (hashed once per process)."""
    assert spec.assets is not None
    path = spec.assets / relative
    if not path.is_file():
        raise FluxIRError(f"{spec.name} ships in the package, but {path} is missing", hint="install the package again")
    stat = path.stat()
    digest, shipped = _sha256(path, stat.st_size, stat.st_mtime_ns), spec.sha256.get(relative)
    if digest != shipped:
        raise FluxIRError(
            f"{path} is not the file that was shipped: its sha256 is {digest}, the provenance says {shipped}",
            hint="install the package again",
        )
    return path


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # size and time: a changed file is hashed again
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
