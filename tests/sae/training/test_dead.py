import torch

from flux_ir.sae.training.step import DeadCounter

CPU = torch.device("cpu")


def test_a_feature_is_dead_after_so_many_tokens_not_steps():
    few, many = DeadCounter(3, CPU), DeadCounter(3, CPU)
    fired = torch.tensor([True, False, False])
    for _ in range(10):
        few.update(fired, 10)
    many.update(fired, 100)
    assert torch.equal(few.tokens_since_fired, many.tokens_since_fired)
    assert few.dead(100).tolist() == [False, True, True]
    assert few.dead(101).tolist() == [False, False, False]


def test_firing_brings_a_feature_back():
    counter = DeadCounter(2, CPU)
    counter.update(torch.tensor([False, False]), 50)
    counter.update(torch.tensor([False, True]), 5)
    assert counter.tokens_since_fired.tolist() == [55, 0]


def test_counts_summed_over_processes_are_taken_as_they_are():
    counter = DeadCounter(3, CPU)
    counter.update(torch.tensor([2, 0, 1], dtype=torch.int32), 8)
    assert counter.tokens_since_fired.tolist() == [0, 8, 0]


def test_resampled_features_are_counted_from_zero():
    counter = DeadCounter(3, CPU)
    counter.update(torch.zeros(3, dtype=torch.bool), 9)
    counter.restart(torch.tensor([True, False, False]))
    assert counter.dead(9).tolist() == [False, True, True]
