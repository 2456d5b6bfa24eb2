"""Activations in the order they are trained on: blocks of tokens, all sites side by side.

A block is some tokens of neighbouring images at one step, 2 MB or more that lie in one piece. An epoch
goes through all blocks in an order of its own, which only the seed decides. Row i of every site of a
block is the same token, so autoencoders for many sites share one pass over the data. Next: `batches`,
which mixes the rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.blocks import TokenBlock, TokenRun, TokenSource, run_of
from flux_ir.activations.spans import Memory
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.filters import Filters, SiteKey, all_finite
from flux_ir.sae.data.splits import Side, Split

SITE_BYTES, BLOCK_BYTES = 2 * 2**20, 4 * 2**20
"""The least size of a block: of each site, which is one read, and of all sites together. It stays in the cache of the
processor from reading to its last use."""
_GAP_BYTES = 2**18  # images of the other side are read along and dropped, where no more lie between two
_WAITING_BLOCKS = 1024  # of a stream, until their last site has come

Blocks = Callable[[], Iterator[TokenBlock]]
"""Starts a live stream from its beginning: the same blocks in the same order every time."""


class BlockRows(NamedTuple):
    """The tokens of a block: those that are kept may be trained on."""

    ordinal: int
    """The block's number in the order of the epoch."""
    step: int
    values: dict[SiteKey, Tensor]
    """[rows, d] for each site, of the data's own dtype (float8 becomes bfloat16)."""
    generations: NDArray[np.int32]
    """Index among the source's generations; of a stream: in order of appearance."""
    is_text: NDArray[np.bool_]
    kept: NDArray[np.int64]
    """The rows that passed the filters, ascending."""
    origin: Callable[[int], str]
    """What a generation is called in messages, by its index."""

    @property
    def all_kept(self) -> bool:
        """Whether no row was left out."""
        return len(self.kept) == len(self.is_text)

    def check_finite(self) -> None:
        """Raises FluxIRError if a row that is kept holds NaN or infinity, and names its generation, site and step."""
        for site, values in self.values.items():
            if all_finite(values) or (not self.all_kept and all_finite(values[torch.from_numpy(self.kept)])):
                continue
            kept = torch.from_numpy(self.kept).to(values.device)
            wrong = (~torch.isfinite(values[kept])).any(dim=-1).cpu().numpy()
            generations = self.generations[self.kept]
            first = generations[wrong][0]
            of_first = generations == first
            raise FluxIRError(
                f"activations must be finite numbers: {int(wrong[of_first].sum())} of {int(of_first.sum())} tokens of "
                f"{site or 'the array'} at step {self.step} in {self.origin(int(first))} hold NaN or infinity",
                hint="the network overflowed there or the file is damaged: capture it again, or leave the step out",
            )


class Read(NamedTuple):
    """A block that can be read, again and again."""

    ordinal: int
    most_rows: int
    """Rows before those are left out that do not pass the filters."""
    rows: Callable[[Mapping[SiteKey, Memory]], BlockRows]
    """Reads it: into a site's memory where there is one. Raises FluxIRError unless all that it keeps is finite."""


class TokenFormat(NamedTuple):
    """What a site's tokens are: their width, and the type of their values."""

    d: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one token."""
        return self.d * self.dtype.itemsize


@runtime_checkable
class Feed(Protocol):
    """Blocks of one side of a split, an epoch at a time."""

    repeats: bool
    """Whether there is a second epoch."""

    @property
    def tokens_at_most(self) -> int | None:
        """Tokens of an epoch before filters that look at tokens; None: unknown."""

    @property
    def layout(self) -> dict[SiteKey, TokenFormat] | None:
        """What the rows of each site are; None: it shows when the first block has come."""

    @property
    def content(self) -> str | None:
        """The digest of the source's content; None: a stream has none before it is made."""

    def reads(self, epoch: int, start: int = 0) -> Iterator[Read]:
        """The blocks of an epoch, from number `start` on."""


def read_blocks(feed: Feed) -> Iterator[BlockRows]:
    """The blocks of the first epoch, read one after the other. The values of one are overwritten by the next."""
    memories: dict[SiteKey, Memory] = {site: Memory() for site in feed.layout or {}}
    for read in feed.reads(0):
        yield read.rows(memories)


class SourceFeed:
    """Stored activations, each epoch in an order of its own that only the seed decides."""

    repeats = True

    def __init__(
        self,
        source: TokenSource,
        sites: Sequence[SiteKey],
        filters: Filters,
        split: Split,
        side: Side,
        seed: int,
    ) -> None:
        self.source, self.seed = source, seed
        self._assembler = _Assembler(sites, filters, split, side)
        self._steps = filters.steps_of(source.steps)
        self._sites = {site: filters.half(site) for site in sites}
        generations = source.generations
        self._on_side = np.fromiter((split.has(side, one.id, one.prompt) for one in generations), np.bool_)
        if not self._on_side.any():
            raise FluxIRError(
                f"no generation of {len(generations)} is on the {side} side of the split",
                hint="hold out another share with --held_out, or capture more prompts",
            )
        self._tokens = self._common_tokens()
        self.layout: dict[SiteKey, TokenFormat] = {site: self._row(site) for site in sites}
        self.cut(self._tokens * len(generations))
        self._order = lru_cache(2)(self._permutation)

    def cut(self, most_rows: int) -> None:
        """Cut the data into blocks of at most so many rows: mixing needs many of them in a buffer."""
        row_bytes = sum(row.nbytes for row in self.layout.values())
        rows = max(1, min(max(BLOCK_BYTES, len(self.layout) * SITE_BYTES) // row_bytes, most_rows))
        images = max(rows // self._tokens, 1)
        self._chunks = -(-self._tokens // rows)  # of each image
        self._chunk_tokens = -(-self._tokens // self._chunks)
        gap = _GAP_BYTES // max(self._tokens * row_bytes, 1)
        self._spans = _spans(self.source.runs, self._on_side, most=images, gap=gap)

    @property
    def tokens_at_most(self) -> int:
        """Exact where nothing is filtered."""
        return int(self._on_side.sum()) * len(self._steps) * self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes of an epoch, about."""
        return self.tokens_at_most * sum(row.nbytes for row in self.layout.values())

    @property
    def content(self) -> str:
        """The digest of the source's content."""
        return self.source.identity

    def reads(self, epoch: int, start: int = 0) -> Iterator[Read]:
        """The blocks of an epoch, from number `start` on."""
        order = self._order(epoch)
        for ordinal in range(start, len(order)):
            index, step = divmod(int(order[ordinal]), len(self._steps))
            span, chunk = divmod(index, self._chunks)
            images = range(*self._spans[span].tolist())
            first = chunk * self._chunk_tokens
            tokens = range(first, min(first + self._chunk_tokens, self._tokens))
            yield Read(ordinal, len(images) * len(tokens), self._reading(ordinal, images, tokens, self._steps[step]))

    def _reading(
        self, ordinal: int, images: range, tokens: range, step: int
    ) -> Callable[[Mapping[SiteKey, Memory]], BlockRows]:
        def read(memories: Mapping[SiteKey, Memory]) -> BlockRows:
            runs = {
                site: self.source.read_run(images, stored, step, tokens, memories.get(site))
                for site, stored in self._sites.items()
            }
            on_side = self._on_side[images.start : images.stop]
            generations = np.arange(images.start, images.stop, dtype=np.int32)
            return self._assembler.rows(ordinal, step, runs, generations, on_side, self._id, self._origin)

        return read

    def _id(self, generation: int) -> str:
        return self.source.generations[generation].id

    def _origin(self, generation: int) -> str:
        known = self.source.generations[generation]
        return f"generation {known.id}" + (f" of {known.path}" if known.path else "")

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        draw = np.random.default_rng([self.seed, epoch])
        return draw.permutation(len(self._spans) * self._chunks * len(self._steps))

    def _common_tokens(self) -> int:
        """Tokens of an image. Raises FluxIRError for sites that have other ones."""
        counts = {site: self.source.tokens(stored) for site, stored in self._sites.items()}
        streams = {site: stored and stored.stream for site, stored in self._sites.items()}
        first = next(iter(counts))
        for site, count in counts.items():
            if (count, streams[site]) != (counts[first], streams[first]):
                raise _other_tokens(first, counts[first], site, count)
        return counts[first]

    def _row(self, site: SiteKey) -> TokenFormat:
        generation = int(np.flatnonzero(self._on_side)[0])
        run = self.source.read_run(range(generation, generation + 1), self._sites[site], self._steps[0], range(1))
        return TokenFormat(self.source.d(self._sites[site]), run.floats().dtype)


class StreamFeed:
    """A live stream: one epoch, in the order it comes. To resume, it is made again from its beginning."""

    repeats = False
    tokens_at_most = None
    layout = None
    content = None

    def __init__(self, blocks: Blocks, sites: Sequence[SiteKey], filters: Filters, split: Split, side: Side) -> None:
        self.blocks, self.side, self.split = blocks, side, split
        self._assembler = _Assembler(sites, filters, split, side)

    def reads(self, epoch: int, start: int = 0) -> Iterator[Read]:
        """Goes through the whole stream; blocks before number `start` are passed over."""
        numbers, ids = dict[str, int](), list[str]()
        for ordinal, blocks in enumerate(self._complete()):
            first = blocks[0]
            if first.generation not in numbers:
                numbers[first.generation] = len(ids)
                ids.append(first.generation)
            if ordinal < start:
                continue
            filters = self._assembler.filters
            runs = {block.site: run_of(block, filters.rows(block)) for block in blocks}
            generations = np.array([numbers[first.generation]], np.int32)
            rows = self._assembler.rows(
                ordinal, first.step, runs, generations, np.ones(1, np.bool_), ids.__getitem__, _origins(ids)
            )
            yield Read(ordinal, len(rows.is_text), lambda _, rows=rows: rows)  # type: ignore[misc]

    def _complete(self) -> Iterator[list[TokenBlock]]:
        """The blocks of all sites of one generation and step, as soon as the last of them has come."""
        sites, steps = self._assembler.sites, self._assembler.filters.steps
        waiting: dict[tuple[str, int], dict[SiteKey, TokenBlock]] = {}
        for block in self.blocks():
            trained_on = block.site in sites and (steps is None or block.step in steps)
            if not (trained_on and self.split.has(self.side, block.generation, block.prompt)):
                continue
            arrived = waiting.setdefault((block.generation, block.step), {})
            arrived[block.site] = block
            if len(arrived) == len(sites):
                del waiting[block.generation, block.step]
                yield [arrived[site] for site in sites]
            elif len(waiting) > _WAITING_BLOCKS:
                break
        if waiting:
            (generation, step), arrived = next(iter(waiting.items()))
            missing = ", ".join(str(site) for site in sites if site not in arrived)
            raise FluxIRError(
                f"a stream must give every site of a step: generation {generation} came without {missing} at step "
                f"{step}",
                hint="record all sites that are trained on",
            )


class _Assembler:
    """Makes rows of runs: checks that those of all sites are the same tokens, and finds the rows that are kept."""

    def __init__(self, sites: Sequence[SiteKey], filters: Filters, split: Split, side: Side) -> None:
        self.sites, self.filters, self.split, self.side = list(sites), filters, split, side

    def rows(
        self,
        ordinal: int,
        step: int,
        runs: Mapping[SiteKey, TokenRun],
        generations: NDArray[np.int32],
        on_side: NDArray[np.bool_],
        name: Callable[[int], str],
        origin: Callable[[int], str],
    ) -> BlockRows:
        """The rows of these runs, one per site, of `generations`, of which some are `on_side`: the side asked for.

        Raises FluxIRError unless all that they keep is finite.
        """
        first_site, first = next(iter(runs.items()))
        for site, run in runs.items():
            if run.positions is not first.positions and not torch.equal(run.positions, first.positions):
                raise _other_tokens(first_site, first.positions.shape[1], site, run.positions.shape[1])
        images, tokens = first.positions.shape
        is_text, every = _text_and_all(images, tokens, first.txt_tokens)
        rows = BlockRows(
            ordinal=ordinal,
            step=step,
            values={site: _flat(run.floats()) for site, run in runs.items()},
            generations=np.repeat(generations, tokens),
            is_text=is_text,
            kept=every,
            origin=origin,
        )
        masks = [None if on_side.all() else np.repeat(on_side, tokens), self._used(first)]
        masks.append(self._side(first, generations, name))
        rows = rows._replace(kept=_kept(rows.kept, masks))
        rows.check_finite()
        if self.filters.outlier_factor is not None:
            limited = [self.filters.within_limit(values, site, step) for site, values in rows.values.items()]
            rows = rows._replace(kept=_kept(rows.kept, [None if mask is None else mask.numpy() for mask in limited]))
        return rows

    def _used(self, run: TokenRun) -> NDArray[np.bool_] | None:
        used = self.filters.used(run)
        return None if used is None else used.flatten().numpy()

    def _side(
        self, run: TokenRun, generations: NDArray[np.int32], name: Callable[[int], str]
    ) -> NDArray[np.bool_] | None:
        """Which tokens are on the side, where the split is by tokens."""
        if self.split.by != "tokens":
            return None
        masks = []
        for generation, positions in zip(generations, run.positions, strict=True):
            mask = self.split.tokens(self.side, name(int(generation)), positions)
            masks.append(np.ones(len(positions), np.bool_) if mask is None else mask.numpy())
        return np.concatenate(masks)


@lru_cache(64)
def _text_and_all(images: int, tokens: int, txt_tokens: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows of a block are text, and all of its rows: the same for nearly every block, and read only."""
    return np.tile(np.arange(tokens) < txt_tokens, images), np.arange(images * tokens)


def _kept(kept: NDArray[np.int64], masks: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.int64]:
    for mask in masks:
        if mask is not None:
            kept = kept[mask[kept]]
    return kept


def _flat(values: Tensor) -> Tensor:
    return values.reshape(prod(values.shape[:-1]), values.shape[-1])


def _other_tokens(first: SiteKey, count: int, site: SiteKey, other: int) -> FluxIRError:
    """A token that is left out at one site is left out at all, so all must have the same ones."""
    return FluxIRError(
        f"sites that are trained on together must have the same tokens: {first} has {count} of them, {site} has "
        f"{other}",
        hint="train image and text sites in separate runs, or keep one stream of whole single blocks",
    )


def _spans(runs: Sequence[range], on_side: NDArray[np.bool_], *, most: int, gap: int) -> NDArray[np.int64]:
    """First and last (exclusive) image of every block: [blocks, 2].

    At most `most` images of one run, with no more than `gap` in a row between them that are not `on_side`.
    """
    starts = np.array([run.start for run in runs])
    index = np.flatnonzero(on_side)
    run = np.searchsorted(starts, index, side="right") - 1
    window = (index - starts[run]) // most
    new = (np.diff(run) != 0) | (np.diff(window) != 0) | (np.diff(index) > gap + 1)
    firsts = index[np.concatenate([[True], new])]
    lasts = index[np.concatenate([new, [True]])] + 1
    return np.stack([firsts, lasts], axis=1)


def _origins(ids: Sequence[str]) -> Callable[[int], str]:
    return lambda generation: f"generation {ids[generation]}"
