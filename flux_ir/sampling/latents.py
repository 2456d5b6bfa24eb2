"""Noise, and the two shapes of a latent: a picture for the autoencoder, a row of tokens for the transformer."""

import math

import torch
from einops import rearrange, repeat

from flux_ir.shapes import Latent, PackedLatent, PositionIds

PATCH = 2  # latent pixels per token along each side
LATENT_CHANNELS = 16
LATENT_DOWNSCALE = 8  # pixels per latent pixel along each side
TOKEN_PX = PATCH * LATENT_DOWNSCALE


def latent_side(side_px: int) -> int:
    """Latent pixels along a side of `side_px` pixels: whole patches, rounded up."""
    return PATCH * math.ceil(side_px / TOKEN_PX)


def get_noise(
    num_samples: int, height: int, width: int, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Latent:
    """Standard normal latents for pictures of `height` x `width` pixels: the same seed gives the same bits everywhere.

    The numbers are the published sampler's, which draws in bf16 on the CPU. They are drawn in float32 here and rounded:
    the same bits, but with torch 2.8 too, whose own draw in bf16 gives other numbers.
    """
    shape = (num_samples, LATENT_CHANNELS, latent_side(height), latent_side(width))
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)


def pack(latent: Latent) -> PackedLatent:
    """Latent pixels gathered into one token per 2 x 2 patch."""
    # Channel first, then the place in the patch: the order of the weights of `img_in` and of the last layer.
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(packed: PackedLatent, height: int, width: int) -> Latent:
    """Tokens back to latent pixels, for a picture of `height` x `width` pixels."""
    rows = latent_side(height) // PATCH
    return rearrange(packed, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, ph=PATCH, pw=PATCH)


def image_ids(batch: int, height: int, width: int) -> PositionIds:
    """Positions of the image tokens, float32 [batch, tokens, 3]: 0, row, column."""
    rows, columns = latent_side(height) // PATCH, latent_side(width) // PATCH
    ids = torch.zeros(rows, columns, 3)  # the first axis tells reference pictures apart: it is 0 for text, too
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return repeat(ids, "h w axes -> b (h w) axes", b=batch)


def reference_ids(batch: int, height: int, width: int) -> PositionIds:
    """Positions of the tokens of a reference picture, float32 [batch, tokens, 3]: 1, row, column."""
    ids = image_ids(batch, height, width)
    ids[..., 0] = 1
    return ids


def text_ids(batch: int, txt_tokens: int) -> PositionIds:
    """Positions of the text tokens, float32 [batch, tokens, 3]: all zero, T5 has seen to their order."""
    return torch.zeros(batch, txt_tokens, 3)
