import pytest

from flux_ir.errors import FluxIRError
from flux_ir.sae.training.schedules import (
    Schedule,
    annealed_k,
    default_learning_rate,
    rate_factor,
    shortened,
    warmed_up,
)


def test_the_learning_rate_falls_with_the_root_of_the_number_of_features():
    assert default_learning_rate(2**14) == pytest.approx(2e-4)
    assert default_learning_rate(2**16) == pytest.approx(1e-4)
    assert default_learning_rate(2**12) == pytest.approx(4e-4)


def test_the_rate_warms_up_stays_and_decays_over_the_last_fifth():
    schedule = Schedule(total_steps=20_000, learning_rate=1.0, k=4)
    assert schedule.rate(0) == pytest.approx(1 / 1000)
    assert schedule.rate(499) == pytest.approx(0.5)
    assert {schedule.rate(step) for step in (999, 8_000, 15_999)} == {1.0}
    assert schedule.rate(18_000) == pytest.approx(0.5, abs=1e-3)
    assert 0 < schedule.rate(19_999) < 1e-3
    falling = [schedule.rate(step) for step in range(16_000, 20_000)]
    assert falling == sorted(falling, reverse=True)


def test_a_short_run_warms_up_for_a_tenth_of_its_steps():
    assert shortened(1_000, 20_000) == 1_000
    assert shortened(1_000, 50) == 5
    schedule = Schedule(total_steps=50, learning_rate=1.0, k=4)
    assert [schedule.rate(step) for step in (0, 4, 5)] == [pytest.approx(0.2), 1.0, 1.0]


def test_a_run_of_one_step_takes_it_at_the_full_rate():
    assert Schedule(total_steps=1, learning_rate=0.5, k=1).rate(0) == 0.5


def test_a_rate_is_never_zero_while_there_are_steps_to_take():
    for total in (1, 2, 5, 10, 11, 99):
        schedule = Schedule(total_steps=total, learning_rate=1.0, k=1)
        assert all(0 < schedule.rate(step) <= 1 for step in range(total))


def test_warm_up_and_decay_may_meet():
    assert rate_factor(4, 10, warmup_steps=8, decay_steps=8) == pytest.approx(5 / 8)


def test_k_comes_down_linearly_and_stays():
    assert [annealed_k(step, 4, start=12, anneal_steps=4) for step in range(6)] == [12, 10, 8, 6, 4, 4]
    schedule = Schedule(total_steps=100, learning_rate=1.0, k=4, k_start=16)
    assert [schedule.k_at(step) for step in (0, 25, 99)] == [16, 4, 4]


def test_without_a_start_k_stands_throughout():
    schedule = Schedule(total_steps=100, learning_rate=1.0, k=7)
    assert {schedule.k_at(step) for step in range(100)} == {7}


def test_the_sparsity_penalty_grows_from_nothing_to_the_whole():
    assert [warmed_up(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmed_up(0, 0) == 1.0
    schedule = Schedule(total_steps=200, learning_rate=1.0, k=1)
    assert schedule.sparsity_scale(0) == 0
    assert schedule.sparsity_scale(20) == 1


def test_a_run_without_steps_is_refused():
    with pytest.raises(FluxIRError, match="at least one optimiser step: got 0"):
        Schedule(total_steps=0, learning_rate=1.0, k=1)


def test_a_rate_that_does_not_train_is_refused():
    with pytest.raises(FluxIRError, match="above 0: got 0"):
        Schedule(total_steps=5, learning_rate=0.0, k=1)
