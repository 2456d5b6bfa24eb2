"""Autoencoders on the hub: fetched by the name of their repository, and put there with a card that says what they are.

The files are those of `files`, so sae-lens reads the same repository as it stands. huggingface_hub sends the
requests, and `HF_TOKEN`, `HF_ENDPOINT` and the like are its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, read_json
from flux_ir.models.checkpoints.hub import Announce, download_repository, upload_folder
from flux_ir.sae.architectures.config import HAS_K
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.folder import ACTIVATIONS_FILE, CONFIG_FILE, SPARSITY_FILE, WEIGHTS_FILE, load_sae
from flux_ir.sae.files.formats import load_any

CARD_FILE, METRICS_FILE, PICTURE_FILE = "README.md", "metrics.json", "density.png"
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


# ---- The model card
_MEASURES = {
    "fvu": "fraction of variance unexplained",
    "l0": "features active per token",
    "dead_share": "share of features that never fire",
    "cosine": "cosine to the activation",
    "tokens": "held-out tokens",
}


def model_card(sae: SparseAutoencoder, folder: Path, repo_id: str) -> str:
    """The card in Markdown: facts from the autoencoder, numbers and picture from its folder where they are there."""
    config = sae.config
    where = config.site or "a plain array of activations"
    parts = [
        _header(config.architecture),
        f"# {repo_id.split('/')[-1]}",
        f"A sparse autoencoder ({config.architecture}) of {where}" + (f" in {config.model}." if config.model else "."),
        _table("what", "value", _facts(sae)),
        "## Held-out quality",
        _quality(folder),
    ]
    if (folder / PICTURE_FILE).is_file():
        parts.append(f"![How often features fire]({PICTURE_FILE})")
    parts += ["## How to load it", _loading(repo_id)]
    return "\n\n".join(parts) + "\n"


def _header(architecture: str) -> str:
    tags = ["sparse-autoencoder", "interpretability", "flux-ir", "saelens", architecture]
    return "\n".join(["---", "library_name: flux-ir", "tags:", *(f"- {tag}" for tag in tags), "---"])


def _facts(sae: SparseAutoencoder) -> dict[str, Any]:
    config = sae.config
    facts: dict[str, Any] = {"model": config.model, "site": config.site, "width of the activations": config.d_in}
    facts |= {"features": config.d_sae, "k": config.k if config.architecture in HAS_K else None}
    facts |= {"denoising steps": None if config.steps is None else ", ".join(map(str, config.steps))}
    known = {**sae.metadata, **_data(sae.metadata)}
    others = {name: value for name, value in known.items() if _is_plain(value) and name not in _MEASURES}
    facts |= {name.replace("_", " "): value for name, value in others.items()}
    return {name: value for name, value in facts.items() if value is not None}


def _data(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What it was trained on, as its metadata have it; of a local path only the last name."""
    data = metadata.get("data")
    if not isinstance(data, Mapping):
        return {}
    captures = {"captures": Path(data["captures"]).name} if isinstance(data.get("captures"), str) else {}
    return {**data, **captures}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _quality(folder: Path) -> str:
    if not (folder / METRICS_FILE).is_file():
        return "Not measured."
    metrics = read_json(folder / METRICS_FILE, required=("overall",))
    numbers, outliers = metrics["overall"], metrics.get("outliers") or {"tokens": 0}
    rows = {text: numbers[name] for name, text in _MEASURES.items() if name in numbers}
    if outliers["tokens"]:
        longer = f"tokens more than {outliers['longer_than_medians']:g} times as long as the median"
        rows |= {longer: outliers["tokens"], f"{_MEASURES['fvu']} without them": outliers["without"]["overall"]["fvu"]}
    return _table("measure", "value", rows)


def _loading(repo_id: str) -> str:
    # The public name: cards outlive the places of modules.
    ours = f'from flux_ir import load_sae\n\nsae = load_sae("{repo_id}")'
    return f"```python\n{ours}\nfeatures = sae.encode(activations)\n```\n\nsae-lens reads the same files as they stand."


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {_shown(value)} |" for name, value in rows.items()])


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
