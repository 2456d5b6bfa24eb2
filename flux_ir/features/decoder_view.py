"""The neighbours of a feature in its dictionary: by direction, and by the images both are active on.

Both are exact for all features. Products are made block by block, so nothing of size [d_sae, d_sae] is held. Next:
`drawings`, which shows what a feature's direction draws.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from flux_ir.errors import FluxIRError

NEIGHBOURS = 16
"""How many of each kind are kept for each feature."""
BLOCK_VALUES = 2**27
"""The size of a block of products [some features, d_sae]: half a gigabyte in float32."""


class Neighbours(NamedTuple):
    """Other features by number, the nearest first; -1 where there are no more."""

    feature: Int[Tensor, "d_sae most"]
    likeness: Float[Tensor, "d_sae most"]
    """Their cosine, or Jaccard index; NaN where there are no more."""


@torch.no_grad()
def nearest_by_cosine(decoder: Float[Tensor, "d_sae d"], most: int = NEIGHBOURS) -> Neighbours:
    """The features whose decoder rows have the largest cosine with each feature's; rows of length 0 are near none."""
    units, has_length = normalize(decoder.float(), dim=1), decoder.norm(dim=1) > 0
    blocks_done = []
    for block in _blocks(len(units)):
        cosine = units[block.start : block.stop] @ units.T
        cosine[:, ~has_length] = -torch.inf
        cosine[~has_length[block.start : block.stop]] = -torch.inf
        blocks_done.append(_largest(cosine, block, most, least=-torch.inf))
    return _joined(blocks_done)


@torch.no_grad()
def best_cosine(
    decoder: Float[Tensor, "d_sae d"], other: Float[Tensor, "_d_sae d"]
) -> tuple[Float[Tensor, "d_sae"], Int[Tensor, "d_sae"]]:
    """The largest cosine of each row with a row of another dictionary, and the number of that row: seed stability, if
    the other was trained alike with another seed. NaN and -1 for rows of length 0.
    """
    theirs = normalize(other.float(), dim=1)
    cosines, rows = [], []
    for block in _blocks(len(decoder), columns=len(other)):
        own = decoder[block.start : block.stop].float()
        best = (normalize(own, dim=1) @ theirs.T).max(dim=1)
        silent = own.norm(dim=1) == 0
        cosines.append(best.values.masked_fill(silent, torch.nan))
        rows.append(best.indices.masked_fill(silent, -1))
    return torch.cat(cosines).cpu(), torch.cat(rows).cpu()


@torch.no_grad()
def encoder_decoder_cosine(
    encoder: Float[Tensor, "d_sae d"], decoder: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "d_sae"]:
    """The cosine of each feature's encoder and decoder row; NaN where one of the two has length 0."""
    encoder, decoder = encoder.float(), decoder.float()
    lengths = encoder.norm(dim=1) * decoder.norm(dim=1)
    return ((encoder * decoder).sum(dim=1) / torch.where(lengths > 0, lengths, torch.nan)).cpu()


class Active(NamedTuple):
    """The pairs of an item (an image or a token) and a feature that is active on it, each once."""

    items: int
    """The number of images or tokens."""
    item: Int[Tensor, "pairs"]
    """[pairs]: the index of the image or token."""
    feature: Int[Tensor, "pairs"]


@torch.no_grad()
def active_together(
    read: Callable[[], Iterable[Active]],
    d_sae: int,
    *,
    most: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
    block_values: int | None = None,
) -> Neighbours:
    """The features with the largest Jaccard index: images (or tokens) on which both are active, as a share of those on
    which at least one of the two is. Features that never meet are no neighbours.

    `read` is called once for the counts, and once more for each block of block_values / d_sae features: up to 11,000
    features are one block. Counts are sums in float32, exact up to 2^24 items.
    """
    count = torch.zeros(d_sae, dtype=torch.int64)
    items = 0
    for part in read():
        count += torch.bincount(part.feature.long(), minlength=d_sae)
        items += part.items
    if items > 2**24:
        raise FluxIRError(
            f"activity together is counted over at most {2**24} images or tokens: got {items}",
            hint="count over images, or over fewer of them",
        )
    totals, blocks_done = count.float().to(device), []
    for block in _blocks(d_sae, block_values=block_values):
        both = torch.zeros(len(block), d_sae, device=device)
        for part in read():
            dense = torch.zeros(part.items, d_sae, device=device)
            dense[part.item.long().to(device), part.feature.long().to(device)] = 1
            both.addmm_(dense[:, block.start : block.stop].T, dense)
        either = totals[block.start : block.stop, None] + totals - both
        blocks_done.append(_largest(both / either.clamp(min=1), block, most, least=0.0))
    return _joined(blocks_done)


def _blocks(rows: int, *, columns: int | None = None, block_values: int | None = None) -> list[range]:
    size = max(1, (block_values or BLOCK_VALUES) // (columns or rows))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _largest(likeness: Float[Tensor, "rows d_sae"], block: range, most: int, *, least: float) -> Neighbours:
    """The largest of each row that are above `least`, without the feature itself; of equals the smaller number."""
    likeness[torch.arange(len(block)), torch.arange(block.start, block.stop)] = -torch.inf
    values, features = likeness.sort(dim=1, descending=True, stable=True)
    values, features = values[:, :most], features[:, :most].int()
    if values.shape[1] < most:  # a dictionary smaller than that
        lacking = most - values.shape[1]
        values = torch.nn.functional.pad(values, (0, lacking), value=-torch.inf)
        features = torch.nn.functional.pad(features, (0, lacking), value=-1)
    empty = values <= least
    return Neighbours(features.masked_fill(empty, -1).cpu(), values.masked_fill(empty, torch.nan).cpu())


def _joined(found: list[Neighbours]) -> Neighbours:
    return Neighbours(torch.cat([part.feature for part in found]), torch.cat([part.likeness for part in found]))
