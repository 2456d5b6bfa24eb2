"""Collecting with other settings, beside another job, or without all of its groups is refused."""

import pytest
import torch

from flux_ir.collecting.collector import Collector, collect
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from tests.collecting.small_jobs import PROMPTS, SITES, collected, files_of, settings_of


def test_other_settings_are_refused_with_every_difference(suite, whole):
    other = settings_of(prompts=PROMPTS[:4], steps=(1,), seed=8, stored_dtype=torch.float16)
    with pytest.raises(FluxIRError) as caught:
        Collector(other, suite, LocalStorage(whole), Ranks())
    message = caught.value.message
    assert "was collected with other settings: prompts 5 (sha256 " in message
    assert "; seed 7 there, 8 now; steps 0,1 there, 1 now; dtype bfloat16 there, float16 now" in message
    assert "another --output_dir" in str(caught.value.hint)


def test_a_second_job_in_the_same_folder_is_refused_and_the_first_goes_on(suite, plain, tmp_path):
    first = collect(settings_of(), suite, LocalStorage(tmp_path), Ranks())
    next(first)
    with pytest.raises(FluxIRError, match="another process is collecting into"):
        next(collect(settings_of(), suite, LocalStorage(tmp_path), Ranks()))
    list(first)
    assert files_of(tmp_path) == files_of(plain)


def test_a_batch_size_left_open_agrees_with_the_one_that_is_there(suite, whole):
    assert Collector(settings_of(batch_size=None), suite, LocalStorage(whole), Ranks()).collection.batch_size == 3
    with pytest.raises(FluxIRError, match="batch_size 3 there, 5 now"):
        Collector(settings_of(batch_size=5), suite, LocalStorage(whole), Ranks())


def test_merging_waits_for_no_group_that_will_not_come(suite, tmp_path):
    settings = settings_of(prompts=PROMPTS, repeats=4, batch_size=32, sites=SITES[:1], steps=(0,), tokens_per_image=1)
    collected(tmp_path, settings, suite, rank=0, world_size=2)
    job = Collector(settings, suite, LocalStorage(tmp_path), Ranks())
    list(job.verify())
    with pytest.raises(FluxIRError, match=r"groups/000001 of .* is not finished"):
        list(job.merge())
