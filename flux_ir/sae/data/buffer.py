"""Buffers of tokens in the order of their batches, and what fills them.

A buffer's rows have the order that a permutation says, so a row is written once, from the memory its
block was read into straight to where its batch will be. Several threads read blocks; which rows go
where depends on the counts of the blocks before, which each hands to the next, and never on who was
first.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.spans import Memory
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.feed import BlockRows, Feed, Read, TokenFormat
from flux_ir.sae.data.filters import SiteKey
from flux_ir.sae.kernels.spare_memory import SpareMemory

READERS = 3  # threads that read blocks: some wait for the disk while others check and move rows
_SPARE = 2  # buffers whose memory waits to be used again

# What is known of a row of a buffer. Written as one word: in random order one access costs less than three.
_ROW_FACTS = np.dtype([("generation", np.int32), ("step", np.int16), ("is_text", np.bool_)], align=True)
_Words = NDArray[Any]
_T = TypeVar("_T")


class Batch(NamedTuple):
    """Tokens in random order, the same ones for every site."""

    values: dict[SiteKey, Tensor]
    """[n, d] for each site, of the data's own dtype (float8 becomes bfloat16).

    On a CPU these may be views, which keep the memory of their whole buffer from being used again.
    """
    steps: Tensor
    """int16 [n]."""
    is_text: Tensor
    """bool [n]."""
    generations: Tensor
    """int32 [n]: index among the source's generations; of a stream: in order of appearance."""


class Start(NamedTuple):
    """Where a buffer begins: its number in the epoch, a block, and how many of the block's kept rows went before."""

    epoch: int = 0
    buffer: int = 0
    block: int = 0
    offset: int = 0


def slot_bytes(layout: Mapping[SiteKey, TokenFormat]) -> int:
    """Bytes of memory that one token of every site takes in a buffer."""
    return sum(row.nbytes for row in layout.values()) + _ROW_FACTS.itemsize


class Buffer:
    """Tokens of all sites in memory, in the order of their batches. Without values it is empty."""

    def __init__(self, start: Start, values: Mapping[SiteKey, Tensor], slots: NDArray[np.int64]) -> None:
        self.start = start
        self.end: Start | None = None
        """Where the next one of the epoch begins; None: this is the last."""
        self.rows = 0
        self._values, self._slots = values, slots
        self._words = {site: _words(tensor) for site, tensor in values.items() if tensor.device.type == "cpu"}
        self._facts = np.zeros(len(slots), _ROW_FACTS)
        self._order: NDArray[np.int64] | None = None

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return len(self._slots)

    def put(self, first: int, rows: BlockRows, kept: NDArray[np.int64]) -> None:
        """Write the `kept` rows of a block: `first` is how many rows of the buffer were read before them."""
        slots, whole = self._slots[first : first + len(kept)], len(kept) == len(rows.is_text)
        facts = np.empty(len(kept), _ROW_FACTS)
        facts["step"] = rows.step
        facts["generation"] = rows.generations if whole else rows.generations[kept]
        facts["is_text"] = rows.is_text if whole else rows.is_text[kept]
        _as_words(self._facts)[slots] = _as_words(facts)
        for site, values in rows.values.items():
            self._check_fits(site, values, rows)
            if site in self._words:
                words = _words(values.detach().cpu().contiguous())
                self._words[site][slots] = words if whole else words[kept]
            else:
                buffer = self._values[site]
                taken = values.detach() if whole else values.detach()[torch.from_numpy(kept).to(values.device)]
                buffer.index_copy_(0, torch.from_numpy(slots).to(buffer.device), taken.to(buffer.device))

    def finish(self, rows: int) -> None:
        """So many rows have come. Those of a buffer that is not full are given out in the order of their slots."""
        self.rows = rows
        if rows < self.capacity:
            self._order = np.sort(self._slots[:rows])

    def batch(self, first: int, last: int) -> Batch:
        """Rows `first` to `last` (exclusive) in the order of batches."""
        rows = slice(first, last) if self._order is None else self._order[first:last]
        facts, device = self._facts[rows], next(iter(self._values.values())).device
        columns = (torch.from_numpy(facts[field].copy()).to(device) for field in ("step", "is_text", "generation"))
        return Batch({site: _rows_of(values, rows) for site, values in self._values.items()}, *columns)

    def _check_fits(self, site: SiteKey, values: Tensor, rows: BlockRows) -> None:
        buffer = self._values[site]
        if values.shape[1] != buffer.shape[1] or values.dtype != buffer.dtype:
            raise FluxIRError(
                f"all tokens of {site or 'the array'} must be {buffer.dtype} and {buffer.shape[1]} wide: got "
                f"{values.dtype} and {values.shape[1]} in {rows.origin(int(rows.generations[0]))}",
                hint="keep captures of different models and dtypes in different folders",
            )


class _Block(NamedTuple):
    """A block that is to be placed, and how many of the rows it keeps are in the buffers before."""

    read: Read
    skip: int

    @property
    def most_rows(self) -> int:
        """Rows that are to be placed, at most."""
        return self.read.most_rows - self.skip


class _Placing(NamedTuple):
    """A block on its way into a buffer."""

    block: _Block
    end: "Future[int]"
    """How many rows the buffer has with it: known before they are moved."""
    kept: "Future[int]"
    """How many rows it has to place: known when those that there is room for are moved."""


class Filler:
    """Fills buffers, one after the other: on a thread that lets others read blocks, or on the caller's own.

    `capacity` says how many rows a buffer has, by what they are.
    """

    def __init__(
        self,
        feed: Feed,
        seed: int,
        capacity: Callable[[Mapping[SiteKey, TokenFormat]], int],
        device: torch.device,
        *,
        prefetch: bool,
        page_cache: bool,
    ) -> None:
        self.feed, self.seed, self.capacity, self.device = feed, seed, capacity, device
        self.prefetch, self.page_cache = prefetch, page_cache
        self._layout = feed.layout
        self._spare: dict[SiteKey, SpareMemory] = defaultdict(lambda: SpareMemory(_SPARE))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._per_thread = threading.local()
        self._threads: list[ThreadPoolExecutor] = []
        self._closing = False
        self._begin(-1, iter(()))

    def fill(self, start: Start) -> "Future[Buffer]":
        """Begin to fill a buffer. They are filled in the order they are asked for."""
        if self.prefetch and not self._threads:
            self._threads = [ThreadPoolExecutor(n, thread_name_prefix="tokens") for n in (1, READERS)]
        return self._run(0, lambda: self._fill(start))

    def close(self) -> None:
        """Ends the threads, and what makes a stream. It can be resumed from any start."""
        self._closing = True
        for threads in self._threads:
            threads.shutdown(wait=True, cancel_futures=True)
        if isinstance(self._reads, Generator):
            self._reads.close()
        self._threads, self._closing = [], False
        self._begin(-1, iter(()))

    def _begin(self, epoch: int, reads: Iterator[Read]) -> None:
        self._epoch, self._reads = epoch, reads
        self._unplaced: deque[_Block] = deque()

    def _run(self, number: int, work: Callable[[], _T]) -> "Future[_T]":
        if self._threads:
            return self._threads[number].submit(work)
        done: Future[_T] = Future()
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 (raised where the result is asked for, as a thread does)
            done.set_exception(error)
        return done

    def _fill(self, start: Start) -> Buffer:
        if self._epoch != start.epoch:
            self._begin(start.epoch, self.feed.reads(start.epoch, start.block))
            if (read := next(self._reads, None)) is not None:
                self._unplaced.append(_Block(read, start.offset))
        buffer = self._new_buffer(start)
        placing, rest, ordinal = deque[_Placing](), list[_Block](), start.block
        rows = possible = 0  # that are placed, and that those on their way may add
        while rows < buffer.capacity and not self._closing:
            # no more blocks than may have room: one that has none is read once more, for the next buffer
            while len(placing) <= READERS and rows + possible < buffer.capacity and (block := self._next_block()):
                placing.append(self._place(block, buffer, placing[-1].end if placing else _resolved(rows)))
                possible += block.most_rows
            if not placing:
                break
            block, _, kept = placing.popleft()
            placed, ordinal = min(kept.result(), buffer.capacity - rows), block.read.ordinal + 1
            rows, possible = rows + placed, possible - block.most_rows
            if placed < kept.result():
                rest.append(_Block(block.read, block.skip + placed))
        wait([late.kept for late in placing])  # who reads for a buffer is done before it is given out
        self._unplaced.extendleft(reversed([*rest, *(late.block for late in placing)]))
        if rows and rows == buffer.capacity:
            first = self._unplaced[0] if self._unplaced else None
            block_and_offset = (ordinal, 0) if first is None else (first.read.ordinal, first.skip)
            buffer.end = Start(start.epoch, start.buffer + 1, *block_and_offset)
        buffer.finish(rows)
        return buffer

    def _next_block(self) -> _Block | None:
        if self._unplaced:
            return self._unplaced.popleft()
        read = next(self._reads, None)
        return None if read is None else _Block(read, 0)

    def _place(self, block: _Block, buffer: Buffer, before: "Future[int]") -> _Placing:
        """Begin to read a block and to move its rows behind those of the blocks `before`."""
        end: Future[int] = Future()

        def place() -> int:
            try:
                rows = block.read.rows(self._memories())
                kept = rows.kept[block.skip :]
                start = before.result()
            except BaseException as error:
                end.set_exception(error)
                raise
            count = min(len(kept), buffer.capacity - start)
            # The next block learns its first row before these rows move: no batch depends on which thread is first.
            end.set_result(start + count)
            if count:
                with torch.cuda.stream(self._copies):
                    buffer.put(start, rows, kept[:count])
                if self._copies is not None:
                    self._copies.synchronize()  # what is copied from is overwritten after this
            return len(kept)

        return _Placing(block, end, self._run(1, place))

    def _memories(self) -> Mapping[SiteKey, Memory]:
        """What this thread reads into, for each site."""
        if not hasattr(self._per_thread, "memories"):
            self._per_thread.memories = {site: Memory(page_cache=self.page_cache) for site in self.feed.layout or {}}
        memories: Mapping[SiteKey, Memory] = self._per_thread.memories
        return memories

    def _new_buffer(self, start: Start) -> Buffer:
        """An empty buffer with its order; without room where there is no block left."""
        if (block := self._next_block()) is None:
            return Buffer(start, {}, np.empty(0, np.int64))
        self._unplaced.appendleft(block)
        if self._layout is None:  # a stream: its blocks are in memory already
            values = block.read.rows({}).values
            self._layout = {site: TokenFormat(rows.shape[1], rows.dtype) for site, rows in values.items()}
        capacity, most = self.capacity(self._layout), self.feed.tokens_at_most
        if most is not None:  # the last buffer of an epoch has no more rows than are left
            capacity = min(capacity, most - start.buffer * capacity)
        slots = np.random.default_rng([self.seed, start.epoch, start.buffer, 1]).permutation(capacity)
        with torch.cuda.stream(self._copies):
            values = {site: self._tensor(site, capacity, row) for site, row in self._layout.items()}
        return Buffer(start, values, slots)

    def _tensor(self, site: SiteKey, rows: int, row: TokenFormat) -> Tensor:
        """Uninitialised memory [rows, d]."""
        if self.device.type != "cpu":
            return torch.empty(rows, row.d, dtype=row.dtype, device=self.device)
        return self._spare[site].empty((rows, row.d), row.dtype)


def _rows_of(values: Tensor, rows: slice | NDArray[np.int64]) -> Tensor:
    """Rows of a buffer: on a CPU a view where they lie in order; on a GPU a copy, which costs nothing there."""
    if values.device.type == "cpu":
        return values[rows] if isinstance(rows, slice) else values[torch.from_numpy(rows)]
    if values.device.type == "cuda":
        values.record_stream(torch.cuda.current_stream(values.device))
    return values[rows].clone() if isinstance(rows, slice) else values[torch.from_numpy(rows).to(values.device)]


def _resolved(count: int) -> "Future[int]":
    done: Future[int] = Future()
    done.set_result(count)
    return done


def _words(values: Tensor) -> _Words:
    """The bytes of tokens [n, d] as n wide words: NumPy moves them four times as fast as PyTorch, without the GIL."""
    return _as_words(values.view(torch.uint8).numpy())


def _as_words(values: NDArray[Any]) -> _Words:
    width = values.dtype.itemsize * (values.shape[1] if values.ndim > 1 else 1)
    words: _Words = values.view(f"V{width}")
    return words[:, 0] if values.ndim > 1 else words
