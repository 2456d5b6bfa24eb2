"""Blocks of GGUF become the numbers that gguf makes of them, to the bit, and those of a sum in float64."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from flux_ir.models.checkpoints.formats.blocks import BLOCK_TYPES

# The bytes of a block at which its 16-bit floats begin.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def random_blocks(kind, count=300):
    """Blocks of random codes with random factors, among them 0, negative and subnormal ones."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (count, BLOCK_TYPES[kind].nbytes), dtype=np.uint8)
    for start in HALVES[kind]:
        factors = (draw.standard_normal(count) * 10.0 ** draw.integers(-6, 2, count)).astype(np.float16)
        factors[0] = 0
        blocks[:, start : start + 2] = factors.view(np.uint8).reshape(-1, 2)
    return blocks


def half(block, start):
    return float(block[start : start + 2].view(np.float16)[0])


def q4_k(block):
    """256 weights by hand: 8 groups of 32, with 6 bits for each group's factor and offset."""
    d, m, packed, codes = half(block, 0), half(block, 2), [int(byte) for byte in block[4:16]], block[16:]
    numbers = []
    for group in range(8):
        if group < 4:
            factor, offset = packed[group] % 64, packed[group + 4] % 64
        else:
            factor = packed[group + 4] % 16 + 16 * (packed[group - 4] // 64)
            offset = packed[group + 4] // 16 + 16 * (packed[group] // 64)
        for i in range(32):
            byte = int(codes[32 * (group // 2) + i])
            numbers.append(d * factor * (byte // 16 if group % 2 else byte % 16) - m * offset)
    return numbers


def q6_k(block):
    """256 weights by hand: in each half four rows of 32, whose low 4 bits and high 2 bits are apart."""
    d, numbers = half(block, 208), []
    for weight in range(256):
        part, row, i = weight // 128, weight % 128 // 32, weight % 32
        low = int(block[64 * part + 32 * (row % 2) + i])
        low = low // 16 if row > 1 else low % 16
        high = int(block[128 + 32 * part + i]) // 4**row % 4
        numbers.append(d * float(block[192 + weight // 16].view(np.int8)) * (low + 16 * high - 32))
    return numbers


def test_types_have_the_sizes_that_gguf_gives_them():
    sizes = {kind: (block.weights, block.nbytes) for kind, block in BLOCK_TYPES.items()}
    assert sizes == {kind: GGML_QUANT_SIZES[GGMLQuantizationType[kind]] for kind in BLOCK_TYPES}


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_random_blocks_are_the_numbers_of_gguf_to_the_bit(kind):
    blocks = random_blocks(kind)
    numbers = BLOCK_TYPES[kind].numbers(torch.from_numpy(blocks))
    expected = dequantize(blocks, GGMLQuantizationType[kind])
    assert numbers.dtype == torch.float32
    assert np.array_equal(numbers.numpy(), expected)


@pytest.mark.parametrize(("kind", "by_hand"), [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_random_blocks_are_the_numbers_of_a_sum_in_float64(kind, by_hand):
    blocks = random_blocks(kind, count=40)
    numbers = BLOCK_TYPES[kind].numbers(torch.from_numpy(blocks))
    expected = torch.tensor([by_hand(block) for block in blocks], dtype=torch.float64)
    assert torch.equal(numbers, expected.float())


@pytest.mark.parametrize(
    ("kind", "most"), [("Q8_0", 0.02), ("Q5_1", 0.1), ("Q5_0", 0.13), ("Q4_1", 0.2), ("Q4_0", 0.3)]
)
def test_what_gguf_quantised_comes_back_nearly(kind, most):
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    blocks = torch.from_numpy(quantize(weights, GGMLQuantizationType[kind])).reshape(-1, BLOCK_TYPES[kind].nbytes)
    numbers = BLOCK_TYPES[kind].numbers(blocks).reshape(8, 64)
    assert 0 < np.abs(numbers.numpy() - weights).max() < most
