"""What batches hold on to: a pool of the size asked for, values somebody still has, and nothing once they are left."""

from pathlib import Path

import pytest
import torch

from flux_ir.activations.blocks import TokenBlock
from flux_ir.sae.data.batches import TokenBatches
from tests.sae.data.numbered_source import IMG, PLENTY, NumberedSource, batches_of, rows_of, same


def test_a_buffer_is_half_as_large_as_allowed_or_as_the_data():
    small, large = batches_of(NumberedSource()), batches_of(NumberedSource(), pool_bytes=PLENTY)
    for batches in (small, large):
        next(batches)
    assert small._buffer.capacity == 32  # two batches: of the 40 tokens there is room for
    assert large._buffer.capacity == 180


def test_a_buffer_is_used_again_once_nobody_holds_its_batches():
    def memory(batches):
        return [batch.values[IMG].untyped_storage().data_ptr() for batch in batches]

    assert len(set(memory(batches_of(NumberedSource(24))))) <= 3
    kept = list(batches_of(NumberedSource(24)))
    assert len(set(memory(kept))) == 24 * 3 * 12 / 32


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
        assert threading.active_count() > before
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
