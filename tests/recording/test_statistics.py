"""Statistics of sites: right, exact over any split of the work that keeps its order, and read back bit for bit."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ir.errors import FluxIRError
from flux_ir.recording.statistics import SiteStatistics, read_statistics, write_statistics
from flux_ir.recording.stored_dtype import dequantised, scaled
from flux_ir.sites import Site

D = 48
SITE = Site.parse("double.1.img")


def tokens(seed, count=37, dtype=torch.float32):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gathered(*blocks):
    statistics = SiteStatistics(D)
    for block in blocks:
        statistics.add(block)
    return statistics


def bits(statistics):
    return {name: tensor.tolist() for name, tensor in statistics.to_tensors("x").items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_say_what_the_values_are_like(dtype):
    blocks = [3 + tokens(seed, count, dtype) for seed, count in ((0, 37), (1, 1), (2, 100))]
    statistics, x = gathered(*blocks), torch.cat(blocks).double()
    assert statistics.count == 138
    torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.second_moment, x.square().mean(0), rtol=1e-12, atol=0)
    assert statistics.mean_norm == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-12)
    assert torch.equal(torch.from_numpy(statistics.max_abs).double(), x.abs().amax(0))


def test_axes_before_the_width_are_all_tokens():
    assert bits(gathered(tokens(0, 12).reshape(2, 6, D))) == bits(gathered(tokens(0, 12)))


def test_float8_counts_as_it_is_read():
    values, scale = scaled(tokens(0).reshape(1, 37, D))
    statistics = SiteStatistics(D)
    statistics.add(values, scale)
    assert bits(statistics) == bits(gathered(dequantised(values, scale)))


def test_dimensions_six_times_the_median_are_outliers():
    x = tokens(0, 4000)
    x[:, 5] *= 100
    x[:, 17] = 6.5  # constant, so not by its variance
    x[:, 30] *= 5.5
    assert gathered(x).outlier_dims.tolist() == [5, 17]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    expected = bits(gathered(tokens(0, 20_000)))
    try:
        torch.set_num_threads(threads)
        assert bits(gathered(tokens(0, 20_000))) == expected
    finally:
        torch.set_num_threads(before)


def test_merging_files_in_order_does_not_depend_on_who_gathered_them():
    """Per-file statistics, merged in the order of the index: the same whatever process made each."""
    files = [gathered(tokens(seed, 10 + seed)) for seed in range(6)]
    merged = SiteStatistics(D)
    for one in files:
        merged.merge(one)
    again = SiteStatistics(D)
    for one in (SiteStatistics.from_tensors(one.to_tensors("a"), "a") for one in files):  # as another process sends it
        again.merge(one)
    assert bits(again) == bits(merged)
    x = torch.cat([tokens(seed, 10 + seed) for seed in range(6)]).double()
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-12, atol=1e-15)


def test_nothing_is_zero():
    empty = SiteStatistics(D)
    empty.add(torch.zeros(0, D))
    assert empty.count == 0
    assert empty.mean_norm == 0.0
    assert not any(math.isnan(number) for number in empty.mean.tolist())
    assert empty.outlier_dims.tolist() == []


def test_the_file_holds_every_site_and_step_and_comes_back(tmp_path):
    path = tmp_path / "stats.safetensors"
    known = {f"{name}/step_{step}": gathered(tokens(step)) for name in ("single.2", "double.1.img") for step in (2, 0)}
    write_statistics(path, known)
    assert "double.1.img/step_2/mean" in load_file(path)
    read = read_statistics(path)
    assert list(read) == sorted(known)
    assert all(bits(read[at]) == bits(one) for at, one in known.items())
    first = path.read_bytes()
    write_statistics(path, dict(reversed(known.items())))
    assert path.read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "stats.safetensors"
    if content is None:
        save_file({"double.1.img/step_0/mean": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(FluxIRError, match=r"stats\.safetensors holds no statistics"):
        read_statistics(path)
    with pytest.raises(FluxIRError, match=r"nowhere\.safetensors holds no statistics"):
        read_statistics(tmp_path / "nowhere.safetensors")
