"""What an autoencoder is judged on: tokens of its site that it was not trained on, chosen as its training chose them.

Its folder says how its data were split and filtered; `EvaluationData` puts that together with a source.
Next: `metrics`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.activations.blocks import TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.feed import SourceFeed, read_blocks
from flux_ir.sae.data.filters import Filters, SiteKey
from flux_ir.sae.data.splits import Side, Split, split_source
from flux_ir.sites import Site, nearest_names

ORDER_SEED = 0
"""The seed of the order that tokens are read in."""
_BLOCK_ROWS = 1024  # small: where a limit cuts the reading short, what was read is a fair sample of all


class EvaluationTokens(NamedTuple):
    """Tokens of one site, with the step and the stream that each is of."""

    values: Tensor
    steps: Tensor
    is_text: Tensor


@dataclass(frozen=True)
class EvaluationData:
    """A site of a source, and which of its tokens are on which side."""

    source: TokenSource
    site: SiteKey
    split: Split
    filters: Filters

    def tokens(self, side: Side, batch_tokens: int, max_tokens: int | None = None) -> Iterator[EvaluationTokens]:
        """The tokens of one side in an order that never changes, so many at a time, until `max_tokens` (None: all)."""
        feed = SourceFeed(self.source, [self.site], self.filters, self.split, side, ORDER_SEED)
        feed.cut(_BLOCK_ROWS)
        waiting: list[EvaluationTokens] = []
        count, left = 0, max_tokens
        for rows in read_blocks(feed):
            kept = torch.from_numpy(rows.kept[:left])
            values, is_text = rows.values[self.site][kept], torch.from_numpy(rows.is_text)[kept]
            waiting.append(EvaluationTokens(values, torch.full((len(kept),), rows.step), is_text))
            count += len(kept)
            if left is not None:
                left -= len(kept)
                if left <= 0:
                    break
            if count >= batch_tokens:
                yield _joined(waiting)
                waiting, count = [], 0
        if count:
            yield _joined(waiting)

    @property
    def side(self) -> Side:
        """Which tokens it is judged on: the held-out ones, or if there are none those it was trained on."""
        return "held_out" if self.split.threshold > 0 else "training"

    def described(self) -> dict[str, Any]:
        """What was read, as JSON can say it."""
        return {
            "site": None if self.site is None else str(self.site),
            "model": self.source.model,
            "split": asdict(self.split),
            "side": self.side,
            "steps": self.filters.steps_of(self.source.steps),
            "stream": self.filters.stream,
            "padding": self.filters.padding,
        }


def evaluation_data_of(sae: SparseAutoencoder, source: TokenSource, *, held_out: float) -> EvaluationData:
    """The tokens to judge an autoencoder on. `held_out` is for one whose folder does not say how its data were split.

    Raises FluxIRError for activations of another model, without its site, or of another width.
    """
    site = _site_in(sae, source)
    if sae.config.model and source.model and sae.config.model != source.model:
        raise FluxIRError(
            f"the autoencoder was trained on {sae.config.model}, and these captures are of {source.model}",
            hint="name captures of the same model",
        )
    if source.d(site) != sae.config.d_in:
        raise FluxIRError(
            f"the autoencoder takes activations {sae.config.d_in} wide: {site or 'the array'} is {source.d(site)} wide",
            hint="name the captures it was trained on",
        )
    stored = sae.metadata.get("split")
    split = Split(**stored) if stored else split_source(source, sae.metadata.get("held_out", held_out))
    return EvaluationData(source, site, split, filters_of(sae, source))


def filters_of(sae: SparseAutoencoder, source: TokenSource) -> Filters:
    """The filters it was trained with, on the steps that the source has. Outliers stay in: they are data too."""
    stored: Mapping[str, Any] = sae.metadata.get("filters") or {}
    filters = Filters(stream=stored.get("stream"), padding=stored.get("padding", False))
    steps = stored.get("steps") or sae.config.steps
    if steps is None:
        return filters
    common = sorted(set(steps) & set(source.steps))
    if not common:
        raise FluxIRError(
            f"the autoencoder was trained on the steps {', '.join(map(str, steps))}, of which the captures have none",
            hint=f"they have {', '.join(map(str, source.steps))}: capture the others as well",
        )
    return replace(filters, steps=common)


def _site_in(sae: SparseAutoencoder, source: TokenSource) -> SiteKey:
    if not source.sites:  # a plain array
        return None
    if sae.config.site is None:
        raise FluxIRError(
            "the autoencoder was trained on an array without a site, and these captures have sites",
            hint="name the array it was trained on",
        )
    site = Site.parse(sae.config.site)
    if site not in source.sites and site.whole not in source.sites:
        raise FluxIRError(
            f"the autoencoder was trained on {site}, which these captures do not have",
            hint=f"the nearest are {nearest_names(str(site), map(str, source.sites))}",
        )
    return site


def _joined(parts: list[EvaluationTokens]) -> EvaluationTokens:
    return EvaluationTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))
