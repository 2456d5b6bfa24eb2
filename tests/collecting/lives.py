"""A job that is killed and started again, in processes that are born with the model: `lives_loaded` loads it once."""

import torch

from flux_ir.activations import shards
from flux_ir.collecting.storage import LocalStorage
from flux_ir.distributed import Ranks
from tests.collecting.small_jobs import PROMPTS, SITES, collect, new_suite, settings_of

SETTINGS = settings_of(prompts=PROMPTS, batch_size=2, sites=SITES[:2], save_latents=True)
loaded = []


def settle(set_attribute):
    """Shards of two generations: nine of them."""
    set_attribute(shards, "SHARD_IMAGES", 2)


def load():
    """Loads every part; with one thread, so that no pool of threads exists when a process is forked."""
    torch.set_num_threads(1)
    suite = new_suite()
    for _ in (suite._load_t5(), suite._load_clip(), suite._load_transformer()):
        pass
    loaded.append(suite)


def live(folder):
    """The whole job."""
    settle(setattr)
    for _ in collect(SETTINGS, loaded[0], LocalStorage(folder), Ranks()):
        pass
