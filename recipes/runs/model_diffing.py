"""Model diffing on flux-tiny: its quantised self, a LoRA of random weights, and two states of a training.

uv run python -m recipes.runs.model_diffing --folder model_diffing

Makes what is compared, then compares, each pair on the same 4 held-out captions, one noise each, 8 steps; the numbers
are means over captions, blocks and steps, of image tokens. The LoRA changes one block alone, so that the right answer
is known. The training goes on from the shipped weights with the text encoders as they are; its states are 20 and 100
optimiser steps later.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import flux_ir
from flux_ir.demo.scenes import held_out_scenes, scenes
from flux_ir.files import complete_file
from flux_ir.models.suite import Suite
from flux_ir.sampling.latents import image_ids, pack, text_ids
from recipes.flux_tiny.autoencoder import picture_batches
from recipes.flux_tiny.flow import draw_times

CAPTIONS, CAPTION_SEED = 4, 11
LORA_BLOCK, RANK = "single_blocks.3", 4
STATES, BATCH, RATE = (20, 100), 16, 1e-4


def random_lora(model: Suite, path: Path) -> None:
    """A LoRA of rank 4 on the linear layers of one block, a tenth as large as their weights."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.flux.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{LORA_BLOCK}.linear"):
            rows, columns = module.weight.shape
            down, up = torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)
            up *= 0.1 * module.weight.float().norm() / (up @ down).norm()
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with complete_file(path) as beside:
        save_file(tensors, beside)


def train_on(model: Suite, folder: Path) -> None:
    """The shipped transformer trained on: the flow loss of the recipe on fresh scenes, AdamW, one state per file."""
    flux = deepcopy(model.flux).float().train().requires_grad_(requires_grad=True)
    count = BATCH * STATES[-1]
    captions = [scene.caption for scene, _ in zip(scenes(CAPTION_SEED, "train"), range(count), strict=False)]
    with model.autoencoder() as autoencoder:
        pictures = picture_batches(CAPTION_SEED, count)
        with torch.no_grad():
            latents = torch.cat([pack(autoencoder.encode(batch)).float() for batch in pictures])
    optimiser = torch.optim.AdamW(flux.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    side = model.spec.default_side_px
    img_ids, txt_ids = image_ids(BATCH, side, side), text_ids(BATCH, model.spec.text_tokens)
    with model.text_encoders() as encoders:
        for step in range(STATES[-1]):
            draw, rows = torch.Generator().manual_seed(step), slice(step * BATCH, (step + 1) * BATCH)
            t, x0 = draw_times(BATCH, draw), latents[rows]
            eps = torch.randn(x0.shape, generator=draw)
            with torch.no_grad():
                txt, y = encoders.t5(captions[rows]).float(), encoders.clip(captions[rows]).float()
            v = flux(torch.lerp(x0, eps, t[:, None, None]), img_ids, txt, txt_ids, t, y)
            loss = (v - (eps - x0)).square().mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(flux.parameters(), 1.0)
            optimiser.step()
            if step + 1 in STATES:
                print(f"training step {step + 1}: loss {loss.item():.4f}", flush=True)
                with complete_file(folder / f"state_{step + 1}.safetensors") as beside:
                    weights = flux.state_dict().items()
                    save_file({name: value.bfloat16().contiguous() for name, value in weights}, beside)


def mean(values: dict[str, list[float | None]], rows: list[str]) -> float:
    """Over rows and steps."""
    return float(np.mean([value for row in rows for value in values[row] if value is not None]))


def main() -> None:
    """Make, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("model_diffing"), help="everything goes here")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    prompts, lora = folder / "captions.txt", folder / "random_lora.safetensors"
    prompts.write_text("".join(f"{scene.caption}\n" for scene in held_out_scenes(CAPTIONS, CAPTION_SEED)))
    states = [folder / f"state_{step}.safetensors" for step in STATES]
    base = flux_ir.load_model("flux-tiny", dtype="float32")
    if not lora.exists():
        random_lora(base, lora)
    if not all(state.exists() for state in states):
        train_on(base, folder)
    pairs = {
        "nf4": {"other_quantize": "nf4"},
        "int8": {"other_quantize": "int8"},
        "fp8": {"other_quantize": "fp8"},
        "random_lora": {"other_lora": lora},
        "trained_20": {"other_checkpoint": states[0]},
        "trained_100": {"other_checkpoint": states[1]},
    }
    titles = ("block", "forced", "free", "seed", "CKA free", "CKA seed", "PSNR", "PSNR seed")
    print(f"{'mean over blocks and steps':28}" + "".join(f"{title:>10}" for title in titles))
    for name, difference in pairs.items():
        found = flux_ir.compare_models(
            prompts=prompts, model="flux-tiny", dtype="float32", name=name, output_dir=folder, **difference
        )
        blocks = [row for row in found.mean("free") if "." in row]
        distances = [mean(found.mean(run), blocks) for run in ("block", "forced", "free", "seed")]
        ckas = [mean(found.mean(run, "cka"), blocks) for run in ("free", "seed")]
        psnrs = [found.result["pictures"][run]["psnr_db"] for run in ("free", "seed")]
        numbers = [f"{value:10.4f}" for value in (*distances, *ckas)] + [f"{value:10.1f}" for value in psnrs]
        print(f"{name:28}" + "".join(numbers), flush=True)


if __name__ == "__main__":
    main()
