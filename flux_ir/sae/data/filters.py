"""Which tokens are trained on: of which sites, stream and steps, without padding and far longer ones."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.blocks import TokenBlock, TokenRun, TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site, SiteStream, Stream, match_sites, nearest_names

SiteKey = Site | None
"""A site, or None for the one array of a source that knows no sites."""

NormLimits = Mapping[tuple[SiteKey, int], float]
"""The length above which a token is an outlier, by site and step (`measure.norm_limits`)."""

# Integers of the same width, and the bits of infinity.
_INFINITY = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
}

_ALL = 2**31 - 1  # more than there are tokens


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

    def half(self, site: SiteKey) -> SiteKey:
        """What of a site is read: the half of the stream asked for, where a single block was stored whole.

        Raises FluxIRError for a site of the other stream.
        """
        if site is None or self.stream is None or site.stream == self.stream:
            return site
        if site.stream is not None:
            raise FluxIRError(f"{site} has no {self.stream} tokens: the filters left none", hint="leave --stream out")
        return replace(site, stream=self.stream)

    def rows(self, block: TokenBlock) -> range:
        """The rows of the stream asked for."""
        rows = range(len(block.positions))
        if self.stream is None:
            return rows
        return rows[: block.txt_tokens] if self.stream == "txt" else rows[block.txt_tokens :]

    def used(self, run: TokenRun) -> Tensor | None:
        """Which tokens are no padding: bool [images, tokens]. None: all."""
        if self.padding or not run.txt_tokens or all(used is None for used in run.used_txt):
            return None
        most = torch.tensor([_ALL if used is None else used for used in run.used_txt])
        is_text = torch.arange(run.positions.shape[1]) < run.txt_tokens
        return ~is_text | (run.positions.cpu() < most[:, None])

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


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. On a CPU this costs no more than reading them, on one thread.

    Read as integers, infinity and NaN are the largest of their sign. NumPy looks for them: PyTorch keeps a team of
    OpenMP threads for each thread that calls it, and starting that takes longer than looking through a block.
    """
    if values.device.type != "cpu" or values.dtype not in _INFINITY or not values.numel():
        return bool(torch.isfinite(values).all())
    signed, infinity = _INFINITY[values.dtype]
    unsigned = np.dtype(f"u{signed.itemsize}")
    bits = values.detach().view(signed).numpy()
    sign = 1 << (8 * signed.itemsize - 1)
    return bool(bits.max() < infinity and bits.view(unsigned).max() < infinity + sign)


def choose_sites(source: TokenSource, patterns: Sequence[str]) -> list[SiteKey]:
    """The sites of the source that match any of the patterns (`double.*.img`), in depth order; [None] for an array.

    Raises FluxIRError for a pattern that matches nothing, naming the nearest sites.
    """
    if not source.sites:
        return [None]
    streams: tuple[Stream, ...] = ("img", "txt")
    whole = [site for site in source.sites if site.stream is None and not site.per_prompt]
    available = sorted({*source.sites, *(replace(site, stream=stream) for site in whole for stream in streams)})
    for pattern in patterns:
        try:
            match_sites([pattern], available)
        except FluxIRError as error:
            raise FluxIRError(
                f"no site of these captures matches {pattern!r}: sites there are: {len(source.sites)}",
                hint=f"the nearest are {nearest_names(pattern, map(str, available))}",
            ) from error
    return list(match_sites(patterns, available))


def sites_in_lockstep(sites: Sequence[SiteKey], filters: Filters) -> list[list[SiteKey]]:
    """The sites in groups that have the same tokens, and so can share batches: image, text, and both."""
    groups: dict[SiteStream | None, list[SiteKey]] = {}
    for site in sites:
        half = filters.half(site)
        groups.setdefault(half.stream if half else None, []).append(site)
    return list(groups.values())
