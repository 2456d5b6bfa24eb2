"""Third stage: the transformer learns the velocity from noise to latents of scenes, the text encoders learning along.

Rectified flow (Liu et al., 2022): x_t = (1 - t) x0 + t eps, and the network predicts v = eps - x0. Hidden matrices are
trained with Muon (Jordan et al., 2024), everything else with AdamW; a moving average of the weights is what ships.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flux_ir.demo.scenes import scenes
from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.compute_dtype import bfloat16_on
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.text import TextEncoder
from flux_ir.sae.training.step import WeightAverage
from flux_ir.sampling.latents import image_ids, pack, text_ids
from recipes.flux_tiny.autoencoder import picture_batches
from recipes.flux_tiny.checkpoints import Checkpoint, step_generator
from recipes.flux_tiny.text import TEXT_DIM, Describer

FLUX_PARAMS = FluxParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=TEXT_DIM,
    context_in_dim=TEXT_DIM,
    hidden_size=192,
    mlp_ratio=4.0,
    num_heads=6,
    depth=4,
    depth_single_blocks=8,
    axes_dim=(8, 12, 12),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=False,
)


@dataclass(frozen=True)
class FlowConfig:
    """How the flow model is trained: warm-up, constant rate, linear decay. More `steps` later simply go on."""

    steps: int = 2_400
    batch: int = 64
    bank_scenes: int = 24_000
    learning_rate: float = 2e-3
    text_rate_factor: float = 0.25  # the encoders arrive pre-trained
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_steps: int = 1_000
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    seed: int = 0
    compile: bool = True
    """Compile the transformer: more steps per second, after a minute or two of compiling."""


class Bank(NamedTuple):
    """Training scenes ready for the flow: packed latents [scenes, img, packed] in bf16, and their captions."""

    latents: Tensor
    captions: list[str]


class TextToVelocity(nn.Module):
    """The flow model with its text encoders: everything the flow loss trains."""

    def __init__(self, flux: Flux, t5: TextEncoder, clip: TextEncoder) -> None:
        super().__init__()
        self.flux, self.t5, self.clip = flux, t5, clip


@torch.no_grad()
def encode_bank(autoencoder: AutoEncoder, config: FlowConfig, device: str) -> Tensor:
    """Packed latents, bf16 [scenes, img, packed], of the first `bank_scenes` training scenes."""
    latents = []
    for pictures in picture_batches(config.seed, config.bank_scenes):
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_on(device).real):
            latents.append(pack(autoencoder.encode(pictures.to(device))).to("cpu", torch.bfloat16))
    return torch.cat(latents)


def bank_captions(config: FlowConfig) -> list[str]:
    """The captions of the same scenes, in the same order."""
    return [scene.caption for scene in islice(scenes(config.seed, "train"), config.bank_scenes)]


def initialise(flux: Flux) -> None:
    """Xavier for matrices, zero for biases, modulations and the last layer: every block starts as the identity."""
    for module in flux.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, module in flux.named_modules():
        if isinstance(module, nn.Linear) and (
            name.startswith("final_layer") or name.endswith(("mod.lin", "modulation.lin"))
        ):
            nn.init.zeros_(module.weight)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Flow times in (0, 1): half of them uniform, half logit-normal, which dwells where shapes are decided."""
    uniform = torch.rand(count, generator=generator)
    dwelling = torch.randn(count, generator=generator).sigmoid()
    return torch.where(torch.arange(count) % 2 == 0, uniform, dwelling)


def learning_rate_factor(config: FlowConfig, step: int) -> float:
    """Warm-up, plateau, linear decay, as a factor of the learning rate."""
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / config.decay_steps)


def build_optimisers(model: TextToVelocity, config: FlowConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest; the text encoders learn at a lower rate."""
    if not hasattr(torch.optim, "Muon"):
        raise FluxIRError(
            f"training flux-tiny needs the Muon optimiser of PyTorch 2.9: this is {torch.__version__}",
            hint="sampling and everything else work without; to train, upgrade torch",
        )
    hidden = [
        p for n, p in model.flux.named_parameters() if p.ndim == 2 and "_blocks." in n and not n.endswith("lin.weight")
    ]
    in_muon = {id(p) for p in hidden}
    rest = [p for p in model.flux.parameters() if id(p) not in in_muon]
    text = [*model.t5.parameters(), *model.clip.parameters()]
    rate = config.learning_rate
    muon = torch.optim.Muon(hidden, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": rest, "lr": rate}, {"params": text, "lr": rate * config.text_rate_factor}],
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
    )
    for optimiser in (muon, adamw):
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def start_model(describer: Describer, config: FlowConfig, params: FluxParams = FLUX_PARAMS) -> TextToVelocity:
    """An untrained transformer with the pre-trained text encoders."""
    torch.manual_seed(config.seed)
    flux = Flux(params)
    initialise(flux)
    return TextToVelocity(flux, describer.t5, describer.clip)


def train_flow(
    model: TextToVelocity, bank: Bank, side_px: int, config: FlowConfig, checkpoint: Checkpoint, device: str
) -> Iterator[dict[str, float]]:
    """Yields the loss of every optimiser step; the checkpoint holds the model and its moving average (`ema`)."""
    model = model.to(device).train()
    ema = WeightAverage(dict(model.named_parameters()), config.ema_decay)
    muon, adamw = build_optimisers(model, config)
    velocity = torch.compile(model.flux) if config.compile else model.flux
    img_ids = image_ids(config.batch, side_px, side_px).to(device)
    txt_ids = text_ids(config.batch, model.t5.max_tokens).to(device)
    for step in checkpoint.steps(config.steps, model=model, ema=ema, muon=muon, adamw=adamw):
        generator = step_generator(config.seed, step)
        rows = torch.randint(len(bank.captions), (config.batch,), generator=generator)
        t = draw_times(config.batch, generator)
        x0 = bank.latents[rows].float()
        eps = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, eps, t[:, None, None]).to(device)
        captions = [bank.captions[row] for row in rows.tolist()]
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_on(device).real):
            v = velocity(x_t, img_ids, model.t5(captions), txt_ids, t.to(device), model.clip(captions))
        loss = (v.float() - (eps - x0).to(device)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for optimiser in (muon, adamw):
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(config, step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        ema.update(step)
        yield {"step": step, "loss": loss.item()}
