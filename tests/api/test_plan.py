"""`flux_ir.plan`: what fits is within the machine, more memory is never slower, and what does not go together."""

import pytest
import torch

import flux_ir
from flux_ir.api.plan import PRESETS
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import MODELS


def best(**machine):
    (planned,) = flux_ir.plan("flux-schnell", **machine)
    return planned.best


@pytest.fixture(autouse=True)
def steady_rates(monkeypatch):
    """The rates of one GPU in place of a measurement: what other tests do at the moment must not change answers."""
    from flux_ir.api import plan
    from flux_ir.models.pace import gpu_rates

    monkeypatch.setattr(plan, "cpu_rates", lambda width, tokens, dtype: gpu_rates("RTX 3060", torch.bfloat16))


def test_a_capture_has_the_published_bytes_per_step():
    sizes = {
        (model, side): flux_ir.plan(model, width=side, height=side, num_steps=1, gpu="H100", memory_gb=64)[0]
        for model in ("flux-schnell", "flux-dev")
        for side in (256, 1024)
    }
    gigabytes = [planned.capture_bytes / 1e9 for planned in sizes.values()]
    assert gigabytes == pytest.approx([0.179, 1.52, 0.269, 1.61], rel=0.01)


def test_every_preset_is_answered_and_what_fits_is_within_it():
    plans = flux_ir.plan(presets=True)
    assert len(plans) == len(PRESETS) == 11
    for preset, planned in zip(PRESETS, plans, strict=True):
        assert planned.best is not None, preset
        for setting in planned.settings:
            within = setting.host_bytes <= preset.memory_gb * 10**9
            within &= not preset.gpus or setting.device_bytes <= preset.vram_gb * 10**9
            assert setting.fits == within, (preset, setting)
    several = {planned.machine.gpus: planned.best.name for planned in plans if planned.machine.gpus > 1}
    assert several == {2: "blocks over GPUs", 8: "a process per GPU"}
    assert next(planned.best.name for planned in plans if planned.machine.vram_bytes == 80 * 10**9) == "resident"


def test_several_gpus_split_or_shard_the_blocks_or_have_a_process_each():
    (planned,) = flux_ir.plan(gpu="H100", gpus=8, memory_gb=1024)
    settings = {setting.name: setting for setting in planned.settings}
    alone, split, each, sharded = (
        settings[name] for name in ("resident", "blocks over GPUs", "a process per GPU", "sharded over processes")
    )
    assert each.seconds_per_step == alone.seconds_per_step == split.seconds_per_step < sharded.seconds_per_step
    assert each.seconds_of_many == pytest.approx(alone.seconds_of_many / 8)
    assert each.seconds_of_many < split.seconds_of_many < alone.seconds_of_many
    assert each.host_bytes == 8 * alone.host_bytes
    assert sharded.device_bytes < each.device_bytes < alone.device_bytes  # text encoders go when prompts are encoded
    assert split.device_bytes < 15e9  # a seventh of the blocks, and both text encoders beside them
    assert split.command == "flux-ir capture --model flux-schnell --multi_gpu blocks"
    assert sharded.command == (
        "torchrun --nproc_per_node 8 -m flux_ir collect --model flux-schnell --sites "
        "'double.*.img,double.*.txt,single.?,single.??' --prompts prompts.txt --output_dir captures/NAME "
        "--fsdp --batch_size 1"
    )
    assert not any("torchrun" in one.command for one in flux_ir.plan(gpu="H100", gpus=1, memory_gb=64)[0].settings)


def test_the_patterns_of_a_collection_are_those_of_every_block():
    from flux_ir.api.plan import EVERY_BLOCK
    from flux_ir.sites import block_outputs, sites_among

    spec = MODELS["flux-schnell"]
    depth = spec.flux.depth, spec.flux.depth_single_blocks
    assert sites_among(EVERY_BLOCK.split(","), spec.sites) == block_outputs(*depth)


@pytest.mark.parametrize("gpu", ["RTX 4060", "H100"])
def test_more_memory_is_never_slower(gpu):
    by_vram = [best(gpu=gpu, vram_gb=vram, memory_gb=64).seconds_per_step for vram in (4, 6, 8, 12, 16, 24, 32, 48)]
    assert by_vram == sorted(by_vram, reverse=True)
    by_memory = [best(gpu=gpu, vram_gb=8, memory_gb=memory).seconds_per_step for memory in (6, 8, 16, 32, 64, 128)]
    assert by_memory == sorted(by_memory, reverse=True)
    without = [best(gpus=0, memory_gb=memory).seconds_per_step for memory in (4, 8, 16, 32, 64)]
    assert without == sorted(without, reverse=True)


def test_quantised_blocks_are_the_best_only_where_nothing_exact_fits():
    (planned,) = flux_ir.plan(gpu="RTX 4060", vram_gb=8, memory_gb=32)
    quantised = [setting for setting in planned.settings if not setting.exact]
    assert any(setting.fits and setting.seconds_per_step < planned.best.seconds_per_step for setting in quantised)
    assert planned.best.exact
    assert [setting.name for setting in quantised] == ["nf4", "nf4, offload blocks", "int8", "int8, offload blocks"]


def test_what_does_not_fit_says_why_and_nothing_may_fit():
    (planned,) = flux_ir.plan(gpu="RTX 4060", vram_gb=1, memory_gb=64)
    assert planned.best is None
    assert "on a GPU of 1 GB" in planned.settings[0].misfit


def test_the_command_captures_what_was_planned():
    setting = best(gpu="RTX 4060", vram_gb=8, memory_gb=32, width=512, sites=("double.*.img", "single.3"), steps=[0, 2])
    assert setting.command == (
        "flux-ir capture --model flux-schnell --width 512 --sites 'double.*.img,single.3' --steps 0,2 "
        "--offload blocks --vram_gb 8"
    )


def test_float32_takes_twice_the_bytes():
    single, double = (
        flux_ir.plan(gpus=0, memory_gb=100, dtype=dtype)[0].settings[0].host_bytes for dtype in ("bfloat16", "float32")
    )
    assert double - single > 2 * MODELS["flux-schnell"].flux.hidden_size * 10**6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "flux-tinny"}, "--model must be one of"),
        ({"width": 100}, "width and height must be positive multiples of 16 px"),
        ({"gpus": 0, "vram_gb": 8}, "--vram_gb and --gpu are of a GPU: got --gpus 0 as well"),
        ({"presets": True, "gpus": 2}, "--presets are machines of their own: got --gpus as well"),
        ({"gpu": "Voodoo 2"}, "--gpu must be one of"),
        ({"gpus": 99}, "what this machine has, unless others are described: got 99"),
        ({"memory_gb": 0}, "--memory_gb must be at least 0.1: got 0"),
        ({"sites": "double.99.img"}, "double.99.img"),
        ({"steps": [9]}, "--steps counts from 0 to 3 with 4 steps: got 9"),
    ],
)
def test_wrong_input_is_one_line(wrong, message):
    with pytest.raises(FluxIRError) as raised:
        flux_ir.plan(**wrong)
    assert message in raised.value.message
    assert "\n" not in raised.value.message
