"""First stage: the autoencoder learns to code pictures of scenes. Random crops suffice, because it is convolutional."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from flux_ir.demo.drawing import SIDE_PX, draw
from flux_ir.demo.scenes import scene_at, scenes
from flux_ir.models.autoencoder import AutoEncoder, AutoEncoderParams, kl_to_standard_normal
from flux_ir.models.compute_dtype import bfloat16_on
from recipes.flux_tiny.checkpoints import Checkpoint, step_generator

AE_PARAMS = AutoEncoderParams(
    resolution=SIDE_PX,
    in_channels=3,
    ch=32,
    out_ch=3,
    ch_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    z_channels=16,
    scale_factor=1.0,  # both are measured once the weights are final
    shift_factor=0.0,
    norm_groups=8,
)


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder is trained. The shipped one reached 36 dB in 1,800 steps; 2,500 gave 39 dB on two cores."""

    steps: int = 1_800
    batch: int = 32
    crop_px: int = 64
    learning_rate: float = 2e-3
    kl_weight: float = 3e-4
    clip_norm: float = 1.0
    seed: int = 0


def to_network(pixels: np.ndarray) -> Tensor:
    """uint8 [batch, h, w, 3] to float32 [batch, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def crops(config: AutoencoderConfig, step: int) -> Tensor:
    """The batch of optimiser step `step`: one random crop of each of `batch` fresh scenes."""
    rng = np.random.default_rng((config.seed, step))
    pictures = (draw(scene_at(config.seed, step * config.batch + i)) for i in range(config.batch))
    corners = rng.integers(0, SIDE_PX - config.crop_px + 1, size=(config.batch, 2))
    cut = [p[y : y + config.crop_px, x : x + config.crop_px] for p, (y, x) in zip(pictures, corners, strict=True)]
    return to_network(np.stack(cut))


def train_autoencoder(config: AutoencoderConfig, checkpoint: Checkpoint, device: str) -> Iterator[dict[str, float]]:
    """Yields the numbers of every optimiser step; the checkpoint holds the network. Goes on where it stopped."""
    torch.manual_seed(config.seed)
    model = AutoEncoder(AE_PARAMS).to(device).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps)
    for step in checkpoint.steps(config.steps, model=model, optimiser=optimiser, schedule=schedule):
        x = crops(config, step).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_on(device).real):
            mean, log_variance = model.moments(x)
            mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=step_generator(config.seed, step)).to(device)
            restored = model.decoder(mean + (0.5 * log_variance).exp() * noise).float()
        error = restored - x
        loss = error.abs().mean() + error.square().mean() + config.kl_weight * kl_to_standard_normal(mean, log_variance)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimiser.step()
        schedule.step()
        yield {"step": step, "loss": loss.item(), "psnr_db": psnr_db(error.square().mean().item())}


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio [dB] of pictures in [-1, 1]."""
    return float(10 * np.log10(4 / max(mean_squared_error, 1e-12)))


@torch.no_grad()
def measure_latents(model: AutoEncoder, seed: int, count: int = 512) -> AutoEncoderParams:
    """The model's params with the shift and scale that give latents of `count` scenes mean 0 and variance 1."""
    means = torch.cat([model.moments(batch)[0] for batch in picture_batches(seed, count)])
    return replace(model.params, shift_factor=means.mean().item(), scale_factor=1 / means.std().item())


@torch.no_grad()
def held_out_psnr_db(model: AutoEncoder, seed: int, count: int = 128) -> float:
    """Mean PSNR [dB] over whole held-out scenes, decoded from the mean latent."""
    held_out = islice(scenes(seed, "held_out"), count)
    errors = []
    for scene in held_out:
        x = to_network(draw(scene)[None])
        errors.append((model(x).clamp(-1, 1) - x).square().mean().item())
    return float(np.mean([psnr_db(e) for e in errors]))


def picture_batches(seed: int, count: int, batch: int = 64) -> Iterator[Tensor]:
    """Pictures of the first `count` training scenes of `seed`, in order, in [-1, 1]."""
    stream = islice(scenes(seed, "train"), count)
    while group := list(islice(stream, batch)):
        yield to_network(np.stack([draw(scene) for scene in group]))
