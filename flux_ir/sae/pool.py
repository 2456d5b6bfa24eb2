"""A bounded number of tokens in memory, in slots: written in reading order, taken in any.

Values of all sites lie in one array each, so that a batch is one gather per site. On a CPU rows move as whole words,
and the memory of batches is used again once nobody holds them: fresh pages would cost more than the gather.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.spare_memory import SpareMemory
from flux_ir.errors import FluxIRError
from flux_ir.sae.chunks import Chunk
from flux_ir.sae.filters import SiteKey

Slots = NDArray[np.int64]

# What a slot's token is, and which row of which chunk. Read and written as one word: memory is slow in random order.
_ABOUT = np.dtype(
    [("chunk", np.int32), ("row", np.int32), ("generation", np.int32), ("step", np.int16), ("is_text", np.bool_)],
    align=True,
)
_SPARE_BATCHES = 3
_SMALL_POOL = 64  # batches


class Batch(NamedTuple):
    """Tokens in random order, the same ones for every site."""

    values: dict[SiteKey, Tensor]
    """[n, d] for each site, of the data's own dtype (float8 becomes bfloat16)."""
    steps: Tensor
    """int16 [n]."""
    is_text: Tensor
    """bool [n]."""
    generations: Tensor
    """int32 [n]: index among the source's generations; of a stream: in order of appearance."""


class Row(NamedTuple):
    """What a site's tokens are: their width, and the type of their values."""

    d: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one token."""
        return self.d * self.dtype.itemsize


class Origin(NamedTuple):
    """Where some tokens are from: rows of a chunk."""

    ordinal: int
    generation: int
    step: int
    is_text: NDArray[np.bool_]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, chunk: Chunk, rows: NDArray[np.int64]) -> "Origin":
        """Of these rows of a chunk. It does not keep their values."""
        return cls(chunk.ordinal, chunk.generation, chunk.step, chunk.is_text[rows], rows)


class Pool:
    """`capacity` slots on a device. Slots that are written must not be taken from at the same time."""

    BYTES_BESIDE = _ABOUT.itemsize
    """Bytes per slot beside its values: what the token is, and where it came from."""

    def __init__(self, rows: Mapping[SiteKey, Row], capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.rows = dict(rows)
        self._values = {site: _empty(capacity, row, device) for site, row in self.rows.items()}
        self._words = {site: _words(values) for site, values in self._values.items()} if device.type == "cpu" else {}
        self._about = np.zeros(capacity, _ABOUT)
        self._about["chunk"] = -1
        self._spare = {site: SpareMemory(_SPARE_BATCHES) for site in self.rows}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._taken: torch.cuda.Event | None = None

    @property
    def chunk_of_slot(self) -> NDArray[np.int32]:
        """The ordinal of the chunk a slot's token came from; -1: the slot is empty."""
        return self._about["chunk"]

    @property
    def row_of_slot(self) -> NDArray[np.int32]:
        """Its row in that chunk."""
        return self._about["row"]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.capacity * slot_bytes(self.rows)

    def put(self, slots: Slots, chunk: Chunk, rows: NDArray[np.int64]) -> None:
        """Write these rows of a chunk, ascending. Raises FluxIRError for values of another type."""
        self.put_values(slots, chunk, rows)
        self.describe(slots, [Origin.of(chunk, rows)])

    def put_values(self, slots: Slots, chunk: Chunk, rows: NDArray[np.int64]) -> None:
        """`put` without saying where the tokens are from: `describe` does, for many small chunks at once."""
        for site, values in chunk.values.items():
            self._check_fits(values, site, chunk.place)
        if self._copies is None:
            self._put_here(slots, chunk, rows)
        else:
            self._put_on_gpu(slots, chunk, rows, self._copies)

    def describe(self, slots: Slots, origins: Sequence[Origin]) -> None:
        """Say where the tokens in these slots are from: one origin after the other."""
        if not len(slots):
            return
        counts = [len(origin.rows) for origin in origins]
        about = np.empty(len(slots), _ABOUT)
        for field, of_origins in (
            ("chunk", [origin.ordinal for origin in origins]),
            ("generation", [origin.generation for origin in origins]),
            ("step", [origin.step for origin in origins]),
        ):
            about[field] = np.repeat(np.array(of_origins, _ABOUT[field]), counts)
        about["is_text"] = np.concatenate([origin.is_text for origin in origins])
        about["row"] = np.concatenate([origin.rows for origin in origins])
        _whole(self._about)[slots] = _whole(about)

    def _check_fits(self, values: Tensor, site: SiteKey, place: object) -> None:
        row = self.rows[site]
        if values.shape[1] != row.d or values.dtype != row.dtype:
            raise FluxIRError(
                f"all tokens of {site or 'the array'} must be {row.dtype} and {row.d} wide: got {values.dtype} and "
                f"{values.shape[1]} in {place}",
                hint="keep captures of different models and dtypes in different folders",
            )

    def _put_here(self, slots: Slots, chunk: Chunk, rows: NDArray[np.int64]) -> None:
        if not len(rows):
            return
        first, last = int(rows[0]), int(rows[-1]) + 1
        # rows without gaps are read where they lie; of others a copy is made
        part: slice | Tensor = slice(first, last) if last - first == len(rows) else torch.from_numpy(rows)
        for site, values in chunk.values.items():
            self._words[site][slots] = _words(values.detach()[part].cpu().contiguous())

    def _put_on_gpu(self, slots: Slots, chunk: Chunk, rows: NDArray[np.int64], copies: torch.cuda.Stream) -> None:
        with torch.cuda.stream(copies):
            if self._taken is not None:
                copies.wait_event(self._taken)  # these slots may just be being read
            into = torch.from_numpy(slots).to(self.device)
            whole = len(rows) == len(chunk.is_text)
            for site, values in chunk.values.items():
                taken = values.detach() if whole else values.detach()[torch.from_numpy(rows).to(values.device)]
                self._values[site].index_copy_(0, into, taken.to(self.device))
            copies.synchronize()  # what is copied from may be gone after this

    def take(self, slots: Slots) -> Batch:
        """The tokens in these slots, in their order."""
        index = slots if self.device.type == "cpu" else torch.from_numpy(slots).to(self.device)
        values = {site: self._gather(site, index) for site in self.rows}
        about = _whole(self._about)[slots].view(_ABOUT)
        fields = (about[field].copy() for field in ("step", "is_text", "generation"))
        beside = (torch.from_numpy(field).to(self.device) for field in fields)
        if self._copies is not None:
            self._taken = torch.cuda.current_stream(self.device).record_event()
        return Batch(values, *beside)

    def _gather(self, site: SiteKey, index: Slots | Tensor) -> Tensor:
        if isinstance(index, Tensor):
            return self._values[site].index_select(0, index)
        row = self.rows[site]
        batch = self._spare[site].bytes(len(index) * row.nbytes).view(row.dtype).view(len(index), row.d)
        # other modes gather twice; slots are within bounds
        np.take(self._words[site], index, out=_words(batch), mode="clip")
        return batch


def free_slots(capacity: int, busy: Slots, picks: Slots) -> Slots:
    """The `picks`-th of the slots that are not busy, counted from 0."""
    if capacity <= _SMALL_POOL * max(len(picks), 1):  # a list of all of them is made faster than each is looked up
        free = np.ones(capacity, np.bool_)
        free[busy] = False
        return np.flatnonzero(free)[picks]
    busy = np.sort(busy)
    # the i-th free slot is i plus the number of busy ones before it
    return picks + np.searchsorted(busy - np.arange(len(busy)), picks, side="right")


def slot_bytes(rows: Mapping[SiteKey, Row]) -> int:
    """Bytes of memory that one token of every site takes in a pool."""
    return sum(row.nbytes for row in rows.values()) + Pool.BYTES_BESIDE


def _empty(tokens: int, row: Row, device: torch.device) -> Tensor:
    """Uninitialised memory [tokens, d]. On a CPU from NumPy, which asks for large pages: a tenth of the page faults."""
    if device.type != "cpu":
        return torch.empty(tokens, row.d, dtype=row.dtype, device=device)
    return _tensor(np.empty(tokens * row.nbytes, np.uint8), tokens, row)


def _tensor(memory: NDArray[np.uint8], tokens: int, row: Row) -> Tensor:
    return torch.from_numpy(memory).view(row.dtype).view(tokens, row.d)


def _whole(about: NDArray[Any]) -> NDArray[Any]:
    return about.view(f"V{_ABOUT.itemsize}")


def _words(values: Tensor) -> NDArray[Any]:
    """The bytes of tokens [n, d] as n wide words: NumPy moves them four times as fast as PyTorch, with the interpreter
    free for other threads.
    """
    plain = values.view(torch.uint8).numpy()
    return plain.view(f"V{plain.shape[1]}")[:, 0]
