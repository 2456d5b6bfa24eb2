"""The two ways in which threads work: blocks made ahead, bounded, and a map whose results keep their order."""

import threading
import time

import pytest
import torch

from flux_ir.activations.blocks import TokenBlock
from flux_ir.threads import ahead, in_order

BLOCK_BYTES = 10 * 6 * 4 + 10 * 4


def nbytes(made):
    return made.nbytes


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
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_a_block_counts_all_of_its_tensors():
    assert block(0).nbytes == BLOCK_BYTES
    assert block(0)._replace(scale=torch.ones(10)).nbytes == BLOCK_BYTES + 40


@pytest.mark.parametrize("capacity", [0, BLOCK_BYTES, 10**9])
def test_all_blocks_come_in_order(capacity):
    with ahead(Maker(30), capacity=capacity, size=nbytes) as blocks:
        assert [int(block.values[0, 0]) for block in blocks] == list(range(30))
    assert not streams()


@pytest.mark.parametrize(("capacity", "waiting"), [(0, 1), (BLOCK_BYTES, 1), (3 * BLOCK_BYTES + 1, 3)])
def test_no_more_waits_than_the_capacity_and_the_block_at_hand(capacity, waiting):
    maker = Maker(100)
    with ahead(maker, capacity=capacity, size=nbytes) as blocks:
        assert settled(maker) == waiting + 1
        next(blocks)
        assert settled(maker) == waiting + 2


def test_it_runs_ahead_while_the_consumer_is_busy():
    maker = Maker(5)
    with ahead(maker, capacity=10**9, size=nbytes) as blocks:
        next(blocks)
        assert settled(maker) == 5


def test_an_error_comes_behind_the_blocks_made_before_it():
    with ahead(Maker(9, fail_at=4), capacity=10**9, size=nbytes) as blocks:
        assert [next(blocks).step for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="block 4"):
            next(blocks)
    assert not streams()


def test_an_error_before_the_first_block_is_raised_too():
    def broken():
        raise OSError("no weights")

    with ahead(broken, capacity=1, size=nbytes) as blocks, pytest.raises(OSError, match="no weights"):
        next(blocks)


def test_the_consumers_own_error_passes_and_the_thread_ends():
    maker = Maker(10**9)

    def consume():
        with ahead(maker, capacity=5 * BLOCK_BYTES, size=nbytes) as blocks:
            next(blocks)
            raise KeyError

    with pytest.raises(KeyError):
        consume()
    assert maker.closed_by == "ahead"
    assert not streams()


def test_leaving_early_ends_the_thread_at_once_and_closes_the_maker():
    maker = Maker(10**9)
    start = time.perf_counter()
    with ahead(maker, capacity=5 * BLOCK_BYTES, size=nbytes) as blocks:
        next(blocks)
    assert time.perf_counter() - start < 2
    assert maker.closed_by == "ahead"
    assert not streams()
    assert next(blocks, None) is None  # used after its time: it is over, and hangs for nobody


def test_a_consumer_that_never_takes_a_block_leaves_no_thread():
    with ahead(Maker(10**9), capacity=1, size=nbytes):
        pass
    assert not streams()


def test_consumed_blocks_are_not_kept():
    import weakref

    with ahead(Maker(4), capacity=1, size=nbytes) as blocks:
        first = weakref.ref(next(blocks).values)
        next(blocks)
        assert first() is None


# ---- The ordered map


def test_results_come_in_the_order_of_the_items_and_few_are_taken_ahead():
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    def work(number):
        time.sleep(0.002 * (number % 3))
        return number

    for count, result in enumerate(in_order(work, items(), 3, torch_threads=None)):
        assert result == count
        assert len(taken) <= count + 6
    assert len(taken) == 40


def test_what_fails_is_raised_in_its_place_and_the_rest_is_not_begun():
    begun = []

    def work(number):
        begun.append(number)
        if number == 3:
            raise OSError("item 3")
        return number

    results = in_order(work, range(1000), 2, torch_threads=None)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="item 3"):
        next(results)
    assert len(begun) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("in_order")]


def test_threads_that_compute_leave_torch_its_number_of_threads():
    before = torch.get_num_threads()
    found = list(in_order(lambda _: torch.get_num_threads(), range(4), 2, torch_threads=1))
    assert found == [1] * 4
    assert torch.get_num_threads() == before
    assert list(in_order(lambda item: item, range(9), 2, most=1, torch_threads=None)) == list(range(9))
