"""The state of batches: saved and taken up at any point, it gives what would have followed; another one is refused."""

import random

import pytest
import torch

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.splits import Split
from tests.sae.numbered_source import IMG, NumberedSource, batches_of, rows_of, same


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


def test_going_on_reads_only_what_the_pool_held():
    source = NumberedSource(40)
    batches = batches_of(source)
    for _ in range(70):
        next(batches)
    state = batches.state()
    batches.close()
    source.reads.clear()
    resumed = batches_of(source)
    resumed.restore(state)
    held = {c for c in state["chunk_of_slot"].tolist() if c >= 0}
    assert len(set(source.reads)) <= len(held) + 3 < 60


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


def test_a_state_of_a_pool_with_other_slots_is_refused(monkeypatch):
    """The same bytes hold another number of them."""
    batches = batches_of(NumberedSource())
    next(batches)
    state = batches.state()
    monkeypatch.setattr("flux_ir.sae.pool.Pool.BYTES_BESIDE", 15)
    with pytest.raises(FluxIRError, match="bytes_beside was 16 and is 15"):
        batches_of(NumberedSource()).restore(state)


def test_a_state_of_a_collection_that_has_grown_is_refused():
    state = batches_of(NumberedSource()).state()
    with pytest.raises(FluxIRError, match="tokens was 180 and is 216"):
        batches_of(NumberedSource(6)).restore(state)


def test_a_state_of_one_process_is_that_of_two():
    one, two = batches_of(NumberedSource()), batches_of(NumberedSource(), ranks=Ranks(1, 2))
    next(one)
    two.restore(one.state())
    assert torch.equal(next(two).values[IMG], next(one).values[IMG][8:])
