"""What made a collection, besides its settings: the content of the model's files, and versions."""

import hashlib
import platform
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from flux_ir.models.sources import ModelSource

_ENDS = 2**20  # bytes
_WEIGHTS = ("*.safetensors", "*.bin")


def weights_digest(source: ModelSource) -> str:
    """16 hex digits that stand for the content of the model's files, wherever they lie.

    From the name, the size, the first and the last MiB of each: reading 24 GB whole would take longer than many a job.
    """
    parts = [source.transformer, *([source.autoencoder] if source.autoencoder else [])]
    files = {entry.file for part in parts for entry in part.entries.values()}
    for encoder in source.text:
        files |= {file for pattern in _WEIGHTS for file in encoder.model_dir.glob(pattern)}
    ends = sorted((file.name, *_ends(file)) for file in files)
    return hashlib.sha256(repr(ends).encode()).hexdigest()[:16]


def _ends(file: Path) -> tuple[int, str]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_ENDS))
        opened.seek(max(0, size - _ENDS))
        digest.update(opened.read(_ENDS))
    return size, digest.hexdigest()


def versions(device: torch.device) -> dict[str, str]:
    """What else may decide about the last bit: programs and, for a GPU, its name."""
    found = {
        # Not from the installed package: a clone that is run in place has none.
        "flux_ir": import_module("flux_ir").__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
