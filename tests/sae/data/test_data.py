"""Batches: every token once an epoch, in an order that only the seed decides, whatever reads it and however often."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.feed import StreamFeed, read_blocks
from flux_ir.sae.data.filters import Filters, sites_in_lockstep
from flux_ir.sae.data.splits import Split, split_prompts, split_source
from tests.sae.data.numbered_source import (
    IMG,
    OTHER_IMG,
    SLOT_BYTES,
    TXT,
    WHOLE,
    NumberedSource,
    batches_of,
    rows_of,
    same,
    sorted_rows,
)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 9),
    batch=st.integers(1, 40),
    pool_batches=st.integers(4, 12),
    seed=st.integers(0, 3),
    epochs=st.integers(1, 3),
    live=st.booleans(),
)
def test_every_token_comes_exactly_once_an_epoch(count, batch, pool_batches, seed, epochs, live):
    source = NumberedSource(count)
    epochs = 1 if live else epochs
    pool_bytes = pool_batches * batch * SLOT_BYTES
    batches = batches_of(
        source.stream if live else source, batch_tokens=batch, pool_bytes=pool_bytes, seed=seed, epochs=epochs,
        prefetch=False,
    )  # fmt: skip
    got = rows_of(batches)
    in_epoch = count * 3 * 12
    sizes = [len(rows) for rows in got]
    assert sizes == ([batch] * (in_epoch // batch) + [in_epoch % batch] * (in_epoch % batch > 0)) * epochs
    for epoch in torch.cat(got).split(in_epoch):
        assert sorted_rows(epoch) == source.everything(IMG)
    assert batches.tokens == epochs * in_epoch
    assert live or batches.tokens_at_most == batches.tokens


def test_row_i_is_the_same_token_at_every_site():
    for batch in batches_of(NumberedSource()):
        one, other = batch.values[IMG], batch.values[OTHER_IMG]
        assert torch.equal(one[:, :4], other[:, :4])
        assert set(one[:, 4].tolist()) == {0}
        assert set(other[:, 4].tolist()) == {1}
        assert torch.equal(one[:, 0].int(), batch.generations)
        assert batch.generations.dtype == torch.int32
        assert torch.equal(one[:, 1].short(), batch.steps)
        assert batch.steps.dtype == torch.int16
        assert not batch.is_text.any()


def test_whole_single_blocks_say_which_tokens_are_text():
    source = NumberedSource(sites=[WHOLE])
    got = list(batches_of(source, [WHOLE]))
    for batch in got:
        assert torch.equal(batch.values[WHOLE][:, 3].bool(), batch.is_text)
    assert sum(int(batch.is_text.sum()) for batch in got) == 5 * 3 * 7


def test_the_order_depends_on_the_seed_and_not_on_the_thread():
    first = rows_of(batches_of(NumberedSource()))
    assert same(first, rows_of(batches_of(NumberedSource())))
    assert same(first, rows_of(batches_of(NumberedSource(), prefetch=False)))
    assert not same(first, rows_of(batches_of(NumberedSource(), seed=2)))


def test_epochs_come_in_different_orders():
    got = torch.cat(rows_of(batches_of(NumberedSource(), epochs=2)))
    first, second = got.split(len(got) // 2)
    assert not torch.equal(first, second)


def test_batches_mix_generations_and_steps():
    source = NumberedSource(60)
    got = rows_of(batches_of(source, batch_tokens=64, pool_bytes=640 * SLOT_BYTES))
    generations = [len(rows[:, 0].unique()) for rows in got[:-1]]
    assert min(generations) > 8  # in reading order a batch would have 2
    # tokens that were read last are not systematically drawn last
    assert all(len(rows[:, 1].unique()) == 3 for rows in got[:-1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(world_size):
    whole = rows_of(batches_of(NumberedSource()))
    parts = [rows_of(batches_of(NumberedSource(), ranks=Ranks(r, world_size))) for r in range(world_size)]
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    assert same(whole, joined)
    sizes = [len(part) for part in next(zip(*parts, strict=True))]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("limit", [1, 16, 70, 500])
def test_max_tokens_is_kept_to_the_token_and_goes_on_over_epochs(limit):
    batches = batches_of(NumberedSource(), max_tokens=limit)
    assert sum(map(len, rows_of(batches))) == batches.tokens == batches.tokens_at_most == limit
    stopped = batches_of(NumberedSource(), max_tokens=limit, epochs=1)
    assert sum(map(len, rows_of(stopped))) == min(limit, 180) == stopped.tokens_at_most


def test_a_stream_ends_when_it_ends():
    source = NumberedSource()
    batches = batches_of(source.stream, max_tokens=1000)
    assert batches.tokens_at_most == 1000
    assert sum(map(len, rows_of(batches))) == 180
    assert batches_of(source.stream).tokens_at_most is None


def test_held_out_prompts_of_a_stream_are_those_of_captures():
    source = NumberedSource(40, repeats=2)
    split = split_source(source, 0.3)
    assert split == split_prompts([one.prompt for one in source.generations], 0.3)
    for side in ("training", "held_out"):
        stored = torch.cat(rows_of(batches_of(source, split=split, side=side)))
        live = torch.cat(rows_of(batches_of(source.stream, split=split, side=side)))
        places = ["generation", "step", "place"]
        assert sorted_rows(stored[:, : len(places)]) == sorted_rows(live[:, : len(places)])
    there = set(torch.cat(rows_of(batches_of(source, split=split)))[:, 0].int().tolist())
    held = set(torch.cat(rows_of(batches_of(source, split=split, side="held_out")))[:, 0].int().tolist())
    assert there | held == set(range(40))
    assert not there & held
    assert {i // 2 for i in there}.isdisjoint({i // 2 for i in held})


def test_filters_choose_stream_steps_and_padding():
    source = NumberedSource(sites=[WHOLE, TXT], used_txt=4)
    text = torch.cat(rows_of(batches_of(source, [WHOLE, TXT], filters=Filters(stream="txt", steps=[3])), WHOLE))
    assert sorted_rows(text) == [row for row in source.everything(WHOLE, [3]) if row[3] and row[2] < 4]
    both = torch.cat(rows_of(batches_of(source, [WHOLE], filters=Filters(padding=True)), WHOLE))
    assert sorted_rows(both) == source.everything(WHOLE)
    image = torch.cat(rows_of(batches_of(source, [WHOLE], filters=Filters(stream="img")), WHOLE))
    assert len(image) == 5 * 3 * 12


def test_sites_with_other_tokens_do_not_share_batches():
    assert sites_in_lockstep([IMG, TXT, WHOLE, OTHER_IMG], Filters()) == [[IMG, OTHER_IMG], [TXT], [WHOLE]]
    assert sites_in_lockstep([IMG, WHOLE], Filters(stream="img")) == [[IMG, WHOLE]]
    assert sites_in_lockstep([None], Filters()) == [[None]]
    with pytest.raises(FluxIRError, match=r"double\.0\.img has 12 of them, double\.0\.txt has 7"):
        list(batches_of(NumberedSource(sites=[IMG, TXT]), [IMG, TXT]))


def test_a_stream_may_give_sites_in_any_order_and_others_besides():
    source = NumberedSource(2, sites=[OTHER_IMG, IMG, TXT])
    feed = StreamFeed(source.stream, [IMG, OTHER_IMG], Filters(steps=[3]), Split("prompt", 0.0), "training")
    blocks = list(read_blocks(feed))
    assert [(rows.ordinal, rows.generations[0], rows.step) for rows in blocks] == [(0, 0, 3), (1, 1, 3)]
    assert list(blocks[0].values) == [IMG, OTHER_IMG]
