"""Arrays as training data: plain ones, [tokens, d] or [images, tokens, d], in .npy or .safetensors.

Next: `exported_source`, for files that say which site and step they are of.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ir.activations.token_blocks import Generation, TokenBlock
from flux_ir.errors import FluxIRError
from flux_ir.sites import Site

ROWS_PER_PIECE = 256
"""An array without an axis of images is cut into pieces of so many rows, so that some can be held out."""

_READABLE = ("F32", "F16", "BF16", "float32", "float16", "float64")


class _Piece(NamedTuple):
    """Some rows of one array: all of one image, or a cut of a long list."""

    file: Path
    number: int
    image: int | None
    first: int
    tokens: int


class ArraySource:
    """Activations of which nothing is known but the numbers: one site without a name, one step."""

    sites: Sequence[Site] = ()
    steps: Sequence[int] = (0,)
    model: str | None = None

    def __init__(self, files: Sequence[Path]) -> None:
        shapes = [(file, array_shape(file)) for file in files]
        first, expected = shapes[0]
        for file, shape in shapes:
            if shape[-1] != expected[-1]:
                raise FluxIRError(
                    f"all arrays of a folder must have the same width: {file} has {shape[-1]}, {first} has "
                    f"{expected[-1]}",
                    hint="keep arrays of different sites in different folders",
                )
        self._d = expected[-1]
        self._pieces = [piece for file, shape in shapes for piece in _pieces(file, shape)]
        self.generations: Sequence[Generation] = [
            Generation(f"{piece.file.stem}.{piece.number}", "", piece.file) for piece in self._pieces
        ]

    def d(self, site: Site | None) -> int:
        """The width of the arrays."""
        _check_unnamed(site)
        return self._d

    def tokens(self, site: Site | None) -> int:
        """Tokens of the largest piece."""
        _check_unnamed(site)
        return max(piece.tokens for piece in self._pieces)

    def read(self, generation_index: int, site: Site | None, step: int) -> TokenBlock:
        """One piece. Raises FluxIRError for any step but 0."""
        _check_unnamed(site)
        piece = self._pieces[generation_index]
        if step != 0:
            raise FluxIRError(f"a plain array has the step 0 only: got {step}", hint="leave --steps out")
        rows = slice(piece.first, piece.first + piece.tokens)
        return TokenBlock(
            values=read_array(piece.file, lambda array: array[rows] if piece.image is None else array[piece.image]),
            scale=None,
            site=None,
            step=0,
            generation=self.generations[generation_index].id,
            prompt="",
            positions=torch.arange(piece.first, piece.first + piece.tokens, dtype=torch.int32),
            txt_tokens=0,
            used_txt=None,
        )


def array_shape(file: Path, key: str | None = None) -> tuple[int, ...]:
    """The shape of the array in a file, of that name where there are several.

    Raises FluxIRError unless it is one of floats, of 2 or 3 axes, with tokens.
    """
    shape, dtype = _npy_facts(file) if file.suffix == ".npy" else _safetensors_facts(file, key)
    if dtype not in _READABLE:
        raise FluxIRError(
            f"activations are float16, bfloat16, float32 or float64: {file} is {dtype}",
            hint="NumPy has no bfloat16: store such an array as .safetensors, or as float32",
        )
    if len(shape) not in (2, 3) or 0 in shape:
        raise FluxIRError(
            f"an array of activations is [tokens, d] or [images, tokens, d]: {file} is {list(shape)}",
            hint="reshape it, one row per token",
        )
    return shape


def read_array(file: Path, pick: Callable[[Any], Any], key: str | None = None) -> Tensor:
    """What `pick` takes of the array in a file, read from there alone; float64 becomes float32."""
    if file.suffix == ".npy":
        return _tensor_of(pick(_mapped(file)))
    with opened(file) as archive:
        picked: Tensor = pick(archive.get_slice(key or _only_key(file, archive)))
        return picked


def opened(file: Path) -> Any:
    """An open safetensors file. Raises FluxIRError for anything else."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _broken(file, error) from error


def _tensor_of(array: NDArray[Any]) -> Tensor:
    """A copy of an array that PyTorch can hold: in the machine's byte order, float64 as float32."""
    dtype = np.dtype(np.float32 if array.dtype == np.float64 else array.dtype).newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _pieces(file: Path, shape: tuple[int, ...]) -> Iterator[_Piece]:
    if len(shape) == 3:
        yield from (_Piece(file, image, image, 0, shape[1]) for image in range(shape[0]))
        return
    for number, first in enumerate(range(0, shape[0], ROWS_PER_PIECE)):
        yield _Piece(file, number, None, first, min(ROWS_PER_PIECE, shape[0] - first))


def _mapped(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _broken(file, error) from error
    return array


def _npy_facts(file: Path) -> tuple[tuple[int, ...], str]:
    array = _mapped(file)
    return tuple(array.shape), array.dtype.newbyteorder("=").name


def _safetensors_facts(file: Path, key: str | None) -> tuple[tuple[int, ...], str]:
    with opened(file) as archive:
        array = archive.get_slice(key or _only_key(file, archive))
        return tuple(array.get_shape()), array.get_dtype()


def _only_key(file: Path, archive: Any) -> str:
    keys: list[str] = list(archive.keys())
    if len(keys) != 1:
        raise FluxIRError(
            f"a plain array is alone in its file: {file} holds {len(keys)} tensors, such as {', '.join(keys[:3])}",
            hint="write the activations to a file of their own, or name them {site}/step_{s}",
        )
    return keys[0]


def _check_unnamed(site: Site | None) -> None:
    if site is not None:
        raise FluxIRError(f"a plain array has no sites: got {site}", hint="leave --sites out")


def _broken(file: Path, error: Exception) -> FluxIRError:
    return FluxIRError(f"{file} is not a complete array: {error}", hint="write it again")
