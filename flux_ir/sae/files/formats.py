"""Whose folder is this? Reads any autoencoder's folder, and writes one for another program."""

import filecmp
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files import dictionary_learning, flow_matching, sparsify
from flux_ir.sae.files import folder as native

ForeignFormat = Literal["sparsify", "dictionary_learning"]
Format = Literal["sae_lens", "sparsify", "dictionary_learning", "flow_matching"]
FOREIGN_FORMATS: tuple[ForeignFormat, ...] = get_args(ForeignFormat)

_WEIGHTS: dict[Format, str] = {
    "sae_lens": native.WEIGHTS_FILE,
    "sparsify": sparsify.WEIGHTS_FILE,
    "dictionary_learning": dictionary_learning.WEIGHTS_FILE,
    "flow_matching": flow_matching.WEIGHTS_FILE,
}
_READERS: dict[Format, Callable[[Path], SparseAutoencoder]] = {
    "sae_lens": native.load_sae,
    "sparsify": sparsify.load_sparsify,
    "dictionary_learning": dictionary_learning.load_dictionary_learning,
    "flow_matching": flow_matching.load_flow_matching,
}
ExportFormat = Literal["sae_lens", ForeignFormat]
_WRITERS: dict[ExportFormat, Callable[[SparseAutoencoder, Path], Path]] = {
    # other programs' decoders are kept as they are
    "sae_lens": lambda sae, folder: native.save_sae(sae, folder, unit_decoder=False),
    "sparsify": sparsify.save_sparsify,
    "dictionary_learning": dictionary_learning.save_dictionary_learning,
}


def format_of(folder: Path) -> Format:
    """The format of an autoencoder's folder, told by its weights.

    Raises FluxIRError if there are none it knows, or those of two autoencoders.
    """
    found = _formats_in(folder)
    if len(found) > 1:
        raise FluxIRError(
            f"{folder} must hold one autoencoder: it has {' and '.join(_WEIGHTS[name] for name in found)}",
            hint="put each of them into a folder of its own, with its config",
        )
    if not found:
        inside = [path.name for path in sorted(folder.iterdir())[:4]] if folder.is_dir() else "no such folder"
        raise FluxIRError(
            f"{folder} must hold an autoencoder, as one of {', '.join(_WEIGHTS.values())}: got {inside}",
            hint="name the folder that holds the weights, not the one above it",
        )
    return found[0]


def weights_file(folder: Path | str) -> Path:
    """The file of a folder that holds the weights, whichever program saved it. Raises FluxIRError as `format_of`."""
    return Path(folder) / _WEIGHTS[format_of(Path(folder))]


def load_any(folder: Path | str) -> SparseAutoencoder:
    """The autoencoder of a folder, whichever program saved it: ours or sae-lens, sparsify, dictionary_learning, hub.

    Raises FluxIRError for folders that are incomplete, broken, or of an architecture there is not.
    """
    return _READERS[format_of(Path(folder))](Path(folder))


def sae_folders(path: Path) -> list[Path]:
    """The folders of autoencoders at this path and below it, whichever programs saved them, in order of name."""
    weights = set(_WEIGHTS.values())
    return sorted({file.parent for file in path.rglob("*") if file.name in weights and file.is_file()})


def export(sae: SparseAutoencoder, name: ExportFormat, folder: Path) -> Path:
    """Write the autoencoder as a program reads it, into a folder where no other autoencoder is.

    A folder that holds exactly what would be written is left as it is. Raises FluxIRError for one that holds any other
    autoencoder, and for architectures the program does not have.
    """
    if not _taken(folder):
        return _WRITERS[name](sae, folder)
    with tempfile.TemporaryDirectory(prefix=".flux_ir_export_") as beside:
        # sparsify takes the name of the folder for the site
        written = _WRITERS[name](sae, Path(beside) / folder.name)
        if not _holds(folder, written):
            raise FluxIRError(
                f"{folder} holds an autoencoder already, and not what would be written there: "
                f"{', '.join(_taken(folder))}",
                hint="name a folder of its own with --output_dir, or delete that one",
            )
    return folder


def save_as(sae: SparseAutoencoder, name: ForeignFormat, folder: Path) -> Path:
    """Write the autoencoder as another program reads it, over what is there.

    Raises FluxIRError for architectures it does not have.
    """
    return _WRITERS[name](sae, folder)


def _formats_in(folder: Path) -> list[Format]:
    return [name for name, file in _WEIGHTS.items() if (folder / file).is_file()]


def _taken(folder: Path) -> list[str]:
    """The files of autoencoders in a folder: weights and configs."""
    names = {*_WEIGHTS.values(), native.CONFIG_FILE, dictionary_learning.CONFIG_FILE}
    return sorted(name for name in names if (folder / name).is_file())


def _holds(folder: Path, written: Path) -> bool:
    """Whether a folder has the written files, byte for byte, and no other autoencoder's."""
    return set(_taken(folder)) == set(_taken(written)) and all(
        (folder / file.name).is_file() and filecmp.cmp(file, folder / file.name, shallow=False)
        for file in written.iterdir()
    )
