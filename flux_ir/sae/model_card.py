"""What a repository on the hub says of an autoencoder: where it looks, what it was trained on, how good it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_ir.sae.sparse_autoencoder import SparseAutoencoder

METRICS_FILE, PICTURE_FILE = "metrics.json", "density.png"
_TOLD = {
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
    facts |= {"features": config.d_sae, "k": config.k if "topk" in config.architecture else None}
    facts |= {"denoising steps": None if config.steps is None else ", ".join(map(str, config.steps))}
    known = {**sae.metadata, **_data(sae.metadata)}
    facts |= {name.replace("_", " "): value for name, value in known.items() if _is_plain(value) and name not in _TOLD}
    return {name: value for name, value in facts.items() if value is not None}


def _data(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What it was trained on, as the trainer keeps it; nothing of a local path but its last name."""
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
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    numbers, outliers = metrics["overall"], metrics.get("outliers") or {"tokens": 0}
    rows = {text: numbers[name] for name, text in _TOLD.items() if name in numbers}
    if outliers["tokens"]:
        longer = f"tokens more than {outliers['longer_than_medians']:g} times as long as the median"
        rows |= {longer: outliers["tokens"], f"{_TOLD['fvu']} without them": outliers["without"]["overall"]["fvu"]}
    return _table("measure", "value", rows)


def _loading(repo_id: str) -> str:
    ours = f'from flux_ir.sae.hub import from_pretrained\n\nsae = from_pretrained("{repo_id}")'
    return f"```python\n{ours}\nfeatures = sae.encode(activations)\n```\n\nsae-lens reads the same files as they stand."


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {_shown(value)} |" for name, value in rows.items()])


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
