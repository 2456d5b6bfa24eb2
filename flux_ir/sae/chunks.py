"""Activations in the order they are trained on: chunks of one generation and step, all sites side by side.

Row i of every site of a chunk is the same token: same generation, step and place. So autoencoders for many sites share
one pass over the data. Next: `pool`, which mixes the rows.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.token_blocks import ReadsTogether, TokenBlock, TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sae.filters import Filters, SiteKey, check_finite
from flux_ir.sae.splits import Side, Split

# Steps of one generation that are read in a row: enough that opening a file is not what reading costs, few enough that
# a pool holds many generations.
RUN_BYTES = 2 * 2**20
_BYTES_IN_MEMORY = 2**28  # larger chunks are mapped, and moved to the pool a piece at a time
_AHEAD_BYTES = 64 * 2**20  # announced before they are read: enough that the disk never waits
_AHEAD_FILES = 120  # that stay open until they are read: fewer than a source keeps (`capture_source`)
_WAITING_CHUNKS = 1024  # of a stream, until their last site has come

Blocks = Callable[[], Iterator[TokenBlock]]
"""Begins a live stream anew: the same blocks in the same order every time."""


class Chunk(NamedTuple):
    """The tokens of one generation and step that may be trained on."""

    ordinal: int
    """Its place in the order of the epoch."""
    generation: int
    """Index among the source's generations; of a stream: in order of appearance."""
    step: int
    values: dict[SiteKey, Tensor]
    """[rows, d] for each site, of the data's own dtype."""
    is_text: NDArray[np.bool_]
    kept: NDArray[np.int64]
    """The rows that passed the filters, ascending."""
    place: object
    """Where it was read, as text: for messages."""

    def check_finite(self) -> None:
        """Raises FluxIRError if a row that is kept holds NaN or infinity."""
        whole = len(self.kept) == len(self.is_text)
        for site, values in self.values.items():
            rows = values if whole else values[torch.from_numpy(self.kept).to(values.device)]
            check_finite(rows, self.place, site, self.step)


@runtime_checkable
class Feed(Protocol):
    """Chunks of one side of a split, an epoch at a time."""

    repeats: bool
    """Whether there is a second epoch."""

    @property
    def tokens_at_most(self) -> int | None:
        """Tokens of an epoch before filters that look at tokens; None: unknown."""

    def chunks(self, epoch: int, start: int = 0, also: Sequence[int] = ()) -> Iterator[Chunk]:
        """The chunks of an epoch from number `start` on, and before them those earlier ones that `also` names."""


Place = tuple[int, int, int]
"""Ordinal, generation and step of a chunk."""


class _Assembler:
    """Makes chunks of blocks: picks rows, and sees to it that those of all sites are the same tokens."""

    def __init__(self, sites: Sequence[SiteKey], filters: Filters, split: Split, side: Side) -> None:
        self.sites, self.filters, self.split, self.side = list(sites), filters, split, side

    def chunk(self, ordinal: int, generation: int, blocks: Sequence[TokenBlock], place: object) -> Chunk:
        """The chunk of these blocks, one per site. Raises FluxIRError unless all that it keeps is finite."""
        first = blocks[0]
        rows = self.filters.rows(first)
        positions = first.positions[rows]
        for block in blocks[1:]:
            if block.positions is first.positions and block.txt_tokens == first.txt_tokens:
                continue
            other = block.positions[self.filters.rows(block)]
            if other.shape != positions.shape or not torch.equal(other, positions):
                raise FluxIRError(
                    f"sites that are trained on together must have the same tokens: {first.site} has "
                    f"{len(positions)} of them, {block.site} has {len(other)} in {place}",
                    hint="train image and text sites in separate runs, or keep one stream of whole single blocks",
                )
        is_text, every = _rows(len(first.positions), rows.start, rows.stop, first.txt_tokens)
        values = {block.site: block.floats()[self.filters.rows(block)] for block in blocks}
        chunk = Chunk(ordinal, generation, first.step, values, is_text, every, place)
        kept = chunk._replace(kept=self._kept(chunk, first, positions))
        kept.check_finite()
        return kept

    def _kept(self, chunk: Chunk, first: TokenBlock, positions: Tensor) -> NDArray[np.int64]:
        """A token that is left out at one site is left out at all."""
        masks = [self.split.tokens(self.side, first.generation, positions), self.filters.used(first)]
        if self.filters.outlier_factor is not None:
            chunk.check_finite()  # infinity would pass for an outlier
            masks += [self.filters.within_limit(values, site, chunk.step) for site, values in chunk.values.items()]
        given = [mask.numpy() for mask in masks if mask is not None]
        return np.flatnonzero(np.logical_and.reduce(given)) if given else chunk.kept


def _memory_bytes() -> int:
    """Of this machine; 0 where that is not told."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


@lru_cache(64)
def _rows(
    tokens: int, start: int | None, stop: int | None, txt_tokens: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows of a slice of a site's tokens are text, and all of these rows. The same for every chunk."""
    is_text = np.arange(tokens)[start:stop] < txt_tokens
    every = np.arange(len(is_text))
    is_text.flags.writeable = every.flags.writeable = False
    return is_text, every


class _PlaceOf:
    """Where a generation is kept. Made into text when it is asked for, which is hardly ever."""

    __slots__ = ("_generation", "_source")

    def __init__(self, source: TokenSource, generation: int) -> None:
        self._source, self._generation = source, generation

    def __str__(self) -> str:
        known = self._source.generations[self._generation]
        return str(known.path or known.id)


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
        *,
        page_cache: bool | None = None,
    ) -> None:
        """With `page_cache` files are left in the system's cache; None: if all fit into half of the memory, about."""
        self.source, self.seed = source, seed
        self._assembler = _Assembler(sites, filters, split, side)
        self._steps = filters.steps_of(source.steps)
        here = [i for i, one in enumerate(source.generations) if split.has(side, one.id, one.prompt)]
        self._generations = np.array(here, dtype=np.int32)
        if not here:
            raise FluxIRError(
                f"no generation of {len(source.generations)} is on the {side} side of the split",
                hint="hold out another share with --held_out, or capture more prompts",
            )
        fits = self._bytes_per_chunk <= _BYTES_IN_MEMORY
        self._together = source if isinstance(source, ReadsTogether) and fits else None
        nbytes = len(here) * len(self._steps) * self._bytes_per_chunk
        self._again = nbytes <= _memory_bytes() // 2 if page_cache is None else page_cache

    @property
    def tokens_at_most(self) -> int:
        """Exact where nothing is filtered."""
        site = self._assembler.sites[0]
        return len(self._generations) * len(self._steps) * self.source.tokens(site)

    def chunks(self, epoch: int, start: int = 0, also: Sequence[int] = ()) -> Iterator[Chunk]:
        """Reads chunks as they are asked for, while the disk is at work on those that follow."""
        generations, steps = self._order(epoch)
        places = (
            (ordinal, int(generations[ordinal]), int(steps[ordinal]))
            for ordinal in chain(also, range(start, len(generations)))
        )
        if self._together is None:
            return (self._read(*place) for place in places)
        return self._read_announced(places, self._together)

    def _read_announced(self, places: Iterator[Place], source: ReadsTogether) -> Iterator[Chunk]:
        """The disk is at work on those that follow; what nobody came to read is forgotten in the end."""
        announced, files = deque[Place](), Counter[int]()
        ahead = -(-_AHEAD_BYTES // max(self._bytes_per_chunk, 1))
        try:
            for place in places:
                source.announce(place[1], self._assembler.sites, place[2], again=self._again)
                announced.append(place)
                files[place[1]] += 1
                while len(announced) > ahead or len(files) > _AHEAD_FILES:
                    ordinal, generation, step = announced.popleft()
                    files[generation] -= 1
                    if not files[generation]:
                        del files[generation]
                    yield self._read(ordinal, generation, step)
            yield from (self._read(*place) for place in announced)
        finally:
            source.forget()

    def _read(self, ordinal: int, generation: int, step: int) -> Chunk:
        sites = self._assembler.sites
        if self._together is None:
            blocks = [self.source.read(generation, site, step) for site in sites]
        else:
            blocks = self._together.read_together(generation, sites, step)
        return self._assembler.chunk(ordinal, generation, blocks, _PlaceOf(self.source, generation))

    @property
    def _bytes_per_chunk(self) -> int:
        return sum(self.source.tokens(site) * self.source.d(site) * 2 for site in self._assembler.sites)

    def _order(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Generation and step of every chunk: runs of steps of one generation, shuffled."""
        run_steps = min(max(RUN_BYTES // max(self._bytes_per_chunk, 1), 1), len(self._steps))
        runs_each = -(-len(self._steps) // run_steps)
        draw = np.random.default_rng([self.seed, epoch])
        runs = draw.permutation(len(self._generations) * runs_each)
        index = (runs % runs_each)[:, None] * run_steps + np.arange(run_steps)
        exists = index < len(self._steps)
        generations = np.broadcast_to(self._generations[runs // runs_each][:, None], index.shape)[exists]
        return generations, np.array(self._steps, dtype=np.int32)[index[exists]]


class StreamFeed:
    """A live stream: in the order it comes, one epoch. What was before is had again by beginning anew."""

    repeats = False
    tokens_at_most = None

    def __init__(self, blocks: Blocks, sites: Sequence[SiteKey], filters: Filters, split: Split, side: Side) -> None:
        self.blocks, self.side, self.split = blocks, side, split
        self._assembler = _Assembler(sites, filters, split, side)

    def chunks(self, epoch: int, start: int = 0, also: Sequence[int] = ()) -> Iterator[Chunk]:
        """Goes through the whole stream; chunks that are not asked for are passed over."""
        wanted, numbers = frozenset(also), dict[str, int]()
        for ordinal, blocks in enumerate(self._complete()):
            generation = numbers.setdefault(blocks[0].generation, len(numbers))
            if ordinal >= start or ordinal in wanted:
                yield self._assembler.chunk(ordinal, generation, blocks, f"generation {blocks[0].generation}")

    def _complete(self) -> Iterator[list[TokenBlock]]:
        """The blocks of all sites of one generation and step, as soon as the last of them has come."""
        sites, steps = self._assembler.sites, self._assembler.filters.steps
        waiting: dict[tuple[str, int], dict[SiteKey, TokenBlock]] = {}
        for block in self.blocks():
            wanted = block.site in sites and (steps is None or block.step in steps)
            if not (wanted and self.split.has(self.side, block.generation, block.prompt)):
                continue
            found = waiting.setdefault((block.generation, block.step), {})
            found[block.site] = block
            if len(found) == len(sites):
                del waiting[block.generation, block.step]
                yield [found[site] for site in sites]
            elif len(waiting) > _WAITING_CHUNKS:
                break
        if waiting:
            (generation, step), found = next(iter(waiting.items()))
            missing = ", ".join(str(site) for site in sites if site not in found)
            raise FluxIRError(
                f"a stream must give every site of a step: generation {generation} came without {missing} at step "
                f"{step}",
                hint="record all sites that are trained on",
            )
