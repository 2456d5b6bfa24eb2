"""One rank of a sharded collection, started by torchrun: `python -m tests.collecting.sharded_job FOLDER CASE`."""

import sys
from pathlib import Path

import torch

from flux_ir.activations import shards
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import joined
from flux_ir.models.sharded import ShardedFlux
from flux_ir.models.suite import Suite
from flux_ir.sites import Site
from tests.collecting.small_jobs import PROMPTS, SPEC, collect, new_suite, settings_of

CASES = {
    "uneven": {"prompts": PROMPTS[:5], "batch_size": 1},
    "inside a block": {
        "prompts": PROMPTS[:5],
        "batch_size": 2,
        "sites": (Site.parse("double.1.img.neurons"), Site.parse("single.2.out")),
        "steps": (0,),
    },
    "to the end": {"prompts": PROMPTS[:3], "batch_size": 2, "save_latents": True, "save_images": True},
}
"""Settings of small collections with shards of two generations. Each leaves the ranks different numbers of batches."""


def settings(case):
    return settings_of(**CASES[case])


def main(folder, case):
    shards.SHARD_IMAGES = 2
    torch.set_num_threads(1)
    with joined() as ranks:
        whole = new_suite(autoencoder=settings(case).save_images)
        suite = Suite(SPEC, whole.source, whole.placement, whole.dtype, sharded_over=ranks.world_size)
        assert isinstance(suite.flux, ShardedFlux)
        made = list(collect(settings(case), suite, LocalStorage(Path(folder), rank=ranks.rank), ranks))
        print(f"rank {ranks.rank}: {len(made)} made", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
