"""Autoencoders from and for other programs, and the hub."""

from pathlib import Path
from typing import NamedTuple

from flux_ir.api.arguments import check_words
from flux_ir.api.progress import Note, Watch, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.formats import ExportFormat
from flux_ir.sae.files.formats import export as export_as
from flux_ir.sae.files.hub import from_pretrained, push_to_hub


class ExportedSAE(NamedTuple):
    """Where an autoencoder went: a folder, or the address of a commit on the hub."""

    config: SAEConfig
    where: str


def load_sae(name: str | Path, *, subfolder: str = "", progress: Watch = unwatched) -> SparseAutoencoder:
    """The autoencoder of a folder, or of a repository on the hub, whichever program saved it.

    `subfolder` is a folder inside either. `encode`, `decode` and `surgery` take activations as the model computes
    them; the weights ask for no gradient.

    Raises FluxIRError for a name that is neither, for files that are broken, and for an unknown architecture.
    """
    sae = from_pretrained(str(name), subfolder=subfolder, announce=lambda text: progress(Note(text)))
    return sae.requires_grad_(False)


def export_sae(
    sae: str | Path,
    *,
    output_dir: str | Path | None = None,
    format: ExportFormat = "sae_lens",  # noqa: A002 (the word of the flag)
    push_to: str | None = None,
    private: bool = False,
    progress: Watch = unwatched,
) -> ExportedSAE:
    """Write an autoencoder as another program reads it, or put its folder into a repository on the hub.

    `sae` is what `load_sae` takes. It goes to one place: the new folder `output_dir`, in `format`, or `push_to`, with
    a model card; `private` if the repository is made. Raises FluxIRError for what a user can mend.
    """
    check_words(export_sae, {"format": format})
    if (output_dir is None) == (push_to is None):
        raise FluxIRError(
            "an autoencoder is exported to one place: give --output_dir or --push_to",
            hint="export to a folder first, then push that folder",
        )
    if push_to is not None and format != "sae_lens":
        raise FluxIRError(
            f"--push_to puts our own files on the hub, which sae-lens reads: got --format {format}",
            hint="leave --format out",
        )
    loaded = load_sae(sae, progress=progress)
    if output_dir is not None:
        return ExportedSAE(loaded.config, str(export_as(loaded, format, Path(output_dir))))
    if push_to is None or not Path(sae).is_dir():
        raise FluxIRError(f"--push_to takes a local folder: got {sae}", hint="export it to a folder first")
    return ExportedSAE(loaded.config, push_to_hub(Path(sae), push_to, private=private))
