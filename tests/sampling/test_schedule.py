"""The schedule has the published sampler's bits."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import given
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.models.registry import MODELS
from flux_ir.sampling.schedule import empirical_mu, get_schedule, schedule_of


def test_schedules_equal_the_golden_ones_bit_for_bit(golden) -> None:
    schedules = {name: times for name, times in golden("sampling").tensors.items() if name.startswith("schedule.")}
    assert len(schedules) == 3
    for name, times in schedules.items():
        steps, tokens, shift = (part.lstrip("stepokn hif") for part in name.split(".")[1:])
        assert get_schedule(int(steps), int(tokens), shift=shift == "1") == times.tolist()


@given(st.integers(1, 60), st.integers(1, 8192), st.booleans())
def test_times_fall_from_one_to_zero(num_steps: int, tokens: int, shift: bool) -> None:
    times = get_schedule(num_steps, tokens, shift=shift)
    assert len(times) == num_steps + 1
    assert times[0] == pytest.approx(1, abs=1e-7)  # float32, as published: one bit below for some mu
    assert times[-1] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(times))


def test_larger_pictures_stay_longer_near_the_noise() -> None:
    small, large = get_schedule(10, 256), get_schedule(10, 4096)
    assert all(a < b for a, b in zip(small[1:-1], large[1:-1], strict=True))


@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_schedule_without_a_step_is_refused(num_steps: int) -> None:
    with pytest.raises(FluxIRError, match=f"num_steps must be at least 1: got {num_steps}"):
        get_schedule(num_steps, 256)


TOKENS = [256, 1024, 4096, 4300, 4301, 8192]


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50, 200])
def test_schedule_of_flux2_is_that_of_diffusers(num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    spec = replace(MODELS["flux-schnell"], schedule_shift="empirical")
    for tokens in TOKENS:
        mu = compute_empirical_mu(tokens, num_steps)
        assert empirical_mu(num_steps, tokens) == mu
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        times = torch.tensor(schedule_of(spec, num_steps, tokens))
        # They draw even times in float64, the published sampler and we in float32: the last bits may differ.
        torch.testing.assert_close(times, scheduler.sigmas, rtol=3e-7, atol=0)


def test_schedule_of_a_model_is_as_its_spec_says() -> None:
    for name, shift in (("flux-schnell", False), ("flux-dev", True)):
        assert schedule_of(MODELS[name], 5, 1024) == get_schedule(5, 1024, shift=shift)
