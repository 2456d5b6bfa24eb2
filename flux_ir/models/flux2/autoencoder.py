"""FLUX.2's autoencoder: FLUX.1's convolutions, 32 latent channels, and statistics in place of one shift and scale.

The latent keeps the layout of FLUX.1's, 1/8 of the picture's sides, so that `sampling.latents` packs both alike: 2 x 2
of its pixels are the 128 numbers of a token. State-dict names are those of the published `ae.safetensors`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_ir.models import autoencoder
from flux_ir.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux_ir.shapes import Image, Latent

PATCH = 2  # latent pixels per token along each side
STATISTICS_EPS = 1e-4


@dataclass(frozen=True)
class Flux2AutoEncoderParams(AutoEncoderParams):
    """The shape of one autoencoder. The statistics in its weights replace scale and shift, which change nothing."""

    scale_factor: float = 1.0
    shift_factor: float = 0.0


class Encoder(autoencoder.Encoder):
    """Picture to the moments of its latent, mixed once more by a 1x1 convolution."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__(params)
        self.quant_conv = nn.Conv2d(2 * params.z_channels, 2 * params.z_channels, kernel_size=1)

    def forward(self, x: Image) -> Latent:
        return self.quant_conv(super().forward(x))


class Decoder(autoencoder.Decoder):
    """Latent (in the encoder's own units) to picture, mixed by a 1x1 convolution first."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__(params)
        self.post_quant_conv = nn.Conv2d(params.z_channels, params.z_channels, kernel_size=1)

    def forward(self, z: Latent) -> Image:
        return super().forward(self.post_quant_conv(z))


class Flux2AutoEncoder(AutoEncoder):
    """Pictures in [-1, 1] to latents and back; every number of a token is normalised by its own mean and variance.

    They are the running statistics of a batch norm, which was trained along and is not run: its formula is written out.
    """

    encoder_type = Encoder
    decoder_type = Decoder

    def __init__(self, params: Flux2AutoEncoderParams) -> None:
        super().__init__(params)
        self.bn = nn.BatchNorm2d(PATCH**2 * params.z_channels, eps=STATISTICS_EPS, affine=False)

    def normalised(self, mean: Latent) -> Latent:
        centre, spread = self._statistics()
        return F.pixel_shuffle((F.pixel_unshuffle(mean, PATCH) - centre) / spread, PATCH)

    def denormalised(self, z: Latent) -> Latent:
        centre, spread = self._statistics()
        return F.pixel_shuffle(F.pixel_unshuffle(z, PATCH) * spread + centre, PATCH)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each number of a token, [channels, 1, 1]."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert variance is not None
        return mean[:, None, None], torch.sqrt(variance + self.bn.eps)[:, None, None]
