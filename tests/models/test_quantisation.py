"""Codes and the numbers they stand for, against float64, against the paper's definition and against bitsandbytes."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from flux_ir.models.quantisation import (
    BLOCK,
    NF4,
    SCALES,
    codes_bytes,
    quantise,
    quantised_weights,
    shapes_of_codes,
    widen,
)
from flux_ir.models.registry import MODELS, get_spec

METHODS = ("nf4", "int8", "fp8")
ROWS, COLUMNS = 50, 330  # 16,500 weights: neither whole blocks of 64 nor whole groups of 256 blocks


@pytest.fixture
def weight():
    """Rows of very unequal size, and one of zeros."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw) * torch.logspace(-1, 1, ROWS)[:, None]
    weight[7] = 0
    return weight


def widened(weight, method, dtype=torch.float32):
    target = torch.full(weight.shape, torch.nan, dtype=dtype)
    widen(quantise(weight, method), target, method)
    return target


def blocks_of(values, size):
    """float64 rows of `size`, the last filled up with zeros."""
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def test_the_table_is_that_of_the_paper():
    # QLoRA, appendix E: 8 quantiles of the positive half, 7 of the negative one and a zero, divided by the largest.
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive, negative = (norm.ppf(np.linspace(offset, 0.5, count)[:-1]) for count in (9, 8))
    table = np.sort([*positive, 0.0, *-negative]) / norm.ppf(offset)
    np.testing.assert_allclose(NF4, table, rtol=0, atol=2e-7)  # published in float32
    assert [NF4[0], NF4[7], NF4[15]] == [-1, 0, 1]
    assert all(number == np.float32(number) for number in NF4)


def test_nf4_takes_the_nearest_number_for_every_weight(weight):
    blocks = blocks_of(weight, BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    distances = np.abs(blocks[..., None] - np.array(NF4) * largest[..., None])
    codes = quantise(weight, "nf4")["codes"].numpy()
    nibbles = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1, BLOCK)
    chosen = np.take_along_axis(distances, nibbles[..., None].astype(np.int64), axis=-1)[..., 0]
    assert (chosen <= distances.min(axis=-1) * (1 + 1e-6)).all()
    assert (nibbles[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)][largest[:, 0] > 0] % 15 == 0).all()
    assert (nibbles[largest[:, 0] == 0] == 7).all()  # the zero of the table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_widens_to_the_product_in_float64_rounded(weight, dtype):
    codes = quantise(weight, "nf4")
    packed = codes["codes"].numpy()
    numbers = np.array(NF4)[np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, BLOCK)]
    unit = (codes["scales_scale"] / 255**2).double().numpy()  # one float32 for each group
    squares = blocks_of(codes["scales"], SCALES) ** 2
    scales = (squares * unit[:, None]).astype(np.float32).astype(np.float64).reshape(-1)[: len(numbers)]
    expected = torch.from_numpy(numbers * scales[:, None]).reshape(-1)[: weight.numel()].view(weight.shape)
    assert torch.equal(widened(weight, "nf4", dtype), expected.to(torch.float32).to(dtype))


def test_the_scales_of_nf4_are_near_the_largest_values(weight):
    codes = quantise(weight, "nf4")
    largest = np.abs(blocks_of(weight, BLOCK)).max(axis=1)
    groups = blocks_of(largest, SCALES)
    top = groups.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(codes["scales_scale"].numpy(), top[:, 0].astype(np.float32))
    stored = blocks_of(codes["scales"], SCALES) ** 2 / 255**2 * top
    # Half a step of the square root, as a part of the value: small where the scale is small, too.
    assert (np.abs(np.sqrt(stored / top) - np.sqrt(groups / top)) <= 0.5 / 255 + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rounds_each_row_in_units_of_its_largest_value(weight, dtype):
    codes = quantise(weight, "int8")
    scale = (weight.abs().amax(dim=1) / 127).double()
    assert torch.equal(codes["scale"].double(), scale)
    ratios = (weight.double() / torch.where(scale == 0, 1, scale)[:, None]).to(torch.float32).double()
    assert torch.equal(codes["codes"].double(), ratios.round())
    expected = codes["codes"].double() * scale[:, None]
    assert torch.equal(widened(weight, "int8", dtype), expected.to(torch.float32).to(dtype))
    assert (expected - weight.double()).abs().le(scale[:, None] * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_takes_the_nearest_float8_in_units_of_a_row(weight, dtype):
    codes = quantise(weight, "fp8")
    scale = (weight.abs().amax(dim=1) / 448).double()
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    values = codes["codes"].double()
    ratios = weight.double() / torch.where(scale == 0, 1, scale)[:, None]
    nearest = (ratios[..., None] - numbers).abs().amin(dim=-1)
    assert (values - ratios).abs().le(nearest + 1e-4).all()  # the quotient is rounded to float32 first
    assert torch.equal(widened(weight, "fp8", dtype), (values * scale[:, None]).to(torch.float32).to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_codes_have_the_promised_shapes_and_zeros_stay(weight, method):
    codes = quantise(weight, method)
    promised = shapes_of_codes(method, ROWS, COLUMNS)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in codes.items()} == promised
    assert not widened(torch.zeros(4, 64), method).any()
    assert not widened(weight, method)[7].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_in_bfloat16_is_quantised_as_its_numbers(weight, method):
    rounded = weight.to(torch.bfloat16)
    for ours, wide in zip(
        quantise(rounded, method).values(), quantise(rounded.to(torch.float32), method).values(), strict=True
    ):
        assert torch.equal(ours.view(torch.uint8), wide.view(torch.uint8))


def test_better_methods_err_less_and_small_rows_keep_their_precision(weight):
    weight = torch.cat([weight[:7], weight[8:]])[:, :320]  # blocks of 64 that end where rows do
    errors = {}
    for method in METHODS:
        rows = (widened(weight, method) - weight).norm(dim=1) / weight.norm(dim=1)
        errors[method] = rows.max().item()
    assert errors["int8"] < errors["fp8"] < 0.03 < errors["nf4"] < 0.15


def test_what_is_quantised_are_the_matrices_of_the_blocks_but_modulations(tiny_flux):
    network = tiny_flux(guidance=True)
    names = quantised_weights(network.params)
    state = network.state_dict()
    assert {name: tuple(state[name].shape) for name in names} == names
    kept = sorted(set(state) - set(names))
    assert all(
        state[name].ndim == 1
        or "_mod.lin" in name
        or ".modulation.lin" in name
        or name.startswith(("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer"))
        for name in kept
    )
    assert len(names) == 8 * network.params.depth + 2 * network.params.depth_single_blocks


def test_the_bytes_of_flux():
    flux = MODELS["flux-dev"].flux
    weights = sum(rows * columns for rows, columns in quantised_weights(flux).values())
    assert weights == 8_606_711_808
    bits = {method: codes_bytes(flux, method) * 8 / weights for method in METHODS}
    assert bits["nf4"] == pytest.approx(4 + 8 / BLOCK + 32 / (BLOCK * SCALES), rel=1e-4)
    assert bits["int8"] == bits["fp8"] == pytest.approx(8, rel=0.01)
    tiny = get_spec("flux-tiny").flux
    count = sum(rows * columns for rows, columns in quantised_weights(tiny).values())
    assert codes_bytes(tiny, "nf4") == pytest.approx(count * 4.127 / 8, rel=0.01)


def test_codes_are_those_of_bitsandbytes_and_its_numbers_no_better(weight):
    functional = pytest.importorskip("bitsandbytes.functional", reason="uv sync --group peers")
    draw = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(256, 192, generator=draw) * 0.02).to(dtype)
        theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        ours = quantise(weight, "nf4")
        assert torch.equal(ours["codes"].flatten(), theirs.flatten())
        wide = weight.double()
        their_error, our_error = (
            ((values.double() - wide).norm() / wide.norm()).item()
            for values in (functional.dequantize_4bit(theirs, state), widened(weight, "nf4", dtype))
        )
        assert our_error < their_error * 1.001


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_quantises_and_widens_to_the_same_bits(weight, method, dtype):
    codes = quantise(weight.to("cuda"), method)
    for ours, theirs in zip(codes.values(), quantise(weight, method).values(), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
    target = torch.empty(weight.shape, dtype=dtype, device="cuda")
    widen(codes, target, method)
    assert torch.equal(target.cpu(), widened(weight, method, dtype))
