"""Batches: every token once an epoch, in an order that only the seed decides, whatever reads it and however often."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.capture.recorder import StepContext
from flux_ir.capture.store import CapturePlan
from flux_ir.capture.token_blocks import Generation, TokenBlock
from flux_ir.capture.tokens import open_source
from flux_ir.capture.whole import write_capture
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.chunks import StreamFeed
from flux_ir.sae.data import TokenBatches, choose_sites, sites_in_lockstep
from flux_ir.sae.filters import Filters
from flux_ir.sae.measure_data import measure_normalisation, norm_limits, sample_tokens
from flux_ir.sae.splits import Split, split_prompts, split_source
from flux_ir.sites import Site, all_sites, match_sites

IMG, OTHER_IMG, TXT, WHOLE = (Site.parse(name) for name in ("double.0.img", "double.1.img", "double.0.txt", "single.0"))
TOKENS = {"img": (0, 12), "txt": (7, 0), None: (7, 12)}  # text and image
PLENTY = 2**30


@dataclass
class NumberedSource:
    """Tokens that say who they are: [generation, step, place, is text, site]; `used_txt` may be known."""

    count: int = 5
    sites: list[Site] = field(default_factory=lambda: [IMG, OTHER_IMG])
    steps: tuple[int, ...] = (0, 3, 4)
    dtype: torch.dtype = torch.float32
    used_txt: int | None = None
    model: str | None = "random"
    repeats: int = 1
    reads: list = field(default_factory=list)

    @property
    def generations(self):
        return [Generation(f"{i:016x}", f"prompt {i // self.repeats}", Path(f"{i}.pt")) for i in range(self.count)]

    def d(self, site):
        return 5

    def tokens(self, site):
        return sum(TOKENS[site.stream])

    def read(self, index, site, step):
        self.reads.append((index, step))
        txt, img = TOKENS[site.stream]
        places = torch.cat([torch.arange(txt), torch.arange(img)])
        is_text = torch.arange(txt + img) < txt
        columns = [torch.full_like(places, n) for n in (index, step)]
        values = torch.stack([*columns, places, is_text, torch.full_like(places, self.sites.index(site))], dim=1)
        one = self.generations[index]
        return TokenBlock(values.to(self.dtype), None, site, step, one.id, one.prompt, places.int(), txt, self.used_txt)

    def everything(self, site, steps=None):
        """All of its tokens, sorted."""
        blocks = [self.read(i, site, step).values for i in range(self.count) for step in steps or self.steps]
        return sorted_rows(torch.cat(blocks))

    def stream(self):
        """Its blocks as the network makes them: a generation after the other, step by step."""
        for i in range(self.count):
            for step in self.steps:
                for site in self.sites:
                    yield self.read(i, site, step)


def sorted_rows(tokens):
    return sorted(map(tuple, tokens.tolist()))


def batches_of(source, sites=(IMG, OTHER_IMG), **changes):
    known = {"batch_tokens": 16, "pool_bytes": 80 * (55), "seed": 1}
    return TokenBatches(source, list(sites), **{**known, **changes})


def rows_of(batches, site=IMG):
    return [batch.values[site].clone() for batch in batches]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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
    pool_bytes = pool_batches * batch * (2 * 20 + 15)
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
    got = rows_of(batches_of(source, batch_tokens=64, pool_bytes=640 * 55))
    generations = [len(rows[:, 0].unique()) for rows in got[:-1]]
    assert min(generations) > 8  # in reading order a batch would have 2
    # tokens that were read last are not systematically drawn last
    assert all(len(rows[:, 1].unique()) == 3 for rows in got[:-1])


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


def test_a_state_of_a_collection_that_has_grown_is_refused():
    state = batches_of(NumberedSource()).state()
    with pytest.raises(FluxIRError, match="tokens was 180 and is 216"):
        batches_of(NumberedSource(6)).restore(state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(world_size):
    whole = rows_of(batches_of(NumberedSource()))
    parts = [rows_of(batches_of(NumberedSource(), ranks=Ranks(r, world_size))) for r in range(world_size)]
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    assert same(whole, joined)
    sizes = [len(part) for part in next(zip(*parts, strict=True))]
    assert max(sizes) - min(sizes) <= 1


def test_a_state_of_one_process_is_that_of_two():
    one, two = batches_of(NumberedSource()), batches_of(NumberedSource(), ranks=Ranks(1, 2))
    next(one)
    two.restore(one.state())
    assert torch.equal(next(two).values[IMG], next(one).values[IMG][8:])


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


def test_the_pool_is_as_large_as_allowed_or_as_the_data():
    small, large = batches_of(NumberedSource()), batches_of(NumberedSource(), pool_bytes=PLENTY)
    for batches in (small, large):
        next(batches)
    assert small._pool.nbytes <= 80 * 55
    assert small._pool.capacity == 80
    assert large._pool.capacity == 180


def resident_anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says")
def test_memory_stays_within_the_pool_and_a_few_batches():
    def stream():
        for i in range(200):  # 200 MiB in all
            values = torch.randn(2**10, 2**8).expand(1, -1, -1)[0]
            yield TokenBlock(values, None, IMG, 0, str(i), "", torch.arange(2**10, dtype=torch.int32), 0, None)

    batches = TokenBatches(stream, [IMG], batch_tokens=2**11, pool_bytes=16 * 2**20)
    next(batches)
    before, most = resident_anonymous_bytes(), 0
    for _ in batches:
        most = max(most, resident_anonymous_bytes())
    assert most - before < 24 * 2**20


def test_batches_keep_their_values_while_somebody_holds_them():
    kept = [batch.values[IMG] for batch in batches_of(NumberedSource())]
    views = [batch.values[IMG][:3] for batch in batches_of(NumberedSource())]
    fresh = rows_of(batches_of(NumberedSource()))
    assert same(kept, fresh)
    assert same(views, [rows[:3] for rows in fresh])


def test_leaving_early_ends_the_thread():
    import threading

    before = threading.active_count()
    with batches_of(NumberedSource()) as batches:
        next(batches)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_leaving_a_stream_early_ends_it():
    ended = []

    def stream():
        try:
            yield from NumberedSource(50).stream()
        finally:
            ended.append(True)

    for prefetch in (True, False):
        ended.clear()
        with batches_of(stream, prefetch=prefetch) as batches:
            next(batches)
            assert not ended
        assert ended


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
    with pytest.raises(FluxIRError, match=r"1 of .* tokens of double\.1\.img at step 3 in 2\.pt hold NaN or infinity"):
        list(batches_of(Broken(), prefetch=prefetch, filters=filters))


def test_padding_may_hold_anything():
    class Padded(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            block.values[4:7] = float("nan")
            return block

    source = Padded(sites=[WHOLE], used_txt=4)
    assert sum(map(len, rows_of(batches_of(source, [WHOLE]), WHOLE))) == 5 * 3 * 16
    with pytest.raises(FluxIRError, match="3 of 19 tokens"):
        list(batches_of(source, [WHOLE], filters=Filters(padding=True)))


def test_tokens_of_another_width_or_dtype_are_refused():
    class Mixed(NumberedSource):
        def read(self, index, site, step):
            block = super().read(index, site, step)
            return block._replace(values=block.values[:, :4] if index == 2 else block.values)

    with pytest.raises(FluxIRError, match=r"5 wide: got torch\.float32 and 4 in 2\.pt"):
        list(batches_of(Mixed()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1: got 0"),
        ({"epochs": 0}, "epochs must be at least 1: got 0"),
        ({"batch_tokens": 0}, "a token for each of 1 processes: got 0"),
        ({"pool_bytes": 1000}, "must hold 4 batches, or all of the data"),
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


def test_a_stream_may_give_sites_in_any_order_and_others_besides():
    source = NumberedSource(2, sites=[OTHER_IMG, IMG, TXT])
    feed = StreamFeed(source.stream, [IMG, OTHER_IMG], Filters(steps=[3]), Split("prompt", 0.0), "training")
    chunks = list(feed.chunks(0))
    assert [(chunk.ordinal, chunk.generation, chunk.step) for chunk in chunks] == [(0, 0, 3), (1, 1, 3)]
    assert list(chunks[0].values) == [IMG, OTHER_IMG]


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
    assert len(set(source.reads)) == found.tokens // 12


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


# Files


@pytest.fixture
def captures(tmp_path, tiny_flux_params):
    """Writes captures of random values: their sites by pattern, their dtype, and which value is broken."""

    def write(count=6, sites=("double.*.img",), dtype=torch.bfloat16, folder="captures", params=None, **metadata):
        params = params or tiny_flux_params
        draw = torch.Generator().manual_seed(0)
        for i in range(count):
            plan = CapturePlan(
                params,
                match_sites(sites, all_sites(params.depth, params.depth_single_blocks)),
                timesteps=(1.0, 0.6, 0.3, 0.0),
                txt_tokens=7,
                img_tokens=12,
                guidance=0.0,
                metadata={"generation_id": f"{i:08x}", "prompt": f"prompt {i // 2}", "model": "random", **metadata},
                steps=(0, 2),
                dtype=dtype,
                rounds=True,
                context_dtype=torch.float32,
            )
            values = {
                (step, site): torch.randn(plan.shape(site), generator=draw) for step in (0, 2) for site in plan.sites
            }
            context = StepContext(torch.zeros(plan.img_shape), torch.zeros(plan.y_shape), 7)
            if i == count - 1 and metadata.get("broken"):
                values[2, plan.sites[0]][0, 5, 1] = float("nan")
            write_capture(tmp_path / folder / f"{i}.pt", plan, values, {0: context, 2: context})
        return tmp_path / folder

    return write


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_captures_come_back_as_stored_for_all_sites_in_one_pass(captures, dtype):
    source = open_source(captures(dtype=dtype))
    sites = choose_sites(source, ["double.*.img"])
    assert list(map(str, sites)) == ["double.0.img", "double.1.img"]
    batches = TokenBatches(source, sites, batch_tokens=20, pool_bytes=100 * 1000)
    got = {site: [] for site in sites}
    for batch in batches:
        for site in sites:
            got[site].append(batch.values[site])
    for site in sites:
        stored = torch.cat([source.read(i, site, step).values for i in range(6) for step in (0, 2)])
        assert got[site][0].dtype == dtype
        assert sorted_rows(torch.cat(got[site])) == sorted_rows(stored)


@dataclass
class OneByOne:
    """A source that can only read a block at a time."""

    source: object

    def __getattr__(self, name):
        if name == "read_together":
            raise AttributeError(name)
        return getattr(self.source, name)


@pytest.mark.parametrize("ahead", [(1, 1), (1, 2**20), (3 * 12 * 64 * 2 * 2, 1), (2**20, 2**20)])
@pytest.mark.parametrize("prefetch", [True, False])
def test_batches_do_not_depend_on_how_files_are_read(captures, monkeypatch, ahead, prefetch):
    for name, nbytes in zip(("_AHEAD_BYTES", "_ANNOUNCED_BYTES"), ahead, strict=True):
        monkeypatch.setattr(f"flux_ir.sae.chunks.{name}", nbytes)
    source = open_source(captures(15))
    sites = choose_sites(source, ["double.*.img"])
    known = {"batch_tokens": 20, "pool_bytes": 100 * (2 * source.d(sites[0]) * 2 + 15), "epochs": 2}
    slow = rows_of(TokenBatches(OneByOne(source), sites, **known, prefetch=False), sites[1])
    quick = TokenBatches(source, sites, **known, prefetch=prefetch)
    assert same(rows_of(quick, sites[1]), slow)
    assert quick.feed._together is source
    for stop in (1, 9, 20):
        begun = TokenBatches(source, sites, **known, prefetch=prefetch)
        for _ in range(stop):
            next(begun)
        resumed = TokenBatches(source, sites, **known, prefetch=prefetch)
        resumed.restore(begun.state())
        begun.close()
        assert same(rows_of(resumed, sites[1]), slow[stop:])


def test_chunks_that_are_too_large_for_memory_are_mapped(captures, monkeypatch):
    source = open_source(captures())
    sites = choose_sites(source, ["double.0.img"])
    quick = rows_of(TokenBatches(source, sites, batch_tokens=20, pool_bytes=PLENTY), sites[0])
    monkeypatch.setattr("flux_ir.sae.chunks._BYTES_IN_MEMORY", 100)
    mapped = TokenBatches(source, sites, batch_tokens=20, pool_bytes=PLENTY)
    assert mapped.feed._together is None
    assert same(rows_of(mapped, sites[0]), quick)


def test_a_file_that_breaks_while_it_is_trained_on_is_told_where_batches_are_taken(captures):
    folder = captures()
    source = open_source(folder)
    (folder / "4.pt").write_bytes((folder / "4.pt").read_bytes()[:-500])
    with pytest.raises(FluxIRError, match=r"4\.pt is not a complete capture file"):
        list(TokenBatches(source, choose_sites(source, ["*"]), batch_tokens=20, pool_bytes=PLENTY))


def test_float8_is_dequantised(captures):
    source = open_source(captures(dtype=torch.float8_e4m3fn))
    (site,) = choose_sites(source, ["double.0.img"])
    got = torch.cat(rows_of(TokenBatches(source, [site], batch_tokens=20, pool_bytes=PLENTY), site))
    assert got.dtype == torch.bfloat16
    stored = torch.cat([source.read(i, site, step).floats() for i in range(6) for step in (0, 2)])
    assert sorted_rows(got) == sorted_rows(stored)


def test_halves_of_single_blocks_are_sites_too(captures):
    source = open_source(captures(sites=("single.1", "double.0.img")))
    assert list(map(str, choose_sites(source, ["single.1.img", "double.*"]))) == ["double.0.img", "single.1.img"]
    assert list(map(str, choose_sites(source, ["single.*"]))) == ["single.1"]
    (site,) = choose_sites(source, ["single.1.txt"])
    got = torch.cat(rows_of(TokenBatches(source, [site], batch_tokens=9, pool_bytes=PLENTY), site))
    assert len(got) == 6 * 2 * 7


def test_a_site_that_was_not_captured_names_the_nearest(captures):
    source = open_source(captures())
    with pytest.raises(FluxIRError, match=r"no site of these captures matches 'double\.3\.img'") as error:
        choose_sites(source, ["double.3.img"])
    assert "double.0.img" in error.value.hint


def test_a_nan_in_a_file_names_the_file(captures):
    source = open_source(captures(broken=True))
    with pytest.raises(FluxIRError, match=r"1 of 12 tokens of double\.0\.img at step 2 in .*5\.pt hold NaN"):
        list(TokenBatches(source, choose_sites(source, ["*"]), batch_tokens=20, pool_bytes=PLENTY))


def test_half_written_mixed_and_missing_captures_are_one_line_each(captures, tmp_path, tiny_flux_params):
    folder = captures()
    whole = (folder / "0.pt").read_bytes()
    (folder / "0.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FluxIRError, match="not a complete capture"):
        open_source(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FluxIRError):
        open_source(tmp_path / "empty")
    mixed = captures(folder="mixed")
    captures(1, folder="mixed", model="another")
    with pytest.raises(FluxIRError, match="model"):
        open_source(mixed)


def test_plain_arrays_are_data(tmp_path):
    array = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    source = open_source(tmp_path / "a.npy")
    assert choose_sites(source, ["anything"]) == [None]
    split = split_source(source, 0.25)
    parts = [
        torch.cat(
            rows_of(TokenBatches(source, [None], batch_tokens=64, pool_bytes=PLENTY, split=split, side=side), None)
        )
        for side in ("training", "held_out")
    ]
    assert min(map(len, parts)) > 0
    assert sorted_rows(torch.cat(parts)) == sorted_rows(torch.from_numpy(array))
    assert split.by == "image"
    assert measure_normalisation(source, [None])[None].tokens == 1000
