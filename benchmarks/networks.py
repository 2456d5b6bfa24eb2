"""Networks with random weights and inputs to time them with: what a block costs does not depend on what it learnt."""

from dataclasses import replace

import torch

from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.registry import get_spec
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.generate import Inputs, noise_for, prepare

FULL = get_spec("flux-schnell").flux
"""The published size, 12 billion weights. The others have its proportions."""
WIDE = replace(FULL, hidden_size=1024, num_heads=16, depth=4, depth_single_blocks=8, axes_dim=(8, 28, 28))
NARROW = replace(WIDE, hidden_size=384, num_heads=6)
TXT_TOKENS = 512
SIDE_PX = 256


def random_flux(params: FluxParams, device: str, dtype: torch.dtype) -> Flux:
    """A transformer with PyTorch's initial weights, made on the device and in its dtype: there is no second copy."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Flux(params).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_inputs(params: FluxParams, side_px: int, txt_tokens: int, device: str, dtype: torch.dtype) -> Inputs:
    """Noise and random text for one square picture."""
    draw = torch.Generator().manual_seed(1)
    txt = torch.randn(1, txt_tokens, params.context_in_dim, generator=draw)
    y = torch.randn(1, params.vec_in_dim, generator=draw)
    return prepare(noise_for([0], side_px, side_px, device, dtype), TextEmbedding(txt, y), side_px, side_px)
