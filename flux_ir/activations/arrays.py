"""Plain arrays as training data, [tokens, d] or [images, tokens, d], in .npy or .safetensors.

Such an array says nothing but its numbers, so its parts are known by a digest of their values: a
renamed array is the same data as before. Next: `exported`, files that say which site and step they
are of.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ir.activations.blocks import Generation, SiteName, TokenBlock, TokenRun
from flux_ir.activations.spans import Memory, Span, SpanReader
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site

ROWS_PER_PIECE = 256
"""An array without an axis of images is cut into pieces of so many rows, so that some can be held out."""

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "float64": torch.float64,
}
_DIGEST_ROWS = 16  # of an image or a piece: what its id is a digest of
_DIGEST_BYTES = 8 * 10**9  # files up to this size are digested whole
_AT_ONCE_BYTES = 2**18  # a part that is no larger is read as a whole for its digest


class _Piece(NamedTuple):
    """An image of an array [images, tokens, d], or some rows of one [tokens, d]."""

    array: "ArrayFile"
    first: int
    """The first row, counted over all images."""
    tokens: int
    position: int
    """Where the first row is, in its image or in the whole array."""


class ArraySource:
    """Plain arrays: one site without a name, one step."""

    sites: Sequence[Site] = ()
    steps: Sequence[int] = (0,)
    model: str | None = None

    def __init__(self, files: Sequence[Path]) -> None:
        self._arrays = [ArrayFile.open(file) for file in files]
        first = self._arrays[0]
        for array in self._arrays:
            if array.shape[-1] != first.shape[-1]:
                raise FluxIRError(
                    f"all arrays of a folder must have the same width: {array.file} has {array.shape[-1]}, "
                    f"{first.file} has {first.shape[-1]}",
                    hint="keep arrays of different sites in different folders",
                )
        self._pieces = [piece for array in self._arrays for piece in _pieces(array)]
        self._reader = SpanReader()
        ids = [rows_digest(piece.array, piece.first, piece.tokens, self._reader) for piece in self._pieces]
        self.generations: Sequence[Generation] = [
            Generation(name, "", piece.array.file) for name, piece in zip(ids, self._pieces, strict=True)
        ]
        self.runs: Sequence[range] = list(_runs(self._pieces))

    @cached_property
    def identity(self) -> str:
        """A digest of the values; of files larger than 8 GB, of 16 rows of each image or piece."""
        digest = hashlib.sha256()
        for array in self._arrays:
            digest.update(repr((str(array.dtype), array.shape)).encode())
            if prod(array.shape) * array.dtype.itemsize <= _DIGEST_BYTES:
                for first in range(0, array.rows, ROWS_PER_PIECE):
                    digest.update(_bytes(array.read(first, min(first + ROWS_PER_PIECE, array.rows), self._reader)))
        digest.update(repr([generation.id for generation in self.generations]).encode())
        return digest.hexdigest()[:16]

    def d(self, site: SiteName) -> int:
        """The width of the arrays."""
        _check_unnamed(site)
        return self._arrays[0].shape[-1]

    def tokens(self, site: SiteName) -> int:
        """Tokens of the largest piece."""
        _check_unnamed(site)
        return max(piece.tokens for piece in self._pieces)

    def read(self, generation: int, site: SiteName, step: int) -> TokenBlock:
        """One image or piece. Raises FluxIRError for any step but 0."""
        run = self.read_run(range(generation, generation + 1), site, step)
        return TokenBlock(
            values=run.values[0],
            scale=None,
            site=None,
            step=0,
            generation=self.generations[generation].id,
            prompt="",
            positions=run.positions[0],
            txt_tokens=0,
            used_txt=None,
        )

    def read_run(
        self, images: range, site: SiteName, step: int, tokens: range | None = None, memory: Memory | None = None
    ) -> TokenRun:
        """Some tokens of images of one file."""
        _check_unnamed(site)
        if step != 0:
            raise FluxIRError(f"a plain array has the step 0 only: got {step}", hint="leave --steps out")
        pieces = [self._pieces[index] for index in images]
        array, count = pieces[0].array, pieces[0].tokens
        tokens = range(count)[slice(None) if tokens is None else slice(tokens.start, tokens.stop)]
        if len(tokens) == count:
            values = array.read(pieces[0].first, pieces[-1].first + count, self._reader, memory)
        else:
            starts = [piece.first + tokens.start for piece in pieces]
            values = torch.cat([array.read(start, start + len(tokens), self._reader) for start in starts])
        positions = torch.tensor([piece.position for piece in pieces], dtype=torch.int32)[:, None]
        return TokenRun(
            values=values.view(len(images), len(tokens), array.shape[-1]),
            scale=None,
            positions=positions + torch.arange(tokens.start, tokens.stop, dtype=torch.int32),
            txt_tokens=0,
            used_txt=[None] * len(images),
        )


def _pieces(array: "ArrayFile") -> Iterator[_Piece]:
    if len(array.shape) == 3:
        images, tokens, _ = array.shape
        yield from (_Piece(array, image * tokens, tokens, 0) for image in range(images))
        return
    for first in range(0, array.rows, ROWS_PER_PIECE):
        yield _Piece(array, first, min(ROWS_PER_PIECE, array.rows - first), first)


def _runs(pieces: Sequence[_Piece]) -> Iterator[range]:
    """Neighbours of one file with equally many tokens."""
    start = 0
    for index in range(1, len(pieces) + 1):
        if index == len(pieces) or _kind(pieces[index]) != _kind(pieces[start]):
            yield range(start, index)
            start = index


def _kind(piece: _Piece) -> tuple[int, int]:
    return id(piece.array), piece.tokens


def _check_unnamed(site: SiteName) -> None:
    if site is not None:
        raise FluxIRError(f"a plain array has no sites: got {site}", hint="leave --sites out")


@dataclass(frozen=True)
class ArrayFile:
    """An array of floats in a file: [tokens, d] or [images, tokens, d].

    `offset` is where it begins [bytes]; None: its rows do not lie there one after the other.
    """

    file: Path
    key: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None

    @classmethod
    def open(cls, file: Path, key: str | None = None) -> "ArrayFile":
        """Raises FluxIRError unless it is one of floats, of 2 or 3 axes, with tokens."""
        shape, dtype, offset = _npy_facts(file) if file.suffix == ".npy" else _safetensors_facts(file, key)
        if dtype not in _DTYPES:
            raise FluxIRError(
                f"activations are float16, bfloat16, float32 or float64: {file} is {dtype}",
                hint="NumPy has no bfloat16: store such an array as .safetensors, or as float32",
            )
        if len(shape) not in (2, 3) or 0 in shape:
            raise FluxIRError(
                f"an array of activations is [tokens, d] or [images, tokens, d]: {file} is {list(shape)}",
                hint="reshape it, one row per token",
            )
        return cls(file, key, shape, _DTYPES[dtype], offset)

    @property
    def rows(self) -> int:
        """How many all images have together."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.shape[-1] * self.dtype.itemsize

    def read(self, first: int, last: int, reader: SpanReader, memory: Memory | None = None) -> Tensor:
        """Rows `first` to `last` (exclusive): [rows, d]. float64 becomes float32."""
        if self.offset is None:
            rows = self._mapped_rows(first, last)
            values = torch.from_numpy(np.array(rows, dtype=rows.dtype.newbyteorder("="), order="C"))
        else:
            each = self.row_bytes
            span = Span(self.offset + first * each, (last - first) * each)
            values = reader.tensor(self.file, [span], self.dtype, (last - first, self.shape[-1]), memory)
        return values.float() if self.dtype == torch.float64 else values

    def _mapped_rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows of an array that is not laid out in their order: no more is touched than the images they are of."""
        array, tokens = _mapped(self.file), self.shape[-2]
        if array.ndim == 2:
            return array[first:last]
        images = range(first // tokens, -(-last // tokens))
        whole = array[images.start : images.stop].reshape(-1, self.shape[-1])
        return whole[first - images.start * tokens : last - images.start * tokens]


def rows_digest(array: ArrayFile, first: int, tokens: int, reader: SpanReader) -> str:
    """The digest of evenly spaced rows among `tokens` of an array, 16 of them or all: 16 hex digits."""
    count = min(tokens, _DIGEST_ROWS)
    rows = [number * (tokens - 1) // max(count - 1, 1) for number in range(count)]
    if tokens * array.row_bytes <= _AT_ONCE_BYTES:
        values = array.read(first, first + tokens, reader)[rows]
    else:
        values = torch.cat([array.read(first + row, first + row + 1, reader) for row in rows])
    digest = hashlib.sha256(repr((str(array.dtype), tokens, array.shape[-1])).encode())
    digest.update(_bytes(values))
    return digest.hexdigest()[:16]


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data


def _mapped(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _broken(file, error) from error
    return array


def _npy_facts(file: Path) -> tuple[tuple[int, ...], str, int | None]:
    array = _mapped(file)
    plain = array.flags.c_contiguous and array.dtype.isnative
    offset: int | None = array.offset if plain and isinstance(array, np.memmap) else None
    return tuple(array.shape), array.dtype.newbyteorder("=").name, offset


def _safetensors_facts(file: Path, key: str | None) -> tuple[tuple[int, ...], str, int]:
    with open_safetensors(file) as archive:
        key = key or _only_key(file, archive)
        array = archive.get_slice(key)
        shape, dtype = tuple(array.get_shape()), array.get_dtype()
    # The library tells shape and type, and not where a tensor begins: rows are read from there past the page cache.
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        start = json.loads(opened.read(length))[key]["data_offsets"][0]
    return shape, dtype, 8 + length + start


def _only_key(file: Path, archive: Any) -> str:
    keys: list[str] = list(archive.keys())
    if len(keys) != 1:
        raise FluxIRError(
            f"a plain array is alone in its file: {file} holds {len(keys)} tensors, such as {', '.join(keys[:3])}",
            hint="write the activations to a file of their own, or name them {site}/step_{s}",
        )
    return keys[0]


def open_safetensors(file: Path) -> Any:
    """An open safetensors file. Raises FluxIRError for anything else."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> FluxIRError:
    return FluxIRError(f"{file} is not a complete array: {error}", hint="write it again")
