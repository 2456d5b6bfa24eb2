"""The two kinds of transformer block and the layers around them. Next: `transformer`, which strings them together.

A double block keeps text and image apart and lets them meet in attention; a single block treats `cat(txt, img)` as one
sequence and runs attention and feed-forward side by side.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_ir.models.flux1.attention import Attention, QKNorm, SelfAttention
from flux_ir.shapes import Conditioning, ImgTokens, PerSample, Rotation, Shift, Tokens, TxtTokens, Velocity

TIME_CHANNELS = 256


def timestep_embedding(t: PerSample, dim: int = TIME_CHANNELS, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of flow time t in [0, 1], or of guidance: [batch, dim] in the dtype of `t`, cosines first.

    The factor 1000 is applied in the dtype of `t`, so bf16 times are rounded (0.75 -> 752) exactly as the published
    models saw them in training. Guidance takes the same factor.
    """
    t = 1000.0 * t
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between: lifts time, guidance or pooled text to the width of the network."""

    def __init__(self, in_dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim, bias=bias)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Conditioning:
        return self.out_layer(self.silu(self.in_layer(x)))


class ModulationOut(NamedTuple):
    """What the conditioning does to one branch: `(1 + scale) * norm(x) + shift` before it, `gate * branch` after it."""

    shift: Shift
    scale: Shift
    gate: Shift


class Modulation(nn.Module):
    """Adaptive layer norm (Peebles & Xie, 2023): shift, scale and gate from the conditioning, once or twice."""

    def __init__(self, dim: int, *, double: bool, bias: bool = True) -> None:
        super().__init__()
        self.branches = 2 if double else 1
        self.lin = nn.Linear(dim, 3 * self.branches * dim, bias=bias)

    def forward(self, vec: Conditioning) -> list[ModulationOut]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.branches, dim=-1)
        return [ModulationOut(*parts[3 * i : 3 * i + 3]) for i in range(self.branches)]


def modulate(normed: Tokens, shift: Shift, scale: Shift) -> Tokens:
    """`(1 + scale) * normed + shift`."""
    return (1 + scale) * normed + shift


def feed_forward(dim: int, mlp_dim: int) -> nn.Sequential:
    """Linear, tanh-GELU, linear."""
    return nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))


def affine_free_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm without weights (eps 1e-6): scale and shift come from the conditioning."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class DoubleStreamBlock(nn.Module):
    """Image and text each keep their own weights and meet in one joint attention (text first). Returns `(img, txt)`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, *, qkv_bias: bool) -> None:
        super().__init__()
        mlp_dim = int(dim * mlp_ratio)
        self.img_mod = Modulation(dim, double=True)
        self.img_norm1 = affine_free_norm(dim)
        self.img_attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.img_norm2 = affine_free_norm(dim)
        self.img_mlp = feed_forward(dim, mlp_dim)

        self.txt_mod = Modulation(dim, double=True)
        self.txt_norm1 = affine_free_norm(dim)
        self.txt_attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.txt_norm2 = affine_free_norm(dim)
        self.txt_mlp = feed_forward(dim, mlp_dim)
        self.attention = Attention()

    def forward(
        self, img: ImgTokens, txt: TxtTokens, vec: Conditioning, rotation: Rotation
    ) -> tuple[ImgTokens, TxtTokens]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        img_qkv = self.img_attn.queries_keys_values(modulate(self.img_norm1(img), img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn.queries_keys_values(modulate(self.txt_norm1(txt), txt_mod1.shift, txt_mod1.scale))
        # Text first, as in the rotary table, in the single blocks and in the slices below.
        q, k, v = (torch.cat([of_txt, of_img], dim=2) for of_txt, of_img in zip(txt_qkv, img_qkv, strict=True))
        joint = self.attention(q, k, v, rotation)
        txt_joint, img_joint = joint[:, : txt.shape[1]], joint[:, txt.shape[1] :]

        img = img + img_mod1.gate * self.img_attn.proj(img_joint)
        img = img + img_mod2.gate * self.img_mlp(modulate(self.img_norm2(img), img_mod2.shift, img_mod2.scale))

        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_joint)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(self.txt_norm2(txt), txt_mod2.shift, txt_mod2.scale))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward in parallel on `cat(txt, img)` (Dehghani et al., 2023), two linears for both."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_dim, self.mlp_dim = 3 * dim, int(dim * mlp_ratio)
        self.linear1 = nn.Linear(dim, self.qkv_dim + self.mlp_dim)
        self.linear2 = nn.Linear(dim + self.mlp_dim, dim)
        self.norm = QKNorm(dim // num_heads)
        self.pre_norm = affine_free_norm(dim)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, double=False)
        self.attention = Attention()

    def forward(self, x: Tokens, vec: Conditioning, rotation: Rotation) -> Tokens:
        (mod,) = self.modulation(vec)
        out = self.linear2(self.branches(modulate(self.pre_norm(x), mod.shift, mod.scale), rotation))
        return x + mod.gate * out

    def branches(self, normed: Tokens, rotation: Rotation) -> Tensor:
        """Attention and feed-forward neurons side by side. What they were made of is freed before `linear2` runs."""
        neurons = self.neurons(normed)
        return torch.cat([self.attend(normed, rotation), neurons], dim=-1)

    def attend(self, normed: Tokens, rotation: Rotation) -> Tokens:
        """The attention branch: the first `3 * dim` rows of `linear1`, then all tokens look at each other."""
        weight, bias = self.linear1.weight[: self.qkv_dim], self.linear1.bias[: self.qkv_dim]
        qkv = F.linear(normed, weight, bias)
        q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.num_heads)
        q, k = self.norm(q, k, v)
        return self.attention(q, k, v, rotation)

    def neurons(self, normed: Tokens) -> Tensor:
        """The feed-forward neurons after their activation: the other rows of `linear1`.

        Two products instead of one: each result is one block of memory, and the activation finds its own in the cache.
        """
        weight, bias = self.linear1.weight[self.qkv_dim :], self.linear1.bias[self.qkv_dim :]
        return self.mlp_act(F.linear(normed, weight, bias))


class LastLayer(nn.Module):
    """Reads image tokens out as a velocity: adaptive norm, then one linear to the packed latent's channels."""

    def __init__(self, dim: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.norm_final = affine_free_norm(dim)
        self.linear = nn.Linear(dim, out_channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias=bias))

    def forward(self, img: ImgTokens, vec: Conditioning) -> Velocity:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(img), shift, scale))
