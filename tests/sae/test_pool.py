"""Slots in memory: what is put in comes out, bit for bit, whatever its type and from wherever it was read."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.sae.chunks import Chunk
from flux_ir.sae.pool import Pool, Row, free_slots, slot_bytes
from flux_ir.sites import Site

IMG, OTHER = Site.parse("double.0.img"), Site.parse("double.1.img")
CPU = torch.device("cpu")


def chunk_of(values, ordinal=0, generation=0, step=0):
    rows = len(next(iter(values.values())))
    is_text = np.arange(rows) % 3 == 0
    return Chunk(ordinal, generation, step, values, is_text, np.arange(rows), "a.pt")


def random_tokens(rows, d, dtype, seed=0):
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    capacity=st.integers(1, 60),
    d=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    moves=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 40)), max_size=8),
)
def test_a_pool_is_an_array_of_tokens_by_slot(capacity, d, dtype, moves):
    pool = Pool({IMG: Row(d, dtype), OTHER: Row(3, torch.float32)}, capacity, CPU)
    expected = {IMG: torch.zeros(capacity, d, dtype=dtype), OTHER: torch.zeros(capacity, 3)}
    origin = [(-1, 0, 0, 0, False)] * capacity
    for ordinal, (seed, count) in enumerate(moves):
        draw = np.random.default_rng(seed)
        values = {IMG: random_tokens(50, d, dtype, seed), OTHER: random_tokens(50, 3, torch.float32, seed + 1)}
        chunk = chunk_of(values, ordinal, generation=seed, step=ordinal * 7)
        rows = np.sort(draw.choice(50, min(count, capacity), replace=False))
        slots = draw.choice(capacity, len(rows), replace=False)
        pool.put(slots, chunk, rows)
        for site, of_site in expected.items():
            of_site[torch.from_numpy(slots)] = values[site][torch.from_numpy(rows)]
        for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
            origin[slot] = (ordinal, row, seed, ordinal * 7, bool(chunk.is_text[row]))
    used = np.array([slot for slot in range(capacity) if origin[slot][0] >= 0], dtype=np.int64)
    slots = np.random.default_rng(0).permutation(used)
    batch = pool.take(slots)
    for site, of_site in expected.items():
        assert torch.equal(batch.values[site], of_site[torch.from_numpy(slots)])
        assert batch.values[site].dtype == of_site.dtype
    found = zip(
        pool.chunk_of_slot[slots].tolist(), pool.row_of_slot[slots].tolist(), batch.generations.tolist(),
        batch.steps.tolist(), batch.is_text.tolist(), strict=True,
    )  # fmt: skip
    assert list(found) == [origin[slot] for slot in slots]


@pytest.mark.parametrize("gaps", [False, True])
def test_large_chunks_with_and_without_gaps_go_in(gaps):
    d, rows = 512, 2**12 + 5
    values = random_tokens(rows, d, torch.float32)
    pool = Pool({IMG: Row(d, torch.float32)}, rows, CPU)
    kept = np.arange(0, rows, 2) if gaps else np.arange(rows)
    slots = np.random.default_rng(0).permutation(rows)[: len(kept)]
    pool.put(slots, chunk_of({IMG: values}), kept)
    assert torch.equal(pool.take(slots).values[IMG], values[torch.from_numpy(kept)])


def test_half_of_a_wider_tensor_goes_in_as_well():
    whole = random_tokens(10, 8, torch.bfloat16)
    pool = Pool({IMG: Row(4, torch.bfloat16)}, 10, CPU)
    pool.put(np.arange(10), chunk_of({IMG: whole[:, 4:]}), np.arange(10))
    assert torch.equal(pool.take(np.arange(10)).values[IMG], whole[:, 4:])


def test_negative_zero_and_subnormals_keep_their_bits():
    values = torch.tensor([[-0.0, 1e-40, 3.0]]).bfloat16()
    pool = Pool({IMG: Row(3, torch.bfloat16)}, 1, CPU)
    pool.put(np.array([0]), chunk_of({IMG: values}), np.array([0]))
    got = pool.take(np.array([0])).values[IMG]
    assert torch.equal(got.view(torch.int16), values.view(torch.int16))


def test_the_bytes_of_a_pool_are_those_of_its_arrays():
    rows = {IMG: Row(8, torch.bfloat16), OTHER: Row(3, torch.float32)}
    pool = Pool(rows, 100, CPU)
    held = sum(values.nbytes for values in pool._values.values()) + pool._about.nbytes
    assert pool.nbytes == held == 100 * slot_bytes(rows)


def test_memory_of_a_batch_is_used_again_when_nobody_holds_it():
    pool = Pool({IMG: Row(4, torch.float32)}, 10, CPU)
    pool.put(np.arange(10), chunk_of({IMG: random_tokens(10, 4, torch.float32)}), np.arange(10))
    first = pool.take(np.arange(5)).values[IMG]
    place, view = first.data_ptr(), first[1:2]
    del first
    gc.collect()
    other = pool.take(np.arange(5)).values[IMG]
    assert other.data_ptr() != place  # a view still holds it
    del view
    gc.collect()
    again = pool.take(np.arange(4)).values[IMG]
    assert again.data_ptr() == place
    assert torch.equal(again, other[:4])


def test_no_slots_give_no_tokens():
    pool = Pool({IMG: Row(4, torch.bfloat16)}, 10, CPU)
    batch = pool.take(np.empty(0, np.int64))
    assert batch.values[IMG].shape == (0, 4)
    assert batch.steps.shape == (0,)


def test_tokens_that_do_not_fit_are_refused():
    pool = Pool({IMG: Row(4, torch.bfloat16)}, 10, CPU)
    for values in (random_tokens(3, 5, torch.bfloat16), random_tokens(3, 4, torch.float32)):
        with pytest.raises(FluxIRError, match=r"must be torch\.bfloat16 and 4 wide"):
            pool.put(np.arange(3), chunk_of({IMG: values}), np.arange(3))


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 400), share=st.floats(0, 1), count=st.integers(0, 9), seed=st.integers(0, 9))
def test_free_slots_are_counted_in_order_in_small_and_large_pools(capacity, share, count, seed):
    draw = np.random.default_rng(seed)
    busy = draw.permutation(capacity)[: int(share * capacity)]
    free = sorted(set(range(capacity)) - set(busy.tolist()))
    picks = draw.permutation(len(free))[:count]
    assert free_slots(capacity, busy, picks).tolist() == [free[pick] for pick in picks.tolist()]


@pytest.mark.gpu
def test_a_pool_on_a_gpu_gives_the_same_batches():
    device = torch.device("cuda", 0)
    values = {IMG: random_tokens(500, 24, torch.bfloat16), OTHER: random_tokens(500, 8, torch.float32)}
    rows = {IMG: Row(24, torch.bfloat16), OTHER: Row(8, torch.float32)}
    here, there = Pool(rows, 600, CPU), Pool(rows, 600, device)
    draw = np.random.default_rng(0)
    for kept in (np.arange(500), np.sort(draw.choice(500, 200, replace=False))):
        slots = draw.permutation(600)[: len(kept)]
        for pool in (here, there):
            pool.put(slots, chunk_of(values), kept)
        for site in rows:
            got = there.take(slots)
            assert got.values[site].device == got.steps.device == device
            assert torch.equal(got.values[site].cpu(), here.take(slots).values[site])
