"""What weights and tokens take, held against real networks and the published numbers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.memory import (
    LIVE_VALUES,
    Limits,
    activation_bytes,
    best_offload,
    decode_bytes,
    elements,
    encode_bytes,
    resident_blocks,
    streamed_bytes,
    waits_in_memory,
    weights_budget,
)
from flux_ir.models.placement import plan
from flux_ir.models.registry import MODELS


def test_the_published_numbers_of_parameters():
    schnell, dev = elements(MODELS["flux-schnell"].flux), elements(MODELS["flux-dev"].flux)
    assert schnell.total == 11_891_178_560
    assert dev.total == 11_901_408_320
    assert schnell.blocks[0] == 339_831_296
    assert round(sum(schnell.modulations) / 1e9, 2) == 3.23


def test_elements_are_those_of_the_network(tiny_flux):
    network = tiny_flux(guidance=True)
    counts = elements(network.params)
    assert counts.total == sum(parameter.numel() for parameter in network.parameters())
    modulations = [p.numel() for n, p in network.named_parameters() if "_mod." in n or ".modulation." in n]
    assert sum(counts.modulations) == sum(modulations)


def test_blocks_stay_as_far_as_there_is_room_and_are_spread(tiny_flux):
    params = MODELS["flux-schnell"].flux
    counts = elements(params)
    assert resident_blocks(params, torch.bfloat16, 0) == []
    for free in range(10**9, 30 * 10**9, 10**9):
        chosen = resident_blocks(params, torch.bfloat16, free)
        taken = sum(counts.blocks[number] for number in chosen) * 2
        if chosen:
            assert streamed_bytes(params, torch.bfloat16) + taken <= free
        assert chosen == sorted(set(chosen))
        gaps = [later - earlier for earlier, later in pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1
    assert len(resident_blocks(params, torch.bfloat16, 30 * 10**9)) == 56


def test_without_a_limit_a_cpu_keeps_nothing(tiny_flux):
    params = MODELS["flux-schnell"].flux
    assert weights_budget(params, plan(0, offload="blocks"), torch.bfloat16, tokens=512) == 0


def test_blocks_wait_in_host_memory_for_a_gpu_if_there_is_room():
    params, dtype = MODELS["flux-schnell"].flux, torch.bfloat16
    on_gpu = replace(plan(1, offload="blocks"), memory_bytes=30 * 10**9)
    assert waits_in_memory(params, on_gpu, dtype, 0)
    small = replace(on_gpu, memory_bytes=8 * 10**9)
    assert not waits_in_memory(params, small, dtype, 0)
    assert waits_in_memory(params, small, dtype, 50)
    assert not waits_in_memory(params, replace(plan(0), memory_bytes=10**12), dtype, 0)


@pytest.mark.parametrize(
    ("asked", "memory_gb", "offload"),
    [(False, None, "none"), (True, 60, "none"), (True, 10, "blocks"), (False, 10, "blocks"), ("blocks", 60, "blocks")],
)
def test_what_fits_best_is_chosen(asked, memory_gb, offload):
    limits = Limits(None, None if memory_gb is None else memory_gb * 10**9)
    placement = best_offload(plan(0, offload=asked), MODELS["flux-schnell"].flux, torch.bfloat16, limits, asked)
    assert placement.offload == offload
    assert placement.memory_bytes == limits.memory_bytes


def test_too_small_a_limit_is_refused():
    limits = Limits(None, 10**9)
    with pytest.raises(FluxIRError, match=r"--memory_gb must be at least 1.9 for this model in bfloat16: got 1"):
        best_offload(plan(0), MODELS["flux-schnell"].flux, torch.bfloat16, limits, asked=False)


def test_tokens_and_pixels_take_bytes_in_proportion():
    params = MODELS["flux-schnell"].flux
    assert activation_bytes(params, 512, torch.bfloat16) == 512 * 3072 * LIVE_VALUES[2] * 2
    assert activation_bytes(params, 512, torch.float32, batch=2) == 2 * 512 * 3072 * LIVE_VALUES[4] * 4


def test_the_autoencoders_bytes_a_pixel_are_those_that_were_measured():
    params = MODELS["flux-schnell"].autoencoder
    assert decode_bytes(params, 1, torch.bfloat16) == pytest.approx(1534, rel=0.01)  # 1.608 GB at 1024 px
    assert decode_bytes(params, 1, torch.float32) == pytest.approx(3050, rel=0.02)
    assert encode_bytes(params, 1) == pytest.approx(2582, rel=0.02)
