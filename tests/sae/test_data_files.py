"""Batches of files: captures of every dtype and plain arrays come back as stored, however they are read."""

import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from flux_ir.activations.tokens import open_source
from flux_ir.activations.whole import write_capture
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.recording.recorder import StepContext
from flux_ir.recording.store import CapturePlan
from flux_ir.sae.chunks import SourceFeed
from flux_ir.sae.data import TokenBatches, choose_sites
from flux_ir.sae.filters import Filters
from flux_ir.sae.measure_data import measure_normalisation
from flux_ir.sae.pool import Pool
from flux_ir.sae.splits import Split, split_source
from flux_ir.sites import all_sites, match_sites
from tests.sae.numbered_source import PLENTY, rows_of, same, sorted_rows


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


@dataclass
class Telling:
    """A source that counts what it was told of, and takes its time."""

    source: object
    told: int = 0
    unread: set = field(default_factory=set)
    most_unread: int = 0

    def __getattr__(self, name):
        return getattr(self.source, name)

    def announce(self, generation, *place, again):
        time.sleep(0.01)
        self.told += 1
        self.unread.add(generation)
        self.most_unread = max(self.most_unread, len(self.unread))
        self.source.announce(generation, *place, again=again)

    def read_together(self, generation, *place):
        self.unread.discard(generation)
        return self.source.read_together(generation, *place)


def test_what_is_announced_is_read_soon_and_nothing_more_is_after_the_end(captures):
    source = open_source(captures(200))
    telling, sites = Telling(source), choose_sites(source, ["double.0.img"])
    known = {"batch_tokens": 20, "pool_bytes": 100 * (source.d(sites[0]) * 2 + Pool.BYTES_BESIDE)}
    with TokenBatches(telling, sites, **known) as batches:
        next(batches)
    after = telling.told
    assert after < 300  # of 400
    time.sleep(0.1)
    assert telling.told == after
    assert 120 <= telling.most_unread <= 121


def test_no_more_files_are_announced_where_one_step_of_each_is_read_again(captures):
    source = open_source(captures(150))
    telling, sites = Telling(source), choose_sites(source, ["double.0.img"])
    feed = SourceFeed(telling, sites, Filters(), Split("prompt", 0.0), "training", 0)
    again = range(0, 300, 2)
    assert [chunk.ordinal for chunk in feed.chunks(0, start=300, also=again)] == list(again)
    assert telling.most_unread == 121  # the one that is about to be read, too


@pytest.mark.parametrize("ahead", [1, 3 * 12 * 64 * 2 * 2, 2**20])
@pytest.mark.parametrize("prefetch", [True, False])
def test_batches_do_not_depend_on_how_files_are_read(captures, monkeypatch, ahead, prefetch):
    monkeypatch.setattr("flux_ir.sae.chunks._AHEAD_BYTES", ahead)
    source = open_source(captures(15))
    sites = choose_sites(source, ["double.*.img"])
    known = {"batch_tokens": 20, "pool_bytes": 100 * (2 * source.d(sites[0]) * 2 + Pool.BYTES_BESIDE), "epochs": 2}
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


@pytest.mark.parametrize(
    ("known", "memory", "again"),
    [
        ({}, 2**40, True),
        ({}, 80_000, False),
        ({"page_cache": True}, 80_000, True),
        ({"page_cache": False}, 2**40, False),
        ({"ranks": Ranks(0, 2)}, 80_000, True),
    ],
)
def test_files_that_fit_into_memory_are_left_in_the_page_cache(captures, monkeypatch, known, memory, again):
    monkeypatch.setattr("flux_ir.sae.chunks._memory_bytes", lambda: memory)
    told = []
    monkeypatch.setattr("flux_ir.activations.alike.Alike.announce", lambda *_, again: told.append(again))
    source = open_source(captures(15))
    sites = choose_sites(source, ["double.0.img"])
    with TokenBatches(source, sites, batch_tokens=20, pool_bytes=PLENTY, **known) as batches:
        assert batches.feed.tokens_at_most == 360
        next(batches)
    assert set(told) == {again}
