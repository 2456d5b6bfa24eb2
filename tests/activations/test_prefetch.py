"""Blocks made ahead in a thread: bounded, in order, with errors where they belong; and live ones like stored ones."""

import threading
import time

import pytest
import torch

from flux_ir.activations.blocks import TokenBlock
from flux_ir.activations.prefetch import block_bytes, stream_blocks

BLOCK_BYTES = 10 * 6 * 4 + 10 * 4


def block(number, tokens=10):
    values = torch.full((tokens, 6), float(number))
    return TokenBlock(values, None, None, number, str(number), "", torch.arange(tokens, dtype=torch.int32), 0, None)


class Maker:
    """Makes so many blocks, and remembers how many and whether it was closed."""

    def __init__(self, count, *, fail_at=None, tokens=10):
        self.count, self.fail_at, self.tokens = count, fail_at, tokens
        self.made, self.closed_by = 0, None

    def __call__(self):
        try:
            for number in range(self.count):
                if number == self.fail_at:
                    raise ValueError(f"block {number}")
                self.made += 1
                yield block(number, self.tokens)
        finally:
            self.closed_by = threading.current_thread().name


def settled(maker):
    """How many blocks were made once no more come."""
    made = -1
    while made != maker.made:
        made = maker.made
        time.sleep(0.05)
    return made


def streams():
    return [thread for thread in threading.enumerate() if thread.name == "stream"]


def test_a_block_counts_all_of_its_tensors():
    assert block_bytes(block(0)) == BLOCK_BYTES
    assert block_bytes(block(0)._replace(scale=torch.ones(10))) == BLOCK_BYTES + 40


@pytest.mark.parametrize("capacity", [0, BLOCK_BYTES, 10**9])
def test_all_blocks_come_in_order(capacity):
    with stream_blocks(Maker(30), capacity_bytes=capacity) as blocks:
        assert [int(block.values[0, 0]) for block in blocks] == list(range(30))
    assert not streams()


@pytest.mark.parametrize(("capacity", "waiting"), [(0, 1), (BLOCK_BYTES, 1), (3 * BLOCK_BYTES + 1, 3)])
def test_no_more_waits_than_the_capacity_and_the_block_at_hand(capacity, waiting):
    maker = Maker(100)
    with stream_blocks(maker, capacity_bytes=capacity) as blocks:
        assert settled(maker) == waiting + 1
        next(blocks)
        assert settled(maker) == waiting + 2


def test_it_runs_ahead_while_the_consumer_is_busy():
    maker = Maker(5)
    with stream_blocks(maker, capacity_bytes=10**9) as blocks:
        next(blocks)
        assert settled(maker) == 5


def test_an_error_comes_behind_the_blocks_made_before_it():
    with stream_blocks(Maker(9, fail_at=4), capacity_bytes=10**9) as blocks:
        assert [next(blocks).step for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="block 4"):
            next(blocks)
    assert not streams()


def test_an_error_before_the_first_block_is_raised_too():
    def broken():
        raise OSError("no weights")

    with stream_blocks(broken, capacity_bytes=1) as blocks, pytest.raises(OSError, match="no weights"):
        next(blocks)


def test_the_consumers_own_error_passes_and_the_thread_ends():
    maker = Maker(10**9)

    def consume():
        with stream_blocks(maker, capacity_bytes=5 * BLOCK_BYTES) as blocks:
            next(blocks)
            raise KeyError

    with pytest.raises(KeyError):
        consume()
    assert maker.closed_by == "stream"
    assert not streams()


def test_leaving_early_ends_the_thread_at_once_and_closes_the_maker():
    maker = Maker(10**9)
    start = time.perf_counter()
    with stream_blocks(maker, capacity_bytes=5 * BLOCK_BYTES) as blocks:
        next(blocks)
    assert time.perf_counter() - start < 2
    assert maker.closed_by == "stream"
    assert not streams()
    assert next(blocks, None) is None  # used after its time: it is over, and hangs for nobody


def test_a_consumer_that_never_takes_a_block_leaves_no_thread():
    with stream_blocks(Maker(10**9), capacity_bytes=1):
        pass
    assert not streams()


def test_consumed_blocks_are_not_kept():
    import weakref

    with stream_blocks(Maker(4), capacity_bytes=1) as blocks:
        first = weakref.ref(next(blocks).values)
        next(blocks)
        assert first() is None
