"""The blocks of GGUF: 32 or 256 neighbouring weights, as a few codes and the numbers that they are multiplied with.

Every function takes whole blocks, uint8 [blocks, bytes], and gives float32 [blocks, weights]. Products are exact in
float32 (a 16-bit scale times codes of 8 bits), so the numbers are those of llama.cpp and gguf to the bit. In what
follows `d` and `m` are a block's factor and offset.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The 16 values of IQ4, by code.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockType(NamedTuple):
    """One type of block: the weights it holds, the bytes it takes, and how they become numbers."""

    weights: int
    nbytes: int
    numbers: Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The 16-bit float at a byte of every block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _signed(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int8).to(torch.float32)


def _nibbles(codes: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def _bits(codes: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """`codes` [..., n] shifted right by each of the shifts and masked: [..., shifts, n]."""
    return (codes[..., None, :] >> torch.tensor(shifts, dtype=torch.uint8)[:, None]) & mask


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits, the first in the lowest place of the first byte, each worth 16."""
    return _bits(blocks[:, at : at + 4], tuple(range(8)), 1).transpose(1, 2).flatten(1) << 4


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).to(torch.float32) - 8) * _half(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).to(torch.float32) * _half(b, 0) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return ((_nibbles(b[:, 6:]) | _fifth_bits(b, 2)).to(torch.float32) - 16) * _half(b, 0)


def _q5_1(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 8:]) | _fifth_bits(b, 4)).to(torch.float32) * _half(b, 0) + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _signed(b[:, 2:]) * _half(b, 0)


def _q2_k(b: Tensor) -> Tensor:
    """16 groups of 16 weights, each with a factor and an offset of 4 bits."""
    scales, codes = b[:, :16], b[:, 16:80].reshape(-1, 2, 32)
    values = _bits(codes, (0, 2, 4, 6), 3).reshape(-1, 16, 16).to(torch.float32)
    d = _half(b, 80) * (scales & 15)
    m = _half(b, 82) * (scales >> 4)
    return (d[..., None] * values - m[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    """16 groups of 16 weights: two bits of each together, the third apart; factors of 6 bits."""
    third, codes, packed = b[:, :32], b[:, 32:96].reshape(-1, 2, 32), b[:, 96:108]
    # The low four bits of the 16 factors are in 8 bytes, their high two in the 4 bytes behind them.
    factors = _nibbles(packed[:, :8]) | (_bits(packed[:, 8:], (0, 2, 4, 6), 3).flatten(1) << 4)
    d = _half(b, 108) * (factors.to(torch.float32) - 32)
    low = _bits(codes, (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    high = _bits(third, tuple(range(8)), 1).reshape(-1, 16, 16)
    values = low.to(torch.float32) - 4 * (1 - high.to(torch.float32))
    return (d[..., None] * values).flatten(1)


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 factors and 8 offsets of 6 bits that Q4_K and Q5_K keep in 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    factors = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    offsets = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return factors, offsets


def _q4_k(b: Tensor) -> Tensor:
    """8 groups of 32 weights, each with a factor and an offset of 6 bits."""
    factors, offsets = _six_bit_pairs(b[:, 4:16])
    values = _bits(b[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32).to(torch.float32)
    d, m = _half(b, 0) * factors, _half(b, 2) * offsets
    return (d[..., None] * values - m[..., None]).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    """As Q4_K, with a fifth bit of each weight apart."""
    factors, offsets = _six_bit_pairs(b[:, 4:16])
    low = _bits(b[:, 48:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    values = (low | (_bits(b[:, 16:48], tuple(range(8)), 1) << 4)).to(torch.float32)
    d, m = _half(b, 0) * factors, _half(b, 2) * offsets
    return (d[..., None] * values - m[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    """16 groups of 16 weights with signed factors of 8 bits: four bits of each weight together, two apart."""
    low = _bits(b[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = _bits(b[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    values = ((low | (high << 4)).to(torch.float32) - 32).reshape(-1, 16, 16)
    d = _half(b, 208) * _signed(b[:, 192:208])
    return (d[..., None] * values).flatten(1)


def _iq4_values(codes: Tensor) -> Tensor:
    return torch.tensor(_IQ4, dtype=torch.float32)[codes.to(torch.int32)]


def _iq4_nl(b: Tensor) -> Tensor:
    return _iq4_values(_nibbles(b[:, 2:])) * _half(b, 0)


def _iq4_xs(b: Tensor) -> Tensor:
    """8 groups of 32 weights with factors of 6 bits."""
    high = _bits(b[:, 2:4], (0, 2, 4, 6), 3).transpose(1, 2).flatten(1)
    low = _bits(b[:, 4:8], (0, 4), 15).transpose(1, 2).flatten(1)
    d = _half(b, 0) * ((low | (high << 4)).to(torch.float32) - 32)
    return (d[..., None] * _iq4_values(_nibbles(b[:, 8:].reshape(-1, 8, 16)))).flatten(1)


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
}
"""By the names that GGUF gives them."""
