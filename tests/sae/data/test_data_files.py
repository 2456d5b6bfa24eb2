"""Batches of files: captures of every dtype and plain arrays come back as stored, however they are read."""

import numpy as np
import pytest
import torch

from flux_ir.activations.source import open_source
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.recording.plan import CapturePlan
from flux_ir.recording.recorder import StepContext
from flux_ir.sae.data.batches import TokenBatches
from flux_ir.sae.data.buffer import slot_bytes
from flux_ir.sae.data.feed import TokenFormat
from flux_ir.sae.data.filters import choose_sites
from flux_ir.sae.data.measure import measure_normalisation
from flux_ir.sae.data.splits import split_source
from flux_ir.sites import all_sites, match_sites
from tests.activations.conftest import write_collection
from tests.recording.conftest import write_values
from tests.sae.data.numbered_source import PLENTY, rows_of, same, sorted_rows


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
            write_values(tmp_path / folder / f"{i}.pt", plan, values, {0: context, 2: context})
        return tmp_path / folder

    return write


@pytest.fixture
def shards(tmp_path):
    """Writes a collection of random values: its folder, and all values by image."""
    return lambda count=3, **changes: (tmp_path / "shards", write_collection(tmp_path / "shards", count, **changes))


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


@pytest.mark.parametrize("kind", ["shards", "captures"])
@pytest.mark.parametrize("page_cache", [True, False])
@pytest.mark.parametrize("prefetch", [True, False])
def test_batches_do_not_depend_on_how_files_are_read(captures, shards, kind, page_cache, prefetch):
    folder, _ = shards(8, sites=["double.0.img", "double.1.img"]) if kind == "shards" else (captures(15), None)
    source = open_source(folder)
    sites = choose_sites(source, ["double.*.img"])
    slot = slot_bytes({site: TokenFormat(source.d(site), torch.bfloat16) for site in sites})
    known = {"batch_tokens": 20, "pool_bytes": 100 * slot, "epochs": 2}
    plain = rows_of(TokenBatches(source, sites, **known, prefetch=False, page_cache=True), sites[1])
    other = TokenBatches(source, sites, **known, prefetch=prefetch, page_cache=page_cache)
    assert same(rows_of(other, sites[1]), plain)
    for stop in (1, 9, 20):
        begun = TokenBatches(source, sites, **known, prefetch=prefetch, page_cache=page_cache)
        for _ in range(stop):
            next(begun)
        resumed = TokenBatches(source, sites, **known, prefetch=prefetch, page_cache=page_cache)
        resumed.restore(begun.state())
        begun.close()
        assert same(rows_of(resumed, sites[1]), plain[stop:])
        resumed.close()


def test_small_pictures_are_read_many_at_once_and_only_those_of_the_side(shards, monkeypatch):
    folder, values = shards(3, per_shard=64, sites=["double.0.img"], images_per_prompt=1)
    source, reads = open_source(folder), []
    read_run = source.read_run
    monkeypatch.setattr(source, "read_run", lambda *place: reads.append(place) or read_run(*place))
    (site,), split = choose_sites(source, ["*"]), split_source(source, 0.3)
    seen = {}
    for side in ("training", "held_out"):
        reads.clear()
        known = {"batch_tokens": 64, "pool_bytes": PLENTY, "split": split, "side": side}
        batches = list(TokenBatches(source, [site], **known, prefetch=False))
        seen[side] = set(torch.cat([batch.generations for batch in batches]).tolist())
        rows = torch.cat([batch.values[site] for batch in batches])
        expected = [values[i][step, site].bfloat16() for i in seen[side] for step in (0, 2)]
        assert sorted_rows(rows) == sorted_rows(torch.cat(expected))
        # a single token to see what the rows are, and then about 32 blocks
        assert len(reads) < 100
        assert max(len(images) for images, *_ in reads) > 1
    assert len(seen["training"]) + len(seen["held_out"]) == 3 * 64
    assert not seen["training"] & seen["held_out"]


def test_a_batch_draws_from_many_shards_prompts_steps_and_positions(shards):
    folder, values = shards(8, per_shard=8, sites=["double.0.img"], images_per_prompt=1)
    source = open_source(folder)
    (site,) = choose_sites(source, ["*"])
    slot = slot_bytes({site: TokenFormat(source.d(site), torch.bfloat16)})
    tokens = 8 * 8 * 2 * 12
    batches = list(TokenBatches(source, [site], batch_tokens=64, pool_bytes=tokens * slot))  # buffers of a half
    index = {row.numpy().tobytes(): place for place, row in _every_row(values, site)}
    for batch in batches:
        places = [index[row.view(torch.uint8).numpy().tobytes()] for row in batch.values[site]]
        assert len({image // 8 for image, _, _ in places}) == 8
        assert len({image for image, _, _ in places}) > 24
        assert 16 < sum(step == 0 for _, step, _ in places) < 48
        assert 3 < sum(position for _, _, position in places) / 64 < 8  # 5.5 on average


def _every_row(values, site):
    for image, of_image in enumerate(values):
        for step in (0, 2):
            for position, row in enumerate(of_image[step, site].bfloat16()):
                yield (image, step, position), row.view(torch.uint8)


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
    with pytest.raises(FluxIRError, match=r"1 of \d+ tokens of double\.0\.img at step 2 in .*5\.pt hold NaN"):
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
    ("known", "memory", "kept"),
    [
        ({}, 2**40, True),
        ({}, 60_000, False),
        ({"page_cache": True}, 60_000, True),
        ({"page_cache": False}, 2**40, False),
        ({"ranks": Ranks(0, 2)}, 60_000, True),
    ],
)
def test_files_that_fit_into_memory_are_left_in_the_page_cache(captures, monkeypatch, known, memory, kept):
    monkeypatch.setattr("flux_ir.sae.data.batches._memory_bytes", lambda: memory)
    source = open_source(captures(15))
    sites = choose_sites(source, ["double.0.img"])
    batches = TokenBatches(source, sites, batch_tokens=20, pool_bytes=PLENTY, **known)
    assert batches.feed.tokens_at_most == 360
    assert batches._filler.page_cache == kept
