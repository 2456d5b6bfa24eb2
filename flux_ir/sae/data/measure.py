"""What must be known of the data before training: mean and length for the normalisation, and a sample of tokens.

Everything is measured on the training side of the split, over blocks in an order that the seed sets; mean and length
in float64.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.blocks import TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.batches import TokenBatches
from flux_ir.sae.data.feed import BlockRows, Blocks, Feed, SourceFeed, StreamFeed, read_blocks
from flux_ir.sae.data.filters import Filters, SiteKey, lengths, sites_in_lockstep
from flux_ir.sae.data.splits import Split

LEAST_TOKENS = 100_000
LEAST_BLOCKS = 64
"""So many blocks, of different images and steps, stand for all of the data."""
_LIMIT_TOKENS = 20_000  # per site and step: the median is then good to a per cent or two
_PIECE_TOKENS = 4096  # turned into float64 at once
_SAMPLE_POOL_BYTES = 2**28


class DataNormalisation(NamedTuple):
    """xn = scale * (x - mean): centred, and sqrt(d) long on average."""

    mean: Tensor
    """float64 [d]."""
    scale: float
    """sqrt(d) / the mean length of a centred token; 1 where all tokens are the same."""
    tokens: int
    """How many tokens it was measured on."""


def measure_normalisation(
    source: TokenSource | Blocks,
    sites: Sequence[SiteKey],
    *,
    filters: Filters | None = None,
    split: Split | None = None,
    seed: int = 0,
    least_tokens: int = LEAST_TOKENS,
) -> dict[SiteKey, DataNormalisation]:
    """Mean and scale of each site over at least so many training tokens, or all if there are fewer.

    The same tokens are read twice: lengths are measured from the mean. Raises FluxIRError if there are none.
    """
    feed = _feed(source, sites, filters or Filters(), split or Split("prompt", 0.0), seed, least_tokens)
    sums: dict[SiteKey, Tensor] = {}
    tokens = 0
    for site, values in _pieces(feed, least_tokens):
        total = values.sum(0)
        sums[site] = sums[site] + total if site in sums else total
        tokens += len(values) if site == sites[0] else 0
    if not tokens:
        raise FluxIRError("there are no tokens to measure", hint="check the steps, the split and the filters")
    means = {site: total / tokens for site, total in sums.items()}
    length: dict[SiteKey, float] = defaultdict(float)
    for site, values in _pieces(feed, least_tokens):
        length[site] += float(torch.linalg.vector_norm(values - means[site], dim=1).sum())
    return {site: DataNormalisation(mean, _scale(mean, length[site] / tokens), tokens) for site, mean in means.items()}


def norm_limits(
    source: TokenSource | Blocks,
    sites: Sequence[SiteKey],
    filters: Filters,
    *,
    split: Split | None = None,
    seed: int = 0,
    tokens_each: int = _LIMIT_TOKENS,
) -> Filters:
    """The filters with what `outlier_factor` comes to: so many times the median length, for each site and step.

    The median is over at least `tokens_each` training tokens of each, or all if there are fewer. Of a stream, these are
    its first blocks. Sites with other tokens, text and image say, are measured one after the other.
    """
    factor = filters.outlier_factor
    if factor is None:
        return filters
    limits: dict[tuple[SiteKey, int], float] = {}
    everything = replace(filters, outlier_factor=None)
    for together in sites_in_lockstep(sites, filters):
        feed = _feed(source, together, everything, split or Split("prompt", 0.0), seed, tokens_each)
        steps = set(filters.steps_of(source.steps)) if not callable(source) else set(filters.steps or ())
        medians = _median_lengths(feed, steps, tokens_each)
        limits |= {key: factor * length for key, length in medians.items()}
    return replace(filters, limits=limits)


def _median_lengths(feed: Feed, steps: set[int], tokens_each: int) -> dict[tuple[SiteKey, int], float]:
    """The median length of the tokens of each site and step, of about `tokens_each`; no `steps`: of all of the feed."""
    norms: dict[tuple[SiteKey, int], list[Tensor]] = defaultdict(list)
    counts: dict[int, int] = defaultdict(int)
    for rows in read_blocks(feed):
        if counts[rows.step] < tokens_each:
            counts[rows.step] += len(rows.kept)
            for site, values in rows.values.items():
                norms[site, rows.step].append(lengths(values[torch.from_numpy(rows.kept)]).cpu())
        if steps and all(counts[step] >= tokens_each for step in steps):
            break
    return {key: median(torch.cat(parts).tolist()) for key, parts in norms.items()}


def sample_tokens(
    source: TokenSource | Blocks,
    sites: Sequence[SiteKey],
    count: int,
    *,
    filters: Filters | None = None,
    split: Split | None = None,
    seed: int = 0,
) -> dict[SiteKey, Tensor]:
    """So many training tokens of each site in random order, or all if there are fewer: [count, d], as stored.

    Drawn from a pool of a quarter of a gigabyte. For what is too slow on all tokens, such as a geometric median.
    """
    batches = TokenBatches(
        source,
        sites,
        batch_tokens=count,
        pool_bytes=_SAMPLE_POOL_BYTES,
        seed=seed,
        filters=filters,
        split=split,
        prefetch=False,
    )
    with batches:
        return next(batches).values


def _feed(
    source: TokenSource | Blocks, sites: Sequence[SiteKey], filters: Filters, split: Split, seed: int, tokens: int
) -> Feed:
    """What so many `tokens` are measured on: of a source, they come from many blocks, whatever a block may hold."""
    if callable(source):
        return StreamFeed(source, sites, filters, split, "training")
    feed = SourceFeed(source, sites, filters, split, "training", seed)
    feed.cut(max(tokens // LEAST_BLOCKS, 1))
    return feed


def _pieces(feed: Feed, least_tokens: int) -> Iterator[tuple[SiteKey, Tensor]]:
    """The tokens that are measured, in float64 and a few at a time: whole blocks until there are enough."""
    tokens = 0
    for rows in read_blocks(feed):
        yield from _in_float64(rows)
        tokens += len(rows.kept)
        if tokens >= least_tokens:
            return


def _in_float64(rows: BlockRows) -> Iterator[tuple[SiteKey, Tensor]]:
    for site, values in rows.values.items():
        for kept in torch.split(torch.from_numpy(rows.kept), _PIECE_TOKENS):
            yield site, values[kept.to(values.device)].double().cpu()


def _scale(mean: Tensor, mean_length: float) -> float:
    return math.sqrt(len(mean)) / mean_length if mean_length > 0 else 1.0
