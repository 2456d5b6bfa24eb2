"""Whose folder is this? Reads any autoencoder's folder, and writes one for another program."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from flux_ir.errors import FluxIRError
from flux_ir.sae import files
from flux_ir.sae.interop import dictionary_learning, flow_matching, sparsify
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder

ForeignFormat = Literal["sparsify", "dictionary_learning"]
Format = Literal["sae_lens", "sparsify", "dictionary_learning", "flow_matching"]
FOREIGN_FORMATS: tuple[ForeignFormat, ...] = get_args(ForeignFormat)

_WEIGHTS: dict[Format, str] = {
    "sae_lens": files.WEIGHTS_FILE,
    "sparsify": sparsify.WEIGHTS_FILE,
    "dictionary_learning": dictionary_learning.WEIGHTS_FILE,
    "flow_matching": flow_matching.WEIGHTS_FILE,
}
_READERS: dict[Format, Callable[[Path], SparseAutoencoder]] = {
    "sae_lens": files.load_sae,
    "sparsify": sparsify.load_sparsify,
    "dictionary_learning": dictionary_learning.load_dictionary_learning,
    "flow_matching": flow_matching.load_flow_matching,
}
_WRITERS: dict[ForeignFormat, Callable[[SparseAutoencoder, Path], Path]] = {
    "sparsify": sparsify.save_sparsify,
    "dictionary_learning": dictionary_learning.save_dictionary_learning,
}


def format_of(folder: Path) -> Format:
    """The format of an autoencoder's folder, told by its weights. Raises FluxIRError if there are none it knows."""
    found = [name for name, file in _WEIGHTS.items() if (folder / file).is_file()]
    if not found:
        inside = [path.name for path in sorted(folder.iterdir())[:4]] if folder.is_dir() else "no such folder"
        raise FluxIRError(
            f"{folder} must hold an autoencoder, as one of {', '.join(_WEIGHTS.values())}: got {inside}",
            hint="name the folder that holds the weights, not the one above it",
        )
    return found[0]


def load_any(folder: Path | str) -> SparseAutoencoder:
    """The autoencoder of a folder, whichever program saved it: ours or sae-lens, sparsify, dictionary_learning, hub.

    Raises FluxIRError for folders that are incomplete, broken, or of an architecture there is not.
    """
    return _READERS[format_of(Path(folder))](Path(folder))


def save_as(sae: SparseAutoencoder, name: ForeignFormat, folder: Path) -> Path:
    """Write the autoencoder as another program reads it. Raises FluxIRError for architectures it does not have."""
    return _WRITERS[name](sae, folder)
