"""Batches of tokens to train on, mixed in a shuffle buffer: every token once an epoch, in an order the seed sets.

A buffer holds many batches of tokens. It is filled by reading blocks in the order of the epoch
(`feed`), each row straight into the position it has in the batches, which a permutation of the
buffer's rows says. While its batches are given out the next buffer is filled. So rows move once, and
the state is small: where the buffer begins in the order of the blocks, and how many of its tokens were
given out. Resuming reads one buffer again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

import torch

from flux_ir.activations.blocks import TokenSource
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.buffer import Batch, Buffer, Filler, Start, slot_bytes
from flux_ir.sae.data.feed import BLOCK_BYTES, SITE_BYTES, Blocks, Feed, SourceFeed, StreamFeed, TokenFormat
from flux_ir.sae.data.filters import Filters, SiteKey
from flux_ir.sae.data.splits import Side, Split

BUFFERS = 2  # one is given out while the other is filled
_LEAST_BATCHES = 2  # of a buffer that does not hold all of the data
_LEAST_BLOCKS = 32  # of a full buffer: a batch draws from as many
_LEAST_ROWS = 8  # of a block, however small the buffer


class TokenBatches:
    """An iterator of batches from stored activations, or from a live stream that can be started again.

    The last batch of an epoch is shorter where tokens do not divide; with `max_tokens`, so is the
    last of all. Process r of W gets rows r * n / W to (r + 1) * n / W of each batch, and reads all of
    the data for it. `with` or `close` ends the threads.

    `pool_bytes` are those of both buffers. With `page_cache` what is read stays in the system's
    cache; None: if the data fit into half of the memory, about.
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
        self.max_tokens = max_tokens
        self.feed: Feed
        if callable(source):
            self.feed = StreamFeed(source, sites, filters, split, side)
            if (epochs or 1) > 1:
                raise FluxIRError(
                    f"a live stream is one epoch long: got {epochs} epochs",
                    hint="give more prompts, or collect them first",
                )
        else:
            self.feed = feed = SourceFeed(source, sites, filters, split, side, seed)
            rows = _capacity(pool_bytes, batch_tokens, feed.tokens_at_most, feed.layout)
            feed.cut(max(rows // _LEAST_BLOCKS, _LEAST_ROWS))
            # Past the page cache (O_DIRECT) a GB costs 0.14 s of CPU time, and 0.21 s through it; but what fits into it
            # is read from the disk once for all epochs, and once for all ranks of a machine.
            if page_cache is None:
                page_cache = self.ranks.world_size > 1 or feed.nbytes <= _memory_bytes() // 2
        self.epochs = epochs if epochs or max_tokens else 1
        self.tokens = 0
        """Tokens of all batches so far, of all processes together."""
        self._settings = {
            "sites": [str(site) for site in sites],
            "seed": seed,
            "batch_tokens": batch_tokens,
            "pool_bytes": pool_bytes,
            "block_bytes": [SITE_BYTES, BLOCK_BYTES],
            "tokens": self.feed.tokens_at_most,
            "side": side,
            "split": [split.by, split.threshold, split.run_tokens],
            "stream": filters.stream,
            "steps": None if filters.steps is None else sorted(filters.steps),
            "padding": filters.padding,
            "limits": filters.outlier_factor and sorted((str(s), step, x) for (s, step), x in filters.limits.items()),
        }
        capacity = partial(_capacity, pool_bytes, batch_tokens, self.feed.tokens_at_most)
        self._filler = Filler(
            self.feed, seed, capacity, self.device, prefetch=prefetch, page_cache=page_cache is not False
        )
        self._start = Start()
        self._buffer: Buffer | None = None
        self._given = 0  # rows of the buffer that were given out
        self._next: Future[Buffer] | None = None
        self._ended = False

    @property
    def epoch(self) -> int:
        """The number of the epoch the last batch is of."""
        return self._start.epoch

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
        most = self.batch_tokens if self.max_tokens is None else min(self.batch_tokens, self.max_tokens - self.tokens)
        if most < 1 or (buffer := self._buffer_with_rows()) is None:
            self.close()
            raise StopIteration
        first, last = self._given, min(self._given + most, buffer.rows)
        n, rank, world_size = last - first, self.ranks.rank, self.ranks.world_size
        batch = buffer.batch(first + rank * n // world_size, first + (rank + 1) * n // world_size)
        if first and self._next is None:  # after the first batch: the buffer before is likely to be free by then
            self._prefetch(buffer)
        self._given = last
        self.tokens += n
        return batch

    def __enter__(self) -> "TokenBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the prefetch. Batches that were given out stay valid."""
        self._filler.close()
        self._next = None

    def state(self) -> dict[str, Any]:
        """The position in the data, as JSON can say it."""
        start, taken = self._start, self._given
        if self._buffer is not None and taken == self._buffer.rows and self._buffer.end is not None:
            start, taken = self._buffer.end, 0
        content = {"content": self.feed.content}
        return {
            "settings": json.dumps(self._settings | content),
            "tokens": self.tokens,
            "start": list(start),
            "taken": taken,
            "ended": self._ended,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state: the following batches are those that would have followed, bit for bit.

        The buffer is read again; a stream is made once more up to it. Raises FluxIRError if the state is of other data
        or of other settings.
        """
        _check_same(json.loads(state["settings"]), self._settings | {"content": self.feed.content})
        self.close()
        self._buffer, self._next = None, None
        self._start, self._given = Start(*state["start"]), state["taken"]
        self.tokens, self._ended = state["tokens"], state["ended"]

    def _buffer_with_rows(self) -> Buffer | None:
        """The buffer that the next batch is of; None: all epochs are over."""
        while not self._ended:
            if self._buffer is None:
                self._buffer = self._filled(self._start)
            buffer = self._buffer
            if self._given < buffer.rows:
                return buffer
            if self._given > buffer.rows:
                raise FluxIRError(
                    f"the data end before the position that was saved: a buffer has {buffer.rows} tokens, of which "
                    f"{self._given} were given out",
                    hint="give the same model and the same prompts as before",
                )
            if not buffer.rows and not buffer.start.buffer:
                raise FluxIRError(
                    "there are no tokens to train on: the filters left none",
                    hint="check --stream, the prompts, the split and the outlier factor",
                )
            following = self._following(buffer)
            if following is None:
                self._ended = True
                return None
            self._start, self._given, self._buffer = following, 0, None
        return None

    def _following(self, buffer: Buffer) -> Start | None:
        """Where the buffer after this one begins; None: there is none."""
        if buffer.end is not None:
            return buffer.end
        epoch = buffer.start.epoch + 1
        more = self.feed.repeats and (self.epochs is None or epoch < self.epochs)
        return Start(epoch) if more else None

    def _filled(self, start: Start) -> Buffer:
        if self._next is None:
            self._next = self._filler.fill(start)
        try:
            return self._next.result()
        finally:
            self._next = None

    def _prefetch(self, buffer: Buffer) -> None:
        following = self._following(buffer)
        enough = self.max_tokens is not None and self.tokens + buffer.rows - self._given >= self.max_tokens
        if following is not None and not enough and self._filler.prefetch:
            self._next = self._filler.fill(following)


def _capacity(pool_bytes: int, batch_tokens: int, tokens: int | None, layout: Mapping[SiteKey, TokenFormat]) -> int:
    """Tokens of a buffer: whole batches, as many as half of `pool_bytes` hold, or all `tokens` there are."""
    room = pool_bytes // BUFFERS // slot_bytes(layout)
    if tokens is not None and tokens <= room:
        return tokens
    if room < _LEAST_BATCHES * batch_tokens:
        least = BUFFERS * _LEAST_BATCHES * batch_tokens
        raise FluxIRError(
            f"the shuffle buffers must hold {BUFFERS * _LEAST_BATCHES} batches, or all of the data twice: "
            f"{pool_bytes} bytes hold {BUFFERS * room} tokens of {len(layout)} sites",
            hint=f"pass --pool_gb {least * slot_bytes(layout) / 1e9:.3g} or more, or smaller batches",
        )
    return room // batch_tokens * batch_tokens


def _memory_bytes() -> int:
    """The memory of this machine [bytes]; 0 where the system does not say."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises FluxIRError that names each setting in which a saved position differs from the present data."""
    now = json.loads(json.dumps(now))
    different = [f"{name} was {saved.get(name)} and is {now[name]}" for name in now if saved.get(name) != now[name]]
    if different:
        raise FluxIRError(
            f"the position in the data was saved with other data or settings: {'; '.join(different)}",
            hint="resume with the settings and the captures of the first run",
        )


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
