"""The finished model as files: bf16 safetensors, folders for the text encoders, and where they came from."""

import hashlib
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from flux_ir.files import complete_file, write_json
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.encoder_configs import CONFIG_FILE
from flux_ir.models.text import TextEncoder
from flux_ir.models.text.t5 import T5Encoder
from flux_ir.models.text.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE
from recipes.flux_tiny.autoencoder import held_out_psnr_db
from recipes.flux_tiny.flow import TextToVelocity

DEFAULT_STEPS = 8
PROVENANCE = "provenance.json"


def export(
    autoencoder: AutoEncoder, model: TextToVelocity, run_dir: Path, folder: Path, *, psnr_scenes: int = 128
) -> None:
    """Write the model's folder. `params.json` says what it is, `provenance.json` where it came from and its hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_bf16(model.flux, folder / "transformer.safetensors")
    save_bf16(autoencoder, folder / "ae.safetensors")
    save_text_encoder(model.t5, folder / "t5")
    save_text_encoder(model.clip, folder / "clip")
    params = {
        "flux": asdict(model.flux.params),
        "autoencoder": asdict(autoencoder.params),
        "text_tokens": model.t5.max_tokens,
        "default_steps": DEFAULT_STEPS,
    }
    write_json(folder / "params.json", params)
    psnr_db = held_out_psnr_db(autoencoder.float(), seed=0, count=psnr_scenes)
    write_json(folder / PROVENANCE, provenance(run_dir, folder, psnr_db))


def save_bf16(model: nn.Module, path: Path) -> None:
    """The weights in bf16, and in `model` too, so that what is measured next is what was saved."""
    model.to("cpu", torch.bfloat16)
    with complete_file(path) as beside:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, beside)


def save_text_encoder(encoder: TextEncoder, folder: Path) -> None:
    """A folder that transformers reads too: configuration, bf16 weights, tokenizer."""
    folder.mkdir(exist_ok=True)  # a model that is trained again takes the place of the one that is there
    save_bf16(encoder.model, folder / "model.safetensors")
    kind = {"model_type": "t5" if isinstance(encoder.model, T5Encoder) else "clip_text_model", "dtype": "bfloat16"}
    tokenizer = encoder.tokenizer
    special = {"pad_token": tokenizer.padding, "eos_token": tokenizer.end, "unk_token": tokenizer.unknown}
    numbers = {"pad_token_id": tokenizer.padding_id, "eos_token_id": tokenizer.end_id}
    write_json(folder / CONFIG_FILE, {**kind, **asdict(encoder.model.params), **numbers})
    tokenizer.backend.save(str(folder / TOKENIZER_FILE))
    kind_of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": encoder.max_tokens}
    write_json(folder / TOKENIZER_CONFIG, {**kind_of_tokenizer, **special})


def provenance(run_dir: Path, folder: Path, psnr_db: float) -> dict[str, object]:
    """Where the files came from, what was measured at export, and the sha256 of each."""
    state = {
        stage: torch.load(run_dir / f"{stage}.pt", weights_only=True, mmap=True)
        for stage in ("autoencoder", "text", "flow")
    }
    return {
        "command": "python -m recipes.flux_tiny.train",
        "flux_ir": version("flux-ir"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": commit(),
        "seed": 0,
        "steps": {stage: saved["done"] for stage, saved in state.items()},
        "autoencoder_held_out_psnr_db": round(psnr_db, 2),
        "files": {str(path.relative_to(folder)): sha256(path) for path in shipped_files(folder)},
    }


def shipped_files(folder: Path) -> list[Path]:
    """Every file of the folder but the provenance itself, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str | None:
    """The commit the training code stood at, or None outside a git checkout."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return asked.stdout.strip() or None if asked.returncode == 0 else None
