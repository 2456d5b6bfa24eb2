"""Small models of every family, and the places their files may be in, laid out as the hub lays them out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from flux_ir.models.registry import MODELS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def tiny_spec(tiny_flux_params, tiny_autoencoder):
    """Makes the spec of a small published model: of the dev family with guidance, else schnell's."""

    def make(*, guidance=False):
        spec = MODELS["flux-dev" if guidance else "flux-schnell"]
        flux = replace(tiny_flux_params, guidance_embed=guidance)
        return replace(spec, flux=flux, autoencoder=tiny_autoencoder().params)

    return make


@pytest.fixture
def save():
    """Writes a network or a state dict as one safetensors file, folders included. Returns the path."""

    def write(weights, path: Path, *, prefix="") -> Path:
        state = weights if isinstance(weights, Mapping) else weights.state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
        return path

    return write


@pytest.fixture
def save_sharded(save):
    """Writes a state dict as two shards and an index, named as the hub names them. Returns the index."""

    def write(state, folder: Path, stem: str) -> Path:
        names = list(state)
        files = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, held in files.items():
            save({name: state[name] for name in held}, folder / file)
        index = folder / f"{stem}.safetensors.index.json"
        weight_map = {name: file for file, held in files.items() for name in held}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    return write


@pytest.fixture
def save_text():
    """Writes what a text encoder's folders must have, empty. Returns the model's folder."""

    def write(model_dir: Path, tokenizer_dir: Path) -> Path:
        for folder, names in ((model_dir, TEXT_FILES[:2]), (tokenizer_dir, TEXT_FILES[2:])):
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / name).write_text("{}")
        return model_dir

    return write


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Moves a folder into an empty cache of the hub's layout: blobs, refs, and a snapshot of links. No network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def keep(repo_id: str, folder: Path) -> Path:
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        for part in (repository / "blobs", repository / "refs", snapshot):
            part.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            link.symlink_to(blob)
        return snapshot

    return keep


@pytest.fixture(autouse=True)
def no_named_files(monkeypatch):
    """Nothing the user of this machine has set leads anywhere."""
    for spec in MODELS.values():
        for variable in (*spec.transformer_env, *spec.autoencoder_env, "FLUX_TINY", "FLUX_T5", "FLUX_CLIP"):
            monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def packaged_folder(tmp_path, tiny_flux, tiny_autoencoder, save, save_text, text_folders):
    """The folder of a packaged model, as the export of `demo` writes it."""
    folder = tmp_path / "assets" / "flux-tiny"
    flux, autoencoder = tiny_flux(dtype=torch.bfloat16), tiny_autoencoder(dtype=torch.bfloat16)
    save(flux, folder / "transformer.safetensors")
    save(autoencoder, folder / "ae.safetensors")
    for encoder in ("t5", "clip"):
        save_text(folder / encoder, folder / encoder)
        (folder / encoder / "config.json").write_bytes((getattr(text_folders, encoder) / "config.json").read_bytes())
    params = {"flux": asdict(flux.params), "autoencoder": asdict(autoencoder.params)}
    (folder / "params.json").write_text(json.dumps(params | {"text_tokens": 20, "default_steps": 8}))
    files = [path for path in folder.rglob("*") if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "provenance.json").write_text(json.dumps({"files": digests}))
    return folder
