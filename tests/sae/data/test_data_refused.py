"""What cannot be batched: broken files, values that are no numbers, settings that leave nothing. Each is one line."""

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.sae.data.filters import Filters
from tests.sae.data.numbered_source import IMG, OTHER_IMG, WHOLE, NumberedSource, batches_of, rows_of


def test_the_loss_of_a_file_is_told_where_batches_are_taken():
    class Torn(NumberedSource):
        def read(self, index, site, step):
            if index == 3:
                raise FluxIRError("3.pt is not a complete capture file")
            return super().read(index, site, step)

    for prefetch in (True, False):
        with pytest.raises(FluxIRError, match="not a complete"):
            list(batches_of(Torn(), prefetch=prefetch))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("factor", [None, 10.0])
def test_values_that_are_no_numbers_are_refused_with_their_place(bad, prefetch, factor):
    class Broken(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            if (index, site, step) == (2, OTHER_IMG, 3):
                block.values[7, 1] = bad
            return block

    limits = {(site, step): 1e9 for site in (IMG, OTHER_IMG) for step in (0, 3, 4)}
    filters = Filters(outlier_factor=factor, limits=limits)
    with pytest.raises(
        FluxIRError, match=r"1 of .* tokens of double\.1\.img at step 3 in generation 0+2 of 2\.pt hold NaN or infinity"
    ):
        list(batches_of(Broken(), prefetch=prefetch, filters=filters))


def test_padding_may_hold_anything():
    class Padded(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            block.values[4:7] = float("nan")
            return block

    source = Padded(sites=[WHOLE], used_txt=4)
    assert sum(map(len, rows_of(batches_of(source, [WHOLE]), WHOLE))) == 5 * 3 * 16
    with pytest.raises(FluxIRError, match=r"hold NaN"):
        list(batches_of(source, [WHOLE], filters=Filters(padding=True)))


def test_tokens_of_another_width_or_dtype_are_refused():
    class Mixed(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            return block._replace(values=block.values[:, :4] if index == 2 else block.values)

    with pytest.raises(FluxIRError, match=r"5 wide: got torch\.float32 and 4 in generation 0+2 of 2\.pt"):
        list(batches_of(Mixed()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1: got 0"),
        ({"epochs": 0}, "epochs must be at least 1: got 0"),
        ({"batch_tokens": 0}, "a token for each of 1 processes: got 0"),
        ({"pool_bytes": 1000}, "must hold 4 batches, or all of the data twice"),
        ({"filters": Filters(steps=[1])}, r"must be among those captured: got \[1\]"),
        ({"filters": Filters(steps=[])}, "must be among those captured: got none"),
        ({"filters": Filters(stream="txt")}, "the filters left none"),
        ({"side": "held_out"}, "no generation of 5 is on the held_out side"),
        ({"filters": Filters(outlier_factor=9.0)}, r"no length was measured for double\.0\.img"),
    ],
)
def test_wrong_input_is_told_in_one_line(change, message):
    with pytest.raises(FluxIRError, match=message) as error:
        list(batches_of(NumberedSource(), **change))
    assert error.value.hint
    assert "\n" not in str(error.value)


def test_no_sites_and_an_empty_stream_are_errors():
    with pytest.raises(FluxIRError, match="there must be a site"):
        batches_of(NumberedSource(), [])
    with pytest.raises(FluxIRError, match="there are no tokens"):
        list(batches_of(lambda: iter(())))
    with pytest.raises(FluxIRError, match="a live stream is one epoch long: got 2"):
        batches_of(NumberedSource().stream, epochs=2)


def test_a_stream_without_one_of_the_sites_is_an_error():
    with pytest.raises(FluxIRError, match=r"without double\.1\.img at step 0"):
        list(batches_of(NumberedSource(sites=[IMG]).stream))
