"""FLUX.2's two kinds of transformer block. Next: `transformer`, which strings them together.

As in FLUX.1 a double block keeps text and image apart and lets them meet in attention, and a single block treats
`cat(txt, img)` as one sequence. What is new: no linear has a bias, the feed-forward is a SwiGLU, and a block has no
modulation layers of its own: the network has three for all of its blocks, and each block is handed what they put out.
Attention, norms and the modulation layer are FLUX.1's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_ir.models.flux1.attention import Attention, QKNorm, SelfAttention
from flux_ir.models.flux1.blocks import ModulationOut, affine_free_norm, modulate
from flux_ir.shapes import ImgTokens, Rotation, Tokens, TxtTokens


class SwiGLU(nn.Module):
    """silu(first half) x second half of the channels (Shazeer, 2020): the neurons are half as many as the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def feed_forward(dim: int, mlp_dim: int) -> nn.Sequential:
    """Linear to gates and values, SwiGLU, linear; no biases."""
    return nn.Sequential(nn.Linear(dim, 2 * mlp_dim, bias=False), SwiGLU(), nn.Linear(mlp_dim, dim, bias=False))


class DoubleStreamBlock(nn.Module):
    """Image and text each keep their own weights and meet in one joint attention (text first). Returns `(img, txt)`.

    `img_mod` and `txt_mod` hold the modulation of the attention branch and of the feed-forward branch.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        mlp_dim = int(dim * mlp_ratio)
        self.img_norm1 = affine_free_norm(dim)
        self.img_attn = SelfAttention(dim, num_heads, qkv_bias=False, proj_bias=False)
        self.img_norm2 = affine_free_norm(dim)
        self.img_mlp = feed_forward(dim, mlp_dim)

        self.txt_norm1 = affine_free_norm(dim)
        self.txt_attn = SelfAttention(dim, num_heads, qkv_bias=False, proj_bias=False)
        self.txt_norm2 = affine_free_norm(dim)
        self.txt_mlp = feed_forward(dim, mlp_dim)
        self.attention = Attention()

    def forward(
        self,
        img: ImgTokens,
        txt: TxtTokens,
        img_mod: Sequence[ModulationOut],
        txt_mod: Sequence[ModulationOut],
        rotation: Rotation,
    ) -> tuple[ImgTokens, TxtTokens]:
        img_mod1, img_mod2 = img_mod
        txt_mod1, txt_mod2 = txt_mod

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
        self.linear1 = nn.Linear(dim, self.qkv_dim + 2 * self.mlp_dim, bias=False)
        self.linear2 = nn.Linear(dim + self.mlp_dim, dim, bias=False)
        self.norm = QKNorm(dim // num_heads)
        self.pre_norm = affine_free_norm(dim)
        self.mlp_act = SwiGLU()
        self.attention = Attention()

    def forward(self, x: Tokens, mod: Sequence[ModulationOut], rotation: Rotation) -> Tokens:
        (only,) = mod
        out = self.linear2(self.branches(modulate(self.pre_norm(x), only.shift, only.scale), rotation))
        return x + only.gate * out

    def branches(self, normed: Tokens, rotation: Rotation) -> Tensor:
        """Attention and feed-forward neurons side by side. What they were made of is freed before `linear2` runs."""
        neurons = self.neurons(normed)
        return torch.cat([self.attend(normed, rotation), neurons], dim=-1)

    def attend(self, normed: Tokens, rotation: Rotation) -> Tokens:
        """The attention branch: the first `3 * dim` rows of `linear1`, then all tokens look at each other."""
        qkv = F.linear(normed, self.linear1.weight[: self.qkv_dim])
        q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.num_heads)
        q, k = self.norm(q, k, v)
        return self.attention(q, k, v, rotation)

    def neurons(self, normed: Tokens) -> Tensor:
        """The feed-forward neurons after their activation: the other rows of `linear1`, gates first."""
        return self.mlp_act(F.linear(normed, self.linear1.weight[self.qkv_dim :]))
