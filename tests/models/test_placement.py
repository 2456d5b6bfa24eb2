"""Plans for 0 to 8 GPUs, made without any."""

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.models.placement import MultiGpuWord, Placement, plan


def numbers(placement: Placement) -> tuple[str, ...]:
    return (placement.t5, placement.clip, placement.transformer, placement.ae_encoder, placement.ae_decoder)


@pytest.mark.parametrize("num_gpus", range(9))
def test_every_part_of_every_plan_is_on_a_device_that_exists(num_gpus: int) -> None:
    for multi_gpu in (False, True, "blocks"):
        placement = plan(num_gpus, multi_gpu=multi_gpu)
        there = {f"cuda:{i}" for i in range(num_gpus)} or {"cpu"}
        assert set(numbers(placement)) <= there
        assert placement.devices == list(dict.fromkeys([*numbers(placement), *placement.blocks]))


def test_eight_gpus_are_used_as_documented() -> None:
    assert numbers(plan(8, multi_gpu=True)) == ("cuda:0", "cuda:1", "cuda:2", "cuda:5", "cuda:6")


@pytest.mark.parametrize("num_gpus", range(2, 9))
def test_the_transformer_has_a_gpu_of_its_own(num_gpus: int) -> None:
    placement = plan(num_gpus, multi_gpu=True)
    others = (placement.t5, placement.clip, placement.ae_encoder, placement.ae_decoder)
    assert placement.transformer not in others
    assert len(placement.devices) == min(num_gpus, 5)


@pytest.mark.parametrize(("num_gpus", "device", "words"), [(0, "cpu", "no GPU"), (1, "cuda:0", "one GPU")])
@pytest.mark.parametrize("multi_gpu", [True, "blocks"])
def test_multi_gpu_without_two_gpus_says_so_and_goes_on(
    num_gpus: int, device: str, words: str, multi_gpu: MultiGpuWord
) -> None:
    placement = plan(num_gpus, multi_gpu=multi_gpu)
    assert placement.devices == [device]
    assert placement.blocks == ()
    assert words in placement.reason
    assert device in placement.reason


@pytest.mark.parametrize("num_gpus", range(2, 9))
def test_blocks_are_on_every_gpu(num_gpus: int) -> None:
    placement = plan(num_gpus, multi_gpu="blocks")
    assert placement.blocks == tuple(f"cuda:{number}" for number in range(num_gpus))
    assert placement.transformer == "cuda:0"
    assert placement.offload == "none"


def test_one_device_is_the_first_gpu_or_the_cpu() -> None:
    assert plan(0).devices == ["cpu"]
    assert plan(3).devices == ["cuda:0"]


@pytest.mark.parametrize(("device", "placed"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_chosen_device_is_taken(device: str, placed: str) -> None:
    assert plan(2, device=device).devices == [placed]


def test_offload_stays_on_one_gpu_and_means_nothing_on_a_cpu() -> None:
    assert plan(2, offload=True).offload == "parts"
    assert plan(2).offload == "none"
    on_cpu = plan(0, offload=True)
    assert on_cpu.offload == "none"
    assert "--offload" in on_cpu.reason


def test_blocks_are_streamed_on_any_device() -> None:
    assert plan(0, offload="blocks").offload == "blocks"
    assert plan(1, offload="blocks").offload == "blocks"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cpu:0", ""])
def test_a_device_nobody_knows_is_refused(device: str) -> None:
    with pytest.raises(FluxIRError, match="must be cpu, cuda or cuda:N"):
        plan(2, device=device)


@pytest.mark.parametrize(("num_gpus", "words"), [(0, "no GPU is visible"), (2, "cuda:0 to cuda:1")])
def test_a_gpu_that_is_not_there_is_refused(num_gpus: int, words: str) -> None:
    with pytest.raises(FluxIRError, match=words):
        plan(num_gpus, device="cuda:2")


@pytest.mark.parametrize("other", [{"offload": True}, {"device": "cuda:0"}])
@pytest.mark.parametrize("multi_gpu", [True, "blocks"])
def test_multi_gpu_excludes_one_device(other: dict[str, object], multi_gpu: MultiGpuWord) -> None:
    with pytest.raises(FluxIRError, match=f"--multi_gpu {multi_gpu} spreads .*: got both"):
        plan(4, multi_gpu=multi_gpu, **other)
