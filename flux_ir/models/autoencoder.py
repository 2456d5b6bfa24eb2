"""The autoencoder between pictures and latents. State-dict names are those of the published `ae.safetensors`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.convnet import Level, Middle, ResnetBlock, group_norm
from flux_ir.shapes import Image, Latent


@dataclass(frozen=True)
class AutoEncoderParams:
    """The shape of one autoencoder. Latents are `scale_factor * (mean - shift_factor)`; one level per `ch_mult`."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # JSON gives lists; a tuple can be hashed
        if self.ch % self.norm_groups:
            raise FluxIRError(
                f"ch must be a multiple of norm_groups: got {self.ch} and {self.norm_groups}",
                hint="groups of whole channels; FLUX.1 uses 128 and 32",
            )


class Encoder(nn.Module):
    """Picture to the moments (mean, log-variance) of its latent."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        groups = params.norm_groups
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        channels = params.ch
        for level, mult in enumerate(params.ch_mult):
            blocks, channels = _residual_blocks(channels, params.ch * mult, params.num_res_blocks, groups)
            last = level == len(params.ch_mult) - 1
            self.down.append(Level(blocks, down_channels=None if last else channels))
        self.mid = Middle(channels, groups)
        self.norm_out = group_norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, 2 * params.z_channels, kernel_size=3, padding=1)

    def forward(self, x: Image) -> Latent:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent (in the encoder's own units) to picture. `up[i]` works at the resolution of `down[i]`: runs backwards."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        groups = params.norm_groups
        channels = params.ch * params.ch_mult[-1]
        self.conv_in = nn.Conv2d(params.z_channels, channels, kernel_size=3, padding=1)
        self.mid = Middle(channels, groups)
        levels: list[Level] = []
        for level, mult in reversed(list(enumerate(params.ch_mult))):
            blocks, channels = _residual_blocks(channels, params.ch * mult, params.num_res_blocks + 1, groups)
            levels.insert(0, Level(blocks, up_channels=channels if level else None))
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, params.out_ch, kernel_size=3, padding=1)

    def forward(self, z: Latent) -> Image:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _residual_blocks(in_channels: int, out_channels: int, count: int, groups: int) -> tuple[list[ResnetBlock], int]:
    first = ResnetBlock(in_channels, out_channels, groups)
    return [first, *(ResnetBlock(out_channels, out_channels, groups) for _ in range(count - 1))], out_channels


class AutoEncoder(nn.Module):
    """Pictures in [-1, 1] to latents and back; latents leave shifted and scaled to about unit variance."""

    encoder_type: ClassVar[type[Encoder]] = Encoder
    decoder_type: ClassVar[type[Decoder]] = Decoder

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = self.encoder_type(params)
        self.decoder = self.decoder_type(params)

    def moments(self, x: Image) -> tuple[Latent, Latent]:
        """Mean and log-variance of the latent, in the encoder's own units (training needs both)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, x: Image) -> Latent:
        """The mean latent, shifted and scaled: no draw, so the same picture always gives the same latent."""
        mean, _ = self.moments(x)
        return self.normalised(mean)

    def decode(self, z: Latent) -> Image:
        """The picture of a shifted and scaled latent, about [-1, 1] (not clamped)."""
        return self.decoder(self.denormalised(z))

    def normalised(self, mean: Latent) -> Latent:
        """A latent in the encoder's own units, shifted and scaled to about unit variance."""
        return self.params.scale_factor * (mean - self.params.shift_factor)

    def denormalised(self, z: Latent) -> Latent:
        """The reverse: a latent in the encoder's own units."""
        return z / self.params.scale_factor + self.params.shift_factor

    def forward(self, x: Image) -> Image:
        return self.decode(self.encode(x))


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence [nats per latent number] of the encoder's Gaussian from N(0, 1)."""
    return 0.5 * torch.mean(mean.square() + log_variance.exp() - 1.0 - log_variance)
