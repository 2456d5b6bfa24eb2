"""Collecting with other settings, beside another job, or without all of its groups is refused."""

import pytest
import torch

from flux_ir.collecting.collector import Collector
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from tests.collecting.small_jobs import PROMPTS, collect, collected, files_of, settings_of


def test_other_settings_are_refused_with_every_difference(suite, whole):
    other = settings_of(prompts=PROMPTS[:4], steps=(1,), seed=8, stored_dtype=torch.float16)
    with pytest.raises(FluxIRError) as caught:
        Collector(other, suite, LocalStorage(whole), Ranks())
    message = caught.value.message
    assert "was collected with other settings: prompts 5 (sha256 " in message
    assert "; seed 7 there, 8 now; steps 0,1 there, 1 now; store_dtype bfloat16 there, float16 now" in message
    assert "another --output_dir" in str(caught.value.hint)


def test_a_second_job_in_the_same_folder_is_refused_and_the_first_goes_on(suite, plain, tmp_path):
    first = collect(settings_of(), suite, LocalStorage(tmp_path), Ranks())
    next(first)
    with pytest.raises(FluxIRError, match="another process is at work in"):
        next(collect(settings_of(), suite, LocalStorage(tmp_path), Ranks()))
    list(first)
    assert files_of(tmp_path) == files_of(plain)


def test_a_batch_size_left_open_agrees_with_the_one_that_is_there(suite, whole):
    assert Collector(settings_of(batch_size=None), suite, LocalStorage(whole), Ranks()).collection.batch_size == 3
    with pytest.raises(FluxIRError, match="batch_size 3 there, 5 now"):
        Collector(settings_of(batch_size=5), suite, LocalStorage(whole), Ranks())


def test_merging_waits_for_no_shard_that_will_not_come(suite, small_shards, tmp_path):
    settings = settings_of(prompts=PROMPTS[:3], batch_size=1)
    collected(tmp_path, settings, suite, rank=0, world_size=2)
    job = Collector(settings, suite, LocalStorage(tmp_path), Ranks())
    list(job.verify())
    with pytest.raises(FluxIRError, match=r"shards/000001.safetensors of .* is not finished"):
        list(job.merge())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_never_kept_and_the_first_is_named(suite, tmp_path, dtype):
    with suite.transformer() as model:
        weight = model.double_blocks[1].img_mlp[2].weight
        before = weight[5, 5].item()
        weight.data[5, 5] = float("inf")
        try:
            with pytest.raises(FluxIRError) as caught:
                collected(tmp_path, settings_of(stored_dtype=dtype, steps=(0,)), suite)  # the sampler sees no result
        finally:
            weight.data[5, 5] = before
    assert "must be finite: at step 0, double.1.img holds NaN or infinity, first for 'a red" in caught.value.message
    assert "float32" in caught.value.hint
    assert list(tmp_path.glob("shards/*")) == list(tmp_path.glob("partial/*/*")) == []


def test_a_state_that_is_not_finite_is_never_kept(suite, tmp_path):
    with suite.transformer() as model:
        weight = model.single_blocks[3].linear2.weight  # behind every site that is kept
        before = weight[5, 5].item()
        weight.data[5, 5] = float("nan")
        try:
            with pytest.raises(FluxIRError, match=r"after step 0: .* come from single\.3, first for 'a red"):
                collected(tmp_path, settings_of(), suite)
        finally:
            weight.data[5, 5] = before
