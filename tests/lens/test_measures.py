"""The numbers beside the pictures, against values worked out by hand."""

import math

import pytest
import torch

from flux_ir.lens.measures import cosine, json_number, psnr_db, relative_distance


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
