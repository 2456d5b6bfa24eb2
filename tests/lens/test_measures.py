"""The numbers beside the pictures, against values worked out by hand."""

import math

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.lens.measures import LinearCKA, cosine, json_number, psnr_db, relative_distance


def test_cosine_is_that_of_one_long_vector():
    a = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    assert cosine(a, a) == 1.0
    assert cosine(a, -2 * a) == -1.0
    assert cosine(a, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])) == 0.0
    assert cosine(a, torch.ones_like(a)) == pytest.approx(7 / (5 * 2))  # not the mean of the tokens' cosines


def test_relative_distance_is_zero_where_equal_and_one_for_predicting_zero():
    a = torch.tensor([[3.0, 4.0]])
    assert relative_distance(a, a) == 0.0
    assert relative_distance(torch.zeros_like(a), a) == 1.0
    assert relative_distance(2.5 * a, a) == 1.5
    assert relative_distance(torch.tensor([[3.0, 5.0]]), a) == pytest.approx(1 / 5)  # of the second, not the first


def test_bf16_is_measured_in_float64():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(1, 4096, 64, generator=draw).bfloat16()
    b = (a + 0.01 * torch.randn(a.shape, generator=draw)).bfloat16()
    x, y = a.double().flatten(), b.double().flatten()
    assert cosine(a, b) == pytest.approx((x @ y / (x.norm() * y.norm())).item(), abs=1e-12)
    assert relative_distance(a, b) == pytest.approx(((x - y).norm() / y.norm()).item(), rel=1e-12)


def test_nothing_divides_by_zero():
    zero = torch.zeros(1, 2, 3)
    assert cosine(zero, zero) == 0.0
    assert relative_distance(zero, zero) == 0.0
    assert math.isfinite(relative_distance(torch.ones(1, 2, 3), zero))


def test_psnr_is_that_of_bytes():
    black = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    white = torch.full_like(black, 255)
    one_off = black.clone()
    one_off[0, 0, 0, 0] = 12
    assert psnr_db(black, white) == psnr_db(white, black) == 0.0  # and no byte wraps around
    assert psnr_db(black, one_off) == pytest.approx(10 * math.log10(255**2 / (144 / 12)))


def test_equal_pictures_have_no_psnr():
    picture = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8)
    assert psnr_db(picture, picture.clone()) is None


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, None), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (0.0, 0.0), (0.123456789, 0.123457)],
)
def test_json_has_six_digits_and_tells_infinity_apart_from_nothing(value, written):
    assert json_number(value) == written


# ---- Alignment of two places


def cka(x, y, batches=1):
    alignment = LinearCKA()
    for rows, columns in zip(x.chunk(batches), y.chunk(batches), strict=True):
        alignment.add(rows, columns)
    return alignment.value()


def brute_force_cka(x, y):
    """Song et al. (2012), equation 5, as it is printed, with the kernels' matrices."""

    def hsic(k, other):
        n, one = len(k), torch.ones(len(k), dtype=torch.float64)
        k, other = k - k.diag().diag(), other - other.diag().diag()
        middle = one @ k @ other @ one
        total = (k @ other).trace() + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * middle
        return total / (n * (n - 3))

    k, other = x.double() @ x.double().T, y.double() @ y.double().T
    return (hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt()).item()


@pytest.fixture
def tokens():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(40, 7, generator=draw) @ torch.randn(7, 7, generator=draw) + 3


def test_cka_is_that_of_the_kernels_matrices_in_any_number_of_batches(tokens):
    other = tokens[:, :5].tanh() + 0.5 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    expected = brute_force_cka(tokens, other)
    assert 0.1 < expected < 0.95
    for batches in (1, 3, 40):
        assert cka(tokens, other, batches) == pytest.approx(expected, abs=1e-10)


def test_cka_is_one_for_a_place_turned_shifted_and_scaled(tokens):
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    assert cka(tokens, tokens) == pytest.approx(1, abs=1e-12)
    assert cka(tokens, -3 * tokens.double() @ turn + 100) == pytest.approx(1, abs=1e-9)


def test_debiased_cka_of_independent_places_is_about_zero_with_fewer_tokens_than_dimensions():
    draw = torch.Generator().manual_seed(3)
    values = [cka(torch.randn(20, 60, generator=draw), torch.randn(20, 60, generator=draw)) for _ in range(30)]
    assert abs(sum(values) / 30) < 0.05  # the plain estimate is near .75 here
    assert min(values) < 0 < max(values)


def test_cka_refuses_other_tokens_and_too_few_and_does_not_divide_by_zero(tokens):
    with pytest.raises(FluxIRError, match=r"the same tokens at two places: got \[40, 7\] and \[39, 7\]"):
        cka(tokens, tokens[1:])
    with pytest.raises(FluxIRError, match="takes 4 tokens or more: got 3"):
        cka(tokens[:3], tokens[:3])
    assert math.isnan(cka(tokens, torch.ones(40, 2)))
