"""Which tokens are left out, and the check that what stays is finite."""

import pytest
import torch

from flux_ir.activations.blocks import TokenBlock, run_of
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.filters import Filters, all_finite, lengths
from flux_ir.sites import Site

IMG, TXT, WHOLE = (Site.parse(name) for name in ("double.0.img", "double.0.txt", "single.0"))


def block(site, txt=7, img=12, used_txt=3):
    leading = {"img": 0, "txt": txt, None: txt}[site.stream]
    places = torch.cat([torch.arange(leading), torch.arange(0 if site.stream == "txt" else img)]).int()
    return TokenBlock(torch.zeros(len(places), 4), None, site, 0, "0", "a prompt", places, leading, used_txt)


@pytest.mark.parametrize(("stream", "rows"), [(None, slice(0, 19)), ("txt", slice(0, 7)), ("img", slice(7, 19))])
def test_one_half_of_a_whole_block_can_be_had(stream, rows):
    assert Filters(stream=stream).rows(block(WHOLE)) == range(19)[rows]


def used(filters, site, **known):
    """Which tokens of one generation are no padding."""
    found = filters.used(run_of(block(site, **known), filters.rows(block(site, **known))))
    return None if found is None else found[0].tolist()


def test_padding_of_the_text_is_left_out_and_image_tokens_stay():
    assert used(Filters(), TXT) == [True] * 3 + [False] * 4
    assert used(Filters(), WHOLE) == [True] * 3 + [False] * 4 + [True] * 12
    assert used(Filters(stream="txt"), WHOLE) == [True] * 3 + [False] * 4
    assert used(Filters(), IMG) is None
    assert used(Filters(stream="img"), WHOLE) is None


def test_padding_stays_where_it_is_asked_for_or_unknown():
    assert used(Filters(padding=True), TXT) is None
    assert used(Filters(), TXT, used_txt=None) is None


def test_a_prompt_that_fills_the_text_has_no_padding():
    assert all(used(Filters(), TXT, used_txt=7))


def test_only_a_part_of_the_tokens_knows_its_padding_too():
    part = Filters().used(run_of(block(WHOLE), range(2, 10)))
    assert part[0].tolist() == [True] + [False] * 4 + [True] * 3


def test_what_is_read_of_a_site_is_the_half_that_is_asked_for():
    assert Filters().half(WHOLE) == WHOLE
    assert Filters(stream="txt").half(WHOLE) == Site.parse("single.0.txt")
    assert Filters(stream="img").half(IMG) == IMG
    with pytest.raises(FluxIRError, match=r"double\.0\.txt has no img tokens: the filters left none"):
        Filters(stream="img").half(TXT)


def test_steps_are_sorted_and_unique_and_must_be_there():
    assert Filters().steps_of([4, 0, 2]) == [0, 2, 4]
    assert Filters(steps=[2, 0, 2]).steps_of([0, 2, 4]) == [0, 2]
    with pytest.raises(FluxIRError, match=r"got \[1, 3\]") as error:
        Filters(steps=[3, 1, 0]).steps_of([0, 2, 4])
    assert "0, 2, 4" in error.value.hint


def test_tokens_above_the_limit_are_outliers():
    values = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 5.1]])
    assert lengths(values.bfloat16()).tolist() == pytest.approx([5.0, 10.0, 5.09375])
    filters = Filters(outlier_factor=2.0, limits={(IMG, 3): 5.0})
    assert filters.within_limit(values, IMG, 3).tolist() == [True, False, False]
    assert Filters().within_limit(values, IMG, 3) is None
    with pytest.raises(FluxIRError, match=r"no length was measured for double\.0\.img at step 1"):
        filters.within_limit(values, IMG, 1)


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0, float("nan"), float("inf")])
def test_a_factor_that_leaves_out_half_of_the_tokens_is_refused(factor):
    with pytest.raises(FluxIRError, match="must be above 1"):
        Filters(outlier_factor=factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_in_every_dtype(dtype, bad):
    values = torch.randn(50, 7).to(dtype)
    assert all_finite(values)
    values[11, 3] = bad
    assert not all_finite(values)


def test_opposite_infinities_do_not_cancel():
    assert not all_finite(torch.tensor([[float("inf"), -float("inf")]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_huge_finite_values_pass_though_their_sum_overflows(dtype):
    assert all_finite(torch.full((100, 8), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_told_right(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = torch.isfinite(every)
    assert all_finite(every[finite])
    assert not any(all_finite(value) for value in every[~finite].split(1))


def test_numbers_beside_infinity_are_told_right():
    infinity = torch.tensor(float("inf"))
    largest = torch.nextafter(infinity, torch.tensor(0.0))
    assert all_finite(torch.stack([largest, -largest]))
    assert not all_finite(torch.tensor([float("nan")]).neg())
    assert not all_finite(torch.tensor([[0.0, float("inf")]]).double())


def test_no_tokens_are_finite():
    assert all_finite(torch.empty(0, 4))
