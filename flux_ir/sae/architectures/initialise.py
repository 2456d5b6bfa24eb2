"""How an autoencoder starts: directions drawn from its seed, b_dec and normalisation from a sample of the data.

All draws are made on the CPU in float32, so that a seed means the same weights on every device.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder

_SHORTEST, _LONGEST = 1e-4, 1e15  # mean lengths of tokens as the losses see them: their squares stand in float32
_ITERATIONS = 200
_TOLERANCE = 1e-6


class Normalisation(NamedTuple):
    """xn = scale (x - mean): `scale` makes the mean length of the centred tokens sqrt(d)."""

    mean: Float[Tensor, "d_in"]
    scale: float


def normalisation_of(x: Float[Tensor, "n d_in"]) -> Normalisation:
    """The normalisation of these raw tokens. Raises FluxIRError if they are all equal, or not finite."""
    x = x.float()
    mean = x.mean(dim=0)
    length = (x - mean).norm(dim=1).mean().item()
    if not 0 < length < math.inf:
        raise FluxIRError(
            f"tokens must be finite and differ: {len(x)} have a mean distance of {length} from their mean",
            hint="look for NaN in the activations; give more than one token",
        )
    return Normalisation(mean, math.sqrt(x.shape[1]) / length)


@torch.no_grad()
def initialise_(sae: SparseAutoencoder, sample: Float[Tensor, "n d_in"] | None) -> None:
    """Draw the weights in place; `sample` are normalised tokens for b_dec, which is 0 without them.

    The other parameters keep the values their architecture gives them: biases 0, thresholds as `JumpReLU` says. Raises
    FluxIRError for tokens so short or long that the losses would not be what they say.
    """
    config = sae.config
    if sample is not None:
        _check_size(sample)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.d_sae, config.d_in)
    draw = {"random": random_rows, "orthogonal": orthogonal_rows}
    sae.W_dec.copy_(draw[config.decoder_init](*shape, generator))
    if config.encoder_init == "transposed":  # W_enc = W_dec^T, beside AuxK what keeps features alive (Gao et al. 2024)
        sae.encoder.copy_(sae.W_dec)
    else:
        sae.encoder.copy_(draw[config.encoder_init](*shape, generator))
    if sample is not None:
        sae.b_dec.copy_(geometric_median(sample) if config.bias_init == "geometric_median" else sample.mean(dim=0))
        sae.start_from(sample)


def _check_size(sample: Float[Tensor, "n d_in"]) -> None:
    length = sample.double().norm(dim=1).mean().item()
    if not _SHORTEST <= length <= _LONGEST:
        raise FluxIRError(
            f"tokens must be finite and {_SHORTEST:g} to {_LONGEST:g} long, as training sees them: "
            f"these are {length:.3g} long",
            hint="normalise them (leave --normalise on), or scale and store them again; equal tokens teach nothing",
        )


def random_rows(rows: int, width: int, generator: torch.Generator) -> Float[Tensor, "{rows} {width}"]:
    """Independent directions, evenly spread over the sphere, of length 1."""
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1)


def orthogonal_rows(rows: int, width: int, generator: torch.Generator) -> Float[Tensor, "{rows} {width}"]:
    """Directions of length 1 of which each successive `width` are orthogonal to each other, evenly spread otherwise."""
    blocks = [_rotation(width, generator)[: rows - start] for start in range(0, rows, width)]
    return F.normalize(torch.cat(blocks), dim=1)


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return q * r.diagonal().sign()  # without the signs, QR prefers some rotations to others (Mezzadri 2007)


def geometric_median(
    points: Float[Tensor, "n d_in"], *, iterations: int = _ITERATIONS, tolerance: float = _TOLERANCE
) -> Float[Tensor, "d_in"]:
    """The point with the least mean distance to `points` (Weiszfeld 1937), in their dtype.

    Stops when a step is shorter than `tolerance` of the mean distance.
    """
    exact = points.double()
    median = exact.mean(dim=0)
    for _ in range(iterations):
        distance = (exact - median).norm(dim=1)
        typical = distance.mean()
        weight = 1 / distance.clamp_min(1e-12 + 1e-9 * typical)  # a point right at the median would weigh infinitely
        following = weight @ exact / weight.sum()
        step = (following - median).norm()
        median = following
        if step <= tolerance * typical:
            break
    return median.to(points.dtype)
