"""Pictures side by side: the same result as one after the other, and no trace left in the process."""

import threading

import pytest
import torch

from flux_ir.sampling.generate import decode, side_by_side, threads_per_picture

SIDE_PX = 128


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_row_is_worked_on_once_and_order_is_kept(threads, batch):
    rows = torch.arange(batch)
    assert torch.equal(side_by_side(lambda piece: piece * 10, rows, SIDE_PX**2), rows * 10)


def test_workers_have_their_share_of_the_threads_and_the_process_keeps_its_own(threads):
    small = side_by_side(lambda piece: torch.full_like(piece, torch.get_num_threads()), torch.zeros(8), SIDE_PX**2)
    large = side_by_side(lambda piece: torch.full_like(piece, torch.get_num_threads()), torch.zeros(2), 4096**2)
    assert small.tolist() == [1] * 8
    assert large.tolist() == [threads] * 2
    assert torch.get_num_threads() == threads_of_a_new_thread() == threads


def test_what_the_work_raises_arrives_and_the_process_keeps_its_threads(threads):
    def fail(piece):
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError, match="out of paint"):
        side_by_side(fail, torch.zeros(8), SIDE_PX**2)
    assert torch.get_num_threads() == threads_of_a_new_thread() == threads


def test_threads_share_large_pictures_only():
    sides = (16, 128, 256, 512, 1024)
    assert [threads_per_picture(side * side, 2) for side in sides] == [1, 1, 1, 2, 2]
    assert [threads_per_picture(side * side, 16) for side in sides] == [1, 1, 1, 4, 16]


def test_a_picture_has_the_same_bits_alone_and_among_others_on_any_number_of_threads(tiny_autoencoder):
    autoencoder = tiny_autoencoder()
    packed = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone = torch.cat([decode(autoencoder, one, 48, 64) for one in packed.split(1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(decode(autoencoder, packed, 48, 64), alone)
    finally:
        torch.set_num_threads(before)
