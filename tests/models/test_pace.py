"""Seconds of a step: operations against the published number, rates by name, and what limits."""

import pytest
import torch

from flux_ir.errors import FluxIRError
from flux_ir.models.memory import elements
from flux_ir.models.pace import GPUS, PCIE4, Rates, block_flops, cpu_rates, gpu_rates, step_flops, step_pace, usual_gpu
from flux_ir.models.registry import MODELS

FLUX = MODELS["flux-schnell"].flux


@pytest.mark.parametrize(("txt", "img", "milliseconds"), [(256, 256, 17), (256, 1024, 44), (256, 4096, 174)])
def test_a_step_takes_the_published_milliseconds_at_400_tflops(txt, img, milliseconds):
    assert step_flops(FLUX, txt, img) / 400e12 * 1000 == pytest.approx(milliseconds, rel=0.05)


def test_what_takes_longest_limits():
    rates = Rates(flops=400e12, memory=3e12, bus=25e9, disk=1e9, source="")

    def pace(**how):
        return step_pace(FLUX, rates, torch.bfloat16, txt_tokens=256, img_tokens=256, **how)

    assert pace().limiter == "compute"
    assert pace(streamed=25 * 10**9, weights_from="host")[:2] == (1.0, "bus")
    assert pace(streamed=25 * 10**9, weights_from="host", on_cpu=True)[:2] == (1.0, "memory copy")
    assert pace(streamed=25 * 10**9, weights_from="disk")[:2] == (25.0, "disk")
    assert pace(sharded_over=2)[:2] == (pytest.approx(2 * sum(elements(FLUX).blocks) / 2 / 25e9), "bus")
    slow = rates._replace(memory=1e10)
    assert step_pace(FLUX, slow, torch.bfloat16, txt_tokens=256, img_tokens=256).limiter == "memory bandwidth"


def test_many_pictures_keep_all_devices_at_work():
    rates = Rates(flops=400e12, memory=3e12, bus=25e9, disk=1e9, source="")

    def pace(**how):
        return step_pace(FLUX, rates, torch.bfloat16, txt_tokens=256, img_tokens=256, **how)

    alone = pace()
    assert alone.seconds_of_many == alone.seconds
    assert pace(processes=8).seconds_of_many == pytest.approx(alone.seconds / 8)
    for devices in (2, 4):
        split = pace(split_over=devices)
        assert split.seconds == alone.seconds  # of one picture one device has work at a time
        assert alone.seconds / devices < split.seconds_of_many < 1.6 * alone.seconds / devices
    assert sum(block_flops(FLUX, 512)) == step_flops(FLUX, 256, 256)


def test_a_gpu_is_known_by_a_part_of_the_drivers_name_and_said_to_be_unmeasured():
    rates = gpu_rates("NVIDIA GeForce RTX 4090", torch.bfloat16)
    assert rates.bus == PCIE4
    assert rates.source == "RTX 4090: published peak x 0.4, not measured"
    assert gpu_rates("RTX 4090", torch.float32).flops == rates.flops / 4


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(FluxIRError, match=r"--gpu must be one of RTX 4060, .*: got 'RTX 4091'") as raised:
        gpu_rates("RTX 4091", torch.bfloat16)
    assert "did you mean RTX 4090" in raised.value.hint


def test_a_usual_gpu_is_the_nearest_in_memory():
    assert [usual_gpu(vram) for vram in (8, 12, 16, 24, 48, 80, 141)] == [
        *("RTX 4060", "RTX 3060", "RTX 4080", "RTX 4090", "L40S", "H100", "H200")
    ]
    assert {usual_gpu(gpu.vram_gb) for gpu in GPUS.values()} <= GPUS.keys()


def test_a_cpu_is_measured():
    rates = cpu_rates(256, 64, torch.float32)
    assert rates.flops > 1e8
    assert rates.bus > 1e7
    assert rates.source.startswith("this CPU, measured now: ")
