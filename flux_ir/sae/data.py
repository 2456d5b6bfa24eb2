"""Batches of tokens to train on, shuffled through a bounded pool: every token once an epoch, in an order the seed sets.

Reading is sequential (`chunks`), a thread reads ahead (`loading`), mixing happens in memory (`pool`). A batch is drawn
evenly from all slots but those that are being refilled after the two batches before it: which these are is known in
advance, so neither the thread nor the number of processes changes any batch.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flux_ir.activations.token_blocks import TokenSource
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.choosing import choose_sites, sites_in_lockstep
from flux_ir.sae.chunks import Blocks, Chunk, Feed, SourceFeed, StreamFeed
from flux_ir.sae.data_settings import check_same_settings, settings_text
from flux_ir.sae.filters import Filters, SiteKey
from flux_ir.sae.loading import Loader, already, refill_pool
from flux_ir.sae.pool import Batch, Pool, Row, Slots, free_slots, slot_bytes
from flux_ir.sae.splits import Side, Split

__all__ = ["Batch", "TokenBatches", "choose_sites", "sites_in_lockstep"]

AHEAD = 2
"""Batches whose slots may still be being refilled while the next is drawn."""
_LEAST_BATCHES = AHEAD + 2  # in a pool that does not hold all of the data
_NOTHING = np.empty(0, np.int64)


class _Refill(NamedTuple):
    """Slots that a batch left, and how many of them have been filled again."""

    slots: Slots
    filled: Future[int]


class TokenBatches:
    """An iterator of batches from stored activations, or from a live stream that can be begun anew.

    A batch is a drawing without replacement. The last batch of an epoch is shorter where tokens do not divide; with
    `max_tokens`, so is the last of all. Process r of W gets rows r * n / W to (r + 1) * n / W of each batch, and reads
    all of the data for it. `with` or `close` ends the thread that reads ahead. `page_cache`: see `chunks.SourceFeed`.
    """

    def __init__(
        self,
        source: TokenSource | Blocks,
        sites: Sequence[SiteKey],
        *,
        batch_tokens: int,
        pool_bytes: int,
        seed: int = 0,
        filters: Filters | None = None,
        split: Split | None = None,
        side: Side = "training",
        epochs: int | None = None,
        max_tokens: int | None = None,
        ranks: Ranks | None = None,
        device: torch.device | str = "cpu",
        prefetch: bool = True,
        page_cache: bool | None = None,
    ) -> None:
        filters, split = filters or Filters(), split or Split("prompt", 0.0)
        self.ranks, self.device = ranks or Ranks(), torch.device(device)
        _check_numbers(sites, batch_tokens, epochs, max_tokens, self.ranks)
        self.sites, self.batch_tokens, self.pool_bytes, self.seed = list(sites), batch_tokens, pool_bytes, seed
        self.max_tokens, self.prefetch = max_tokens, prefetch
        self.feed: Feed
        if callable(source):
            self.feed = StreamFeed(source, sites, filters, split, side)
        else:
            if self.ranks.world_size > 1:  # all of them read the same files
                page_cache = True
            self.feed = SourceFeed(source, sites, filters, split, side, seed, page_cache=page_cache)
        if not self.feed.repeats and (epochs or 1) > 1:
            raise FluxIRError(
                f"a live stream is one epoch long: got {epochs} epochs", hint="give more prompts, or collect them first"
            )
        self.epochs = epochs if epochs or max_tokens else 1
        self.tokens = 0
        """Tokens of all batches so far, of all processes together."""
        self.epoch = 0
        self._settings = settings_text(
            sites=self.sites,
            seed=seed,
            batch_tokens=batch_tokens,
            pool_bytes=pool_bytes,
            tokens=self.feed.tokens_at_most,
            filters=filters,
            split=split,
            side=side,
        )
        self._batch_of_epoch = 0
        self._pool: Pool | None = None
        self._loader: Loader | None = None
        self._refills: deque[_Refill] = deque()
        self._rest: Slots | None = None  # once the epoch is read to its end: the slots to empty, in order

    @property
    def tokens_at_most(self) -> int | None:
        """Tokens of the whole run: exact, unless tokens are filtered by padding or length. None: unknown."""
        each, epochs = self.feed.tokens_at_most, self.epochs if self.feed.repeats else 1
        total = None if each is None or epochs is None else each * epochs
        given = [count for count in (total, self.max_tokens) if count is not None]
        return min(given, default=None)

    def __iter__(self) -> "TokenBatches":
        return self

    def __next__(self) -> Batch:
        wanted = self.batch_tokens if self.max_tokens is None else min(self.batch_tokens, self.max_tokens - self.tokens)
        slots = self._next_slots(wanted) if wanted else _NOTHING
        if not len(slots):
            self.close()
            raise StopIteration
        n, rank, world_size = len(slots), self.ranks.rank, self.ranks.world_size
        pool, loader = self._opened()
        batch = pool.take(slots[rank * n // world_size : (rank + 1) * n // world_size])
        if self._rest is None:
            self._refills.append(_Refill(slots, loader.fill(slots)))
        self.tokens += n
        self._batch_of_epoch += 1
        return batch

    def __enter__(self) -> "TokenBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends reading ahead. Batches that were given out stay valid."""
        if self._loader is not None:
            self._loader.close()

    def state(self) -> dict[str, Any]:
        """Where the iterator is: numbers, a text, and tensors, 8 bytes for each slot of the pool.

        `restore` reads the tokens again, from the chunks they came from; a stream is made once more up to this point.
        """
        filled = [refill.filled.result() for refill in self._refills]
        state = {"settings": self._settings, "tokens": self.tokens, "epoch": self.epoch}
        if self._pool is None or self._loader is None:
            return state
        ordinal, offset = self._loader.cursor
        return state | {
            "batch_of_epoch": self._batch_of_epoch,
            "chunk": ordinal,
            "offset": offset,
            "chunk_of_slot": torch.from_numpy(self._pool.chunk_of_slot.copy()),
            "row_of_slot": torch.from_numpy(self._pool.row_of_slot.copy()),
            "refills": [torch.from_numpy(refill.slots.copy()) for refill in self._refills],
            "refilled": filled,
            "rest": None if self._rest is None else torch.from_numpy(self._rest.copy()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state: the following batches are those that would have followed, bit for bit.

        Raises FluxIRError if the state is of other data or of other settings.
        """
        check_same_settings(state["settings"], self._settings)
        self.close()
        self._pool = self._loader = self._rest = None
        self._refills.clear()
        self.tokens, self.epoch = state["tokens"], state["epoch"]
        self._batch_of_epoch = state.get("batch_of_epoch", 0)
        if "chunk" not in state:
            return
        if state["rest"] is not None:
            self._rest = state["rest"].numpy().copy()
        for slots, filled in zip(state["refills"], state["refilled"], strict=True):
            self._refills.append(_Refill(slots.numpy().copy(), already(filled)))
        self._reload(state)

    def _reload(self, state: dict[str, Any]) -> None:
        """Read again what the pool held, and open the feed where it was."""
        chunk_of_slot, row_of_slot = (state[name].numpy() for name in ("chunk_of_slot", "row_of_slot"))
        needed = np.flatnonzero(chunk_of_slot >= 0) if self._rest is None else np.sort(self._rest)
        slots_of = _by_value(needed, chunk_of_slot[needed])
        earlier = [ordinal for ordinal in slots_of if ordinal < state["chunk"]]
        chunks = self.feed.chunks(self.epoch, state["chunk"], earlier)
        loading = None
        for chunk in chunks:
            pool = self._pool = self._pool or self._new_pool(chunk)
            if chunk.ordinal in slots_of:
                slots = slots_of.pop(chunk.ordinal)
                refill_pool(pool, chunk, slots, row_of_slot[slots])
            if chunk.ordinal >= state["chunk"]:
                loading = chunk
                break
        if slots_of:
            raise FluxIRError(
                f"the stream ended before the place it was saved at: {len(slots_of)} blocks are missing",
                hint="give the same model and the same prompts as before",
            )
        if self._pool is not None:
            self._loader = Loader(self._pool, loading, chunks, offset=state["offset"], prefetch=self.prefetch)

    def _next_slots(self, wanted: int) -> Slots:
        """The slots of the next batch, as many as wanted unless the epoch ends; none at the end of all."""
        if self._loader is None and self._rest is None:
            self._begin_epoch()
        while self._rest is None and len(self._refills) > AHEAD:
            oldest = self._refills.popleft()
            if oldest.filled.result() < len(oldest.slots):
                self._end_reading()
        if self._rest is None:
            return self._draw(wanted)
        if not len(self._rest) and self._end_epoch():
            return self._next_slots(wanted)
        slots, self._rest = self._rest[:wanted], self._rest[wanted:]
        return slots

    def _draw(self, wanted: int) -> Slots:
        """A batch of slots, evenly from all that are not being refilled."""
        pool, _ = self._opened()
        busy = np.concatenate([refill.slots for refill in self._refills] or [_NOTHING])
        picks = self._generator().choice(pool.capacity - len(busy), wanted, replace=False)
        return free_slots(pool.capacity, busy, picks)

    def _begin_epoch(self) -> None:
        chunks = self.feed.chunks(self.epoch)
        first = next(chunks, None)
        if first is None:
            raise FluxIRError("there are no tokens to train on", hint="check the steps, the prompts and the split")
        self._pool = self._pool or self._new_pool(first)
        self._loader = Loader(self._pool, first, chunks, prefetch=self.prefetch)
        self._batch_of_epoch = 0
        for start in range(0, self._pool.capacity, self.batch_tokens):
            slots = np.arange(start, min(start + self.batch_tokens, self._pool.capacity))
            if self._loader.fill(slots).result() < len(slots):
                self._pool.chunk_of_slot[start + len(slots) :] = -1
                break
        # a pool that holds all of the data may be too small to draw from while slots are refilled
        if self._pool.chunk_of_slot[-1] < 0 or self._pool.capacity == self.feed.tokens_at_most:
            self._end_reading()
        if self._rest is not None and not len(self._rest):
            raise FluxIRError(
                "there are no tokens to train on: the filters left none", hint="check --stream and the outlier factor"
            )

    def _end_reading(self) -> None:
        """All of the epoch has been read: what is in the pool comes in one last shuffled order."""
        pool, _ = self._opened()
        for refill in self._refills:
            refill.filled.result()
        self._refills.clear()
        self._rest = self._generator().permutation(np.flatnonzero(pool.chunk_of_slot >= 0))

    def _end_epoch(self) -> bool:
        """Whether there is another epoch."""
        self.close()
        if not self.feed.repeats or (self.epochs is not None and self.epoch + 1 >= self.epochs):
            return False
        self.epoch += 1
        self._loader = self._rest = None
        return True

    def _generator(self) -> np.random.Generator:
        """Depends on the place in the data alone, so no state of it needs to be kept."""
        return np.random.default_rng([self.seed, self.epoch, self._batch_of_epoch, 1])

    def _opened(self) -> tuple[Pool, Loader]:
        assert self._pool is not None
        assert self._loader is not None
        return self._pool, self._loader

    def _new_pool(self, first: Chunk) -> Pool:
        """As many slots as `pool_bytes` allow, and no more than there are tokens."""
        rows = {site: Row(values.shape[1], values.dtype) for site, values in first.values.items()}
        room, tokens = self.pool_bytes // slot_bytes(rows), self.feed.tokens_at_most
        least = _LEAST_BATCHES * self.batch_tokens
        if room < min(least, least if tokens is None else tokens):
            raise FluxIRError(
                f"the shuffle pool must hold {_LEAST_BATCHES} batches, or all of the data: {self.pool_bytes} bytes "
                f"hold {room} tokens of {len(rows)} sites",
                hint=f"pass --pool_gb {least * slot_bytes(rows) / 1e9:.3g} or more, or smaller batches",
            )
        return Pool(rows, room if tokens is None else min(room, tokens), self.device)


def _by_value(slots: Slots, values: NDArray[np.int32]) -> dict[int, Slots]:
    """The slots of each value, by ascending value."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    ends = [*starts[1:].tolist(), len(slots)]
    return {int(value): slots[order[a:b]] for value, a, b in zip(found, starts.tolist(), ends, strict=False)}


def _check_numbers(
    sites: Sequence[SiteKey], batch_tokens: int, epochs: int | None, max_tokens: int | None, ranks: Ranks
) -> None:
    if not sites:
        raise FluxIRError("there must be a site to train on: got none", hint="name one with --site")
    for name, number in (("epochs", epochs), ("max_tokens", max_tokens)):
        if number is not None and number < 1:
            raise FluxIRError(f"{name} must be at least 1: got {number}", hint=f"leave --{name} out for one epoch")
    if batch_tokens < ranks.world_size:
        raise FluxIRError(
            f"a batch must have a token for each of {ranks.world_size} processes: got {batch_tokens}",
            hint="a few thousand tokens are usual",
        )
