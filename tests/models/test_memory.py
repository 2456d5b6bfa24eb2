"""What weights and tokens take, held against real networks and the published numbers."""

from itertools import pairwise

import torch

from flux_ir.models.memory import elements, resident_blocks, streamed_bytes, weights_budget
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
