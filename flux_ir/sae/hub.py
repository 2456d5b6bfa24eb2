"""Autoencoders on the hub: fetched by the name of their repository, and put there with a card that says what they are.

The files are those of `files`, so sae-lens reads the same repository as it stands. huggingface_hub does the talking;
`HF_TOKEN`, `HF_ENDPOINT` and their kin are its own.
"""

from pathlib import Path

from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file
from flux_ir.models.hub import Announce, download_repository, upload_folder
from flux_ir.sae.files import ACTIVATIONS_FILE, CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE, load_sae
from flux_ir.sae.interop.formats import load_any
from flux_ir.sae.model_card import METRICS_FILE, PICTURE_FILE, model_card
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder

CARD_FILE = "README.md"
_FETCHED = ("*.json", "*.safetensors", "ae.pt")  # whichever program saved it
_PUT = (CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE, ACTIVATIONS_FILE, METRICS_FILE, PICTURE_FILE, CARD_FILE)


def from_pretrained(name: str, *, subfolder: str = "", announce: Announce | None = None) -> SparseAutoencoder:
    """The autoencoder of a local folder or of a repository on the hub, whichever program saved it.

    `subfolder` is a folder inside either. Raises FluxIRError for a name that is neither, or that cannot be fetched.
    """
    if Path(name).is_dir():
        return load_any(Path(name) / subfolder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FluxIRError(
            f"{name} must be a folder, or a repository on the hub such as someone/flux-sae: it is neither",
            hint="check the path",
        )
    patterns = tuple(f"{subfolder}/{pattern}" for pattern in _FETCHED) if subfolder else _FETCHED
    return load_any(download_repository(name, patterns, announce) / subfolder)


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Put the folder of a trained autoencoder into a repository, with a model card written from what is known of it.

    Returns the commit's address. Raises FluxIRError for a folder that is not complete, and as `upload_folder`.
    """
    write_card(folder, repo_id)
    return upload_folder(folder, repo_id, _PUT, private=private)


def write_card(folder: Path, repo_id: str) -> Path:
    """Write the model card into the folder: README.md, as the hub shows it. Raises FluxIRError as `load_sae`."""
    card = model_card(load_sae(folder), folder, repo_id)
    with complete_file(folder / CARD_FILE) as beside:
        beside.write_text(card, encoding="utf-8")
    return folder / CARD_FILE
