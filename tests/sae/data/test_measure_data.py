"""What is measured before training: the mean and scale of tokens, the lengths of outliers, and a sample."""

import pytest
import torch

from flux_ir.sae.data.filters import Filters
from flux_ir.sae.data.measure import measure_normalisation, norm_limits, sample_tokens
from flux_ir.sae.data.splits import split_source
from tests.sae.data.numbered_source import IMG, OTHER_IMG, NumberedSource, batches_of, rows_of


def test_normalisation_is_exact_and_of_the_training_side_only():
    source = NumberedSource(30)
    split = split_source(source, 0.3)
    rows = [r for r in source.everything(IMG) if split.has("training", "", source.generations[int(r[0])].prompt)]
    tokens = torch.tensor(rows, dtype=torch.float64)
    found = measure_normalisation(source, [IMG, OTHER_IMG], split=split)
    torch.testing.assert_close(found[IMG].mean, tokens.mean(0), rtol=1e-14, atol=1e-14)
    length = (tokens - tokens.mean(0)).norm(dim=1).mean()
    assert found[IMG].scale == pytest.approx(5**0.5 / float(length), rel=1e-14)
    assert found[IMG].tokens == len(tokens) < 30 * 36
    assert found[OTHER_IMG].mean[4] == 1.0
    live = measure_normalisation(source.stream, [IMG], split=split)[IMG]
    torch.testing.assert_close(live.mean, found[IMG].mean, rtol=1e-14, atol=1e-14)


def test_normalisation_reads_no_more_than_it_needs():
    source = NumberedSource(100)
    found = measure_normalisation(source, [IMG], least_tokens=500)[IMG]
    assert 500 <= found.tokens < 540
    assert len(set(source.reads)) > 60  # of many images and steps


def test_normalisation_of_equal_tokens_leaves_their_length():
    class Constant(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            return block._replace(values=torch.full_like(block.values, 3.0))

    assert measure_normalisation(Constant(), [IMG])[IMG].scale == 1.0


def test_outliers_are_measured_per_site_and_step_and_left_out_of_all_sites():
    class WithRegisters(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            length = 10.0 if step == 0 else 1.0
            values = torch.zeros_like(block.values)
            values[:, 0] = length
            if site == OTHER_IMG:
                values[4] *= 50
            return block._replace(values=values)

    source = WithRegisters()
    filters = norm_limits(source, [IMG, OTHER_IMG], Filters(outlier_factor=5.0))
    assert filters.limits[IMG, 0] == pytest.approx(50)
    assert filters.limits[OTHER_IMG, 3] == pytest.approx(5)
    got = torch.cat(rows_of(batches_of(source, filters=filters), OTHER_IMG))
    assert len(got) == 5 * 3 * 11
    assert float(got.max()) == 10.0
    assert norm_limits(source, [IMG], Filters()) == Filters()
    live = norm_limits(source.stream, [IMG, OTHER_IMG], Filters(outlier_factor=5.0))
    assert live.limits == filters.limits


def test_a_sample_is_seeded_and_without_repetition():
    source = NumberedSource(30)
    one, again = (sample_tokens(source, [IMG], 50, seed=4)[IMG] for _ in range(2))
    assert torch.equal(one, again)
    assert len(set(map(tuple, one.tolist()))) == 50
    assert len(one[:, 0].unique()) > 15
    assert len(sample_tokens(source, [IMG], 5000)[IMG]) == 30 * 36
