"""The state of batches: saved and taken up at any point, it gives what would have followed; another one is refused."""

import random

import pytest
import torch

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.splits import Split
from tests.sae.data.numbered_source import IMG, NumberedSource, batches_of, rows_of, same


@pytest.mark.parametrize("live", [False, True])
def test_going_on_from_any_point_gives_what_would_have_followed(live):
    source = NumberedSource(7)
    of = source.stream if live else source
    epochs = 1 if live else 2
    whole = rows_of(batches_of(of, epochs=epochs))
    draw = random.Random(0)
    for stop in {0, 1, len(whole) - 1, len(whole), *draw.sample(range(len(whole)), 12)}:
        batches = batches_of(of, epochs=epochs)
        for _ in range(stop):
            next(batches)
        state = batches.state()
        batches.close()
        resumed = batches_of(of, epochs=epochs, prefetch=bool(stop % 2))
        resumed.restore(state)
        assert resumed.tokens == sum(len(rows) for rows in whole[:stop])
        assert same(rows_of(resumed), whole[stop:]), stop
        assert not list(resumed)


def test_a_state_can_be_saved_as_plain_tensors_and_numbers(tmp_path):
    batches = batches_of(NumberedSource())
    next(batches)
    torch.save(batches.state(), tmp_path / "state.pt")
    after = rows_of(batches)
    again = batches_of(NumberedSource())
    again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(rows_of(again), after)


def test_going_on_reads_one_buffer_again_and_nothing_before_it():
    source = NumberedSource(40)
    batches = batches_of(source, prefetch=False)
    for _ in range(71):
        next(batches)
    state = batches.state()
    resumed = batches_of(source, prefetch=False)
    source.reads.clear()
    resumed.restore(state)
    next(resumed)
    # a buffer of 32 tokens comes from blocks of 6 tokens, read at two sites
    assert len(source.reads) <= 2 * 7


def test_taking_up_a_state_twice_or_in_the_middle_is_the_same():
    batches = batches_of(NumberedSource())
    next(batches)
    state = batches.state()
    rest = rows_of(batches)
    other = batches_of(NumberedSource())
    for _ in range(4):
        next(other)
    for _ in range(2):
        other.restore(state)
        assert same(rows_of(other), rest)


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch_tokens": 8}, {"pool_bytes": 5000}, {"side": "held_out"}])
def test_a_state_of_other_settings_is_refused(change):
    split = Split("prompt", 0.5)
    state = batches_of(NumberedSource(), split=split).state()
    with pytest.raises(FluxIRError, match=f"{next(iter(change))} was"):
        batches_of(NumberedSource(), split=split, **change).restore(state)


def test_a_state_of_other_content_is_refused():
    """As many tokens of the same sites, steps and prompts."""
    state = batches_of(NumberedSource()).state()
    with pytest.raises(FluxIRError, match="content was 5 of 0 and is 5 of 1"):
        batches_of(NumberedSource(seed=1)).restore(state)


def test_a_state_of_a_collection_that_has_grown_is_refused():
    state = batches_of(NumberedSource()).state()
    with pytest.raises(FluxIRError, match="tokens was 180 and is 216"):
        batches_of(NumberedSource(6)).restore(state)


def test_a_state_of_one_process_is_that_of_two():
    one, two = batches_of(NumberedSource()), batches_of(NumberedSource(), ranks=Ranks(1, 2))
    next(one)
    two.restore(one.state())
    assert torch.equal(next(two).values[IMG], next(one).values[IMG][8:])
