"""The convolutional parts of the autoencoder: residual blocks, attention, resampling. Next: `autoencoder`.

Module names and forward order are those of the published `ae.safetensors` (a latent-diffusion autoencoder, Rombach et
al., 2022).
"""

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from flux_ir.shapes import AnyFeatureMap, DoubledFeatureMap, FeatureMap, HalvedFeatureMap, MixedFeatureMap


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm (eps 1e-6). Groups of one channel would erase flat colours, so small networks use fewer groups."""
    return nn.GroupNorm(groups, channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    """norm, swish, conv - twice - beside an identity (or a 1x1 convolution where the channel count changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: FeatureMap) -> MixedFeatureMap:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions of a feature map, with 1x1 convolutions as projections."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: FeatureMap) -> FeatureMap:
        normed = self.norm(x)
        q, k, v = (rearrange(of(normed), "b c h w -> b 1 (h w) c").contiguous() for of in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the height and width: a strided convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: FeatureMap) -> HalvedFeatureMap:
        # Not `padding=1` on all sides: the published weights were trained with one side of it (Rombach et al., 2022).
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: FeatureMap) -> DoubledFeatureMap:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution of the encoder or decoder: its residual blocks and, where there is one, its resampling layer."""

    def __init__(
        self, blocks: list[ResnetBlock], *, down_channels: int | None = None, up_channels: int | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        if down_channels is not None:
            self.downsample = Downsample(down_channels)
        if up_channels is not None:
            self.upsample = Upsample(up_channels)

    def forward(self, h: AnyFeatureMap) -> AnyFeatureMap:
        for block in self.block:
            h = block(h)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                h = getattr(self, resample)(h)
        return h


class Middle(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, h: FeatureMap) -> FeatureMap:
        return self.block_2(self.attn_1(self.block_1(h)))
