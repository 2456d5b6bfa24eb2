"""Weights as codes of 4 or 8 bits, and back: NF4, int8 and float8, for the large matrices of FLUX's blocks.

A quantised transformer is a `streaming.StreamedFlux` whose weights are widened into its slots, block after block: it
computes as ever, in bfloat16 or float32, so hooks, captures and edits are what they were. Only memory is saved, not
time. All arithmetic here is elementwise and exactly rounded, or a maximum: every device gives the same bits.
Next: `checkpoints.quantised`, which keeps the codes in a file.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.models.architecture import AnyParams, block_names, transformer_of
from flux_ir.models.flux1.blocks import Modulation
from flux_ir.models.streaming import unit_of

Method = Literal["nf4", "int8", "fp8"]
Codes = Mapping[str, Tensor]
"""What stands for one weight: `codes`, and the numbers that they are multiplied with."""
Waits = Literal["file", "pinned", "device"]
"""Where codes wait until a block needs them: in their file, which is mapped (its pages are in the page cache while
there is room), in pinned host memory, or on the device that computes."""
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# QLoRA (Dettmers et al., 2023), appendix E: NormalFloat, the quantiles of a normal distribution, scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
CODES_VERSION = 1
"""Another one where the same weights would get other codes, or another file of them."""
BLOCK = 64
"""Neighbouring weights that share one scale in NF4: their largest absolute value."""
SCALES = 256
"""Neighbouring scales of NF4 that are stored relative to the largest of them (double quantisation)."""
INT8_LARGEST, FP8_LARGEST = 127.0, 448.0
_CACHED = 2048 * BLOCK  # weights that are widened together on a CPU: they stay in the cache of one core
_ON_GPU = 1 << 24  # and on a GPU: enough to fill it, and 200 MB on the way


class _Format(NamedTuple):
    """One method. Weights are [rows, columns]; they are quantised in float32, and widened into any dtype."""

    quantise: Callable[[Tensor], dict[str, Tensor]]
    widen: Callable[[Codes, Tensor], None]
    shapes: Callable[[int, int], Shapes]


def quantise(weight: Tensor, method: Method) -> dict[str, Tensor]:
    """The codes that stand for a weight [rows, columns], on its device."""
    return _FORMATS[method].quantise(weight.to(torch.float32))


def widen(codes: Codes, target: Tensor, method: Method) -> None:
    """Fill `target` with the numbers that the codes stand for, each rounded once to float32 and once to its dtype."""
    _FORMATS[method].widen({name: part.to(target.device, non_blocking=True) for name, part in codes.items()}, target)


def shapes_of_codes(method: Method, rows: int, columns: int) -> Shapes:
    """Dtype and shape of everything that stands for a weight [rows, columns]."""
    return _FORMATS[method].shapes(rows, columns)


@cache
def quantised_weights(params: AnyParams) -> dict[str, tuple[int, int]]:
    """The weights of a transformer that are quantised, by name, with their rows and columns: matrices of its blocks.

    Modulations, biases and norms keep the compute dtype, and so does every layer before and after the blocks: they
    decide about all tokens at once, and what is read out of a block would be blurred with them.
    """
    with torch.device("meta"):
        network = transformer_of(params)
    return {
        weight.name: (weight.blank.shape[0], weight.blank.shape[1])
        for block in block_names(params)
        for weight in unit_of(network, block, without=Modulation).weights
        if weight.blank.ndim == 2
    }


def codes_bytes(params: AnyParams, method: Method) -> int:
    """Bytes of all codes of a transformer, with their scales."""
    return sum(
        dtype.itemsize * prod(shape)
        for rows, columns in quantised_weights(params).values()
        for dtype, shape in shapes_of_codes(method, rows, columns).values()
    )


# ---- NF4: the nearest of 16 numbers, times the largest absolute value of 64 neighbours


def _quantise_nf4(weight: Tensor) -> dict[str, Tensor]:
    # The largest value itself, not what is stored of it, is what weights are compared with: so they are in [-1, 1].
    blocks = _padded(weight.reshape(-1), BLOCK)
    largest = blocks.abs().amax(dim=1)
    table = torch.tensor(NF4, dtype=torch.float64)
    between = ((table[1:] + table[:-1]) / 2).to(weight)
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
    for part in _parts(blocks):
        nearest = torch.bucketize(blocks[part] / _divisor(largest[part, None]), between, out_int32=True)
        codes[part] = (nearest[:, ::2] << 4 | nearest[:, 1::2]).to(torch.uint8)
    # Scales are stored by their square roots, in 256 steps up to the largest of a group: a small one beside a large one
    # keeps two digits. (bitsandbytes has a table of eight-bit floats here, around the mean, whose sum over a whole
    # matrix depends on the number of threads.)
    groups = _padded(largest, SCALES)
    top = groups.amax(dim=1)
    roots = (groups / _divisor(top[:, None])).sqrt_().mul_(255).round_()
    return {"codes": codes, "scales": roots.to(torch.uint8).reshape(-1)[: len(largest)], "scales_scale": top}


def _widen_nf4(codes: Codes, target: Tensor) -> None:
    scales = _padded(codes["scales"], SCALES).to(torch.float32).square_()
    scales = (scales * (codes["scales_scale"] / 255**2)[:, None]).reshape(-1)
    # One look-up for each byte gives two float32 at once, as the 64 bits of an integer.
    pairs = _pairs_of_nf4(target.device)
    flat, blocks = target.view(-1), codes["codes"]
    for part in _parts(blocks, 2 * blocks.shape[1]):
        values = pairs.index_select(0, blocks[part].reshape(-1).to(torch.int32)).view(torch.float32).view(-1, BLOCK)
        values *= scales[part, None]
        here = flat[part.start * BLOCK : part.stop * BLOCK]
        here.copy_(values.view(-1)[: len(here)])


@cache
def _pairs_of_nf4(device: torch.device) -> Tensor:
    """Both numbers that each of the 256 bytes stands for, the high half first, seen as one 64-bit integer."""
    table = torch.tensor(NF4, dtype=torch.float32, device=device)
    return torch.cartesian_prod(table, table).contiguous().view(torch.int64).view(-1)


def _shapes_of_nf4(rows: int, columns: int) -> Shapes:
    blocks = -(-rows * columns // BLOCK)
    return {
        "codes": (torch.uint8, (blocks, BLOCK // 2)),
        "scales": (torch.uint8, (blocks,)),
        "scales_scale": (torch.float32, (-(-blocks // SCALES),)),
    }


# ---- int8 and float8: each row divided by one number, so that its largest value is the largest code


def _quantise_int8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1) / INT8_LARGEST
    codes = (weight / _divisor(scale[:, None])).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
    return {"codes": codes.to(torch.int8), "scale": scale}


def _quantise_fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1) / FP8_LARGEST
    codes = (weight / _divisor(scale[:, None])).clamp_(-FP8_LARGEST, FP8_LARGEST)
    return {"codes": codes.to(torch.float8_e4m3fn), "scale": scale}


def _widen_int8(codes: Codes, target: Tensor) -> None:
    for part in _parts(target):
        values = codes["codes"][part].to(torch.float32)
        target[part] = values.mul_(codes["scale"][part, None])


def _widen_fp8(codes: Codes, target: Tensor) -> None:
    numbers, stored = _numbers_of_fp8(target.device), codes["codes"].view(torch.uint8)
    for part in _parts(target):
        values = numbers.index_select(0, stored[part].reshape(-1).to(torch.int32)).view(-1, stored.shape[1])
        target[part] = values.mul_(codes["scale"][part, None])


@cache
def _numbers_of_fp8(device: torch.device) -> Tensor:
    """The number that each of the 256 bytes stands for: a CPU looks them up three times as fast as it converts them."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).to(device)


def _shapes_of_rows(dtype: torch.dtype) -> Callable[[int, int], Shapes]:
    return lambda rows, columns: {"codes": (dtype, (rows, columns)), "scale": (torch.float32, (rows,))}


_FORMATS: dict[Method, _Format] = {
    "nf4": _Format(_quantise_nf4, _widen_nf4, _shapes_of_nf4),
    "int8": _Format(_quantise_int8, _widen_int8, _shapes_of_rows(torch.int8)),
    "fp8": _Format(_quantise_fp8, _widen_fp8, _shapes_of_rows(torch.float8_e4m3fn)),
}


def _padded(values: Tensor, size: int) -> Tensor:
    """A vector as rows of `size`; the last is filled up with zeros."""
    missing = -len(values) % size
    return torch.nn.functional.pad(values, (0, missing)).view(-1, size) if missing else values.view(-1, size)


def _divisor(largest: Tensor) -> Tensor:
    """The same, with ones in place of zeros: where all weights are zero, their codes are."""
    return torch.where(largest == 0, 1.0, largest)


def _parts(rows: Tensor, weights_per_row: int | None = None) -> Iterator[slice]:
    """Rows that are worked on together."""
    together = _CACHED if rows.device.type == "cpu" else _ON_GPU
    size = max(1, together // (weights_per_row or rows.shape[1]))
    for begin in range(0, len(rows), size):
        yield slice(begin, min(begin + size, len(rows)))
