"""Which tokens are trained on: of which stream and steps, without padding, without those of outstanding length."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.token_blocks import TokenBlock
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site, Stream

SiteKey = Site | None
"""A site, or None for the one array of a source that knows no sites."""

NormLimits = Mapping[tuple[SiteKey, int], float]
"""The length above which a token is an outlier, by site and step (`measure_data.norm_limits`)."""

# Integers of the same width, and the bits of infinity.
_INFINITY = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
}


@dataclass(frozen=True)
class Filters:
    """What is left out of the data. The default leaves out the padding of the text and nothing else."""

    stream: Stream | None = None
    """Only this half of single blocks that were stored whole; None: both."""
    steps: Collection[int] | None = None
    """Only these sampling steps; None: all."""
    padding: bool = False
    """Whether text tokens behind the end of the prompt stay in, where it is known how many were used."""
    outlier_factor: float | None = None
    """Tokens longer than so many times the median of their site and step are left out; None: none are."""
    limits: NormLimits = field(default_factory=dict)
    """What `outlier_factor` comes to; measured from the data."""

    def __post_init__(self) -> None:
        factor = self.outlier_factor
        if factor is not None and not (math.isfinite(factor) and factor > 1):
            raise FluxIRError(
                f"the outlier factor multiplies the median length of a token, so it must be above 1: got {factor}",
                hint="10 leaves out the few tokens that transformers use as registers",
            )

    def steps_of(self, available: Collection[int]) -> list[int]:
        """The steps to read, in order. Raises FluxIRError for a step the data do not have."""
        if self.steps is None:
            return sorted(available)
        missing = sorted(set(self.steps) - set(available))
        if missing or not self.steps:
            raise FluxIRError(
                f"the steps to train on must be among those captured: got {missing or 'none'}",
                hint=f"the data have the steps {', '.join(map(str, sorted(available)))}",
            )
        return sorted(set(self.steps))

    def rows(self, block: TokenBlock) -> slice:
        """The rows of the stream asked for."""
        if self.stream is None:
            return slice(None)
        return slice(None, block.txt_tokens) if self.stream == "txt" else slice(block.txt_tokens, None)

    def used(self, block: TokenBlock) -> Tensor | None:
        """Which of these rows are no padding: bool [rows]. None: all."""
        rows = range(len(block.positions))[self.rows(block)]
        padded = block.used_txt is not None and rows.start < block.txt_tokens
        if self.padding or not padded or block.used_txt is None:
            return None
        positions = block.positions[self.rows(block)].cpu()
        is_text = torch.arange(rows.start, rows.stop) < block.txt_tokens
        return ~is_text | (positions < block.used_txt)

    def within_limit(self, values: Tensor, site: SiteKey, step: int) -> Tensor | None:
        """Which tokens [rows, d] are no longer than the limit of this site and step: bool [rows]. None: all."""
        if self.outlier_factor is None:
            return None
        if (site, step) not in self.limits:
            raise FluxIRError(
                f"no length was measured for {site or 'the array'} at step {step}, so outliers cannot be left out",
                hint="measure the limits on the sites and steps that are trained on",
            )
        return (lengths(values) <= self.limits[site, step]).cpu()


def lengths(values: Tensor) -> Tensor:
    """The Euclidean length of each token [tokens, d]: float32 [tokens]."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)


def check_finite(values: Tensor, place: object, site: SiteKey, step: int) -> None:
    """Raises FluxIRError if a value is NaN or infinite. `place` says where the tokens were read."""
    if all_finite(values):
        return
    wrong = int((~torch.isfinite(values)).any(dim=-1).sum())
    raise FluxIRError(
        f"activations must be finite numbers: {wrong} of {len(values)} tokens of {site or 'the array'} at step {step} "
        f"in {place} hold NaN or infinity",
        hint="the network overflowed there or the file is damaged: capture it again, or leave the step out",
    )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. On a CPU this costs no more than reading them, on one thread.

    Read as integers, infinity and NaN are the largest of their sign.
    """
    if values.device.type != "cpu" or values.dtype not in _INFINITY or not values.numel():
        return bool(torch.isfinite(values).all())
    signed, infinity = _INFINITY[values.dtype]
    unsigned = np.dtype(f"u{signed.itemsize}")
    bits = values.detach().view(signed).numpy()
    sign = 1 << (8 * signed.itemsize - 1)
    return bool(bits.max() < infinity and bits.view(unsigned).max() < infinity + sign)
