"""Collecting with the transformer's blocks split over devices: batches side by side, and the bytes of one device."""

from dataclasses import replace
from threading import Barrier, current_thread

import pytest
import torch

from flux_ir.activations.shards import SHARD_IMAGES
from flux_ir.collecting import batches, collector, live
from flux_ir.collecting.batches import batches_under_way, gpu_batch, record_batch
from flux_ir.collecting.live import live_blocks
from flux_ir.models.placement import plan
from flux_ir.models.split import SplitFlux
from flux_ir.models.suite import Suite
from flux_ir.steering.apply import Steering
from flux_ir.steering.edits import Edit
from flux_ir.steering.regions import Grid
from tests.collecting.small_jobs import (
    HEIGHT,
    PROMPTS,
    SPEC,
    WIDTH,
    collected,
    files_of,
    new_suite,
    recipe_of,
    settings_of,
)


def split_suite(count=2, *, autoencoder=False):
    """flux-tiny with its blocks split over devices that are all the CPU."""
    placement = replace(plan(0), blocks=("cpu",) * count)
    whole = new_suite(autoencoder=autoencoder)
    return Suite(SPEC, whole.source, placement, whole.dtype)


@pytest.fixture
def side_by_side(monkeypatch):
    """From the call on, every two batches wait for each other. Returns the threads that compute them."""

    def watch():
        threads, both = set(), Barrier(2, timeout=60)

        def together(*args):
            threads.add(current_thread().name)
            both.wait()
            return record_batch(*args)

        for module in (batches, collector, live):
            monkeypatch.setattr(module, "record_batch", together)
        return threads

    return watch


def test_a_batch_for_each_device_is_under_way_and_changes_no_byte(suite, side_by_side, tmp_path):
    settings = settings_of(prompts=PROMPTS[:8], batch_size=2)
    collected(tmp_path / "one", settings, suite)
    threads = side_by_side()
    collected(tmp_path / "split", settings, split_suite())
    assert len(threads) == 2
    assert files_of(tmp_path / "split") == files_of(tmp_path / "one")


@pytest.mark.parametrize("count", [2, 3])
def test_files_are_those_of_one_device(plain, tmp_path, count):
    collected(tmp_path, settings_of(), split_suite(count))
    assert files_of(tmp_path) == files_of(plain)


def test_pictures_and_edits_are_those_of_one_device(tmp_path):
    edit = Edit(vector=torch.arange(1.0, 193.0), sites="double.2.img,single.3", strength=0.3)
    steering = Steering([edit], SPEC, grid=Grid(WIDTH, HEIGHT), num_steps=3)
    settings = settings_of(prompts=PROMPTS[:3], batch_size=1, edits=steering, save_images=True)
    collected(tmp_path / "split", settings, split_suite(autoencoder=True))
    collected(tmp_path / "one", settings, new_suite(autoencoder=True))
    assert files_of(tmp_path / "split") == files_of(tmp_path / "one")


def test_live_blocks_are_those_of_one_device(suite, side_by_side):
    settings = settings_of(prompts=PROMPTS[:4], batch_size=2)
    whole = list(live_blocks(settings, suite))
    threads = side_by_side()
    for ours, theirs in zip(live_blocks(settings, split_suite()), whole, strict=True):
        assert (ours.site, ours.step, ours.generation) == (theirs.site, theirs.step, theirs.generation)
        assert torch.equal(ours.values, theirs.values)
    assert len(threads) == 2


def test_the_batch_of_several_gpus_is_tried_with_as_many_as_will_be_under_way(side_by_side):
    with split_suite().transformer() as model:
        assert isinstance(model, SplitFlux)
        assert batches_under_way(model) == 2
        threads = side_by_side()
        assert gpu_batch(model, recipe_of(steps=(0,))) == SHARD_IMAGES
    assert len(threads) == 2
