"""Small collections of flux-tiny: their settings, one process's share of the work, and the files it leaves."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.storage import LocalStorage, one_job_at
from flux_ir.distributed import Ranks
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.sites import Site

SPEC = get_spec("flux-tiny")
SITES = tuple(map(Site.parse, ("double.0.txt", "double.1.img", "single.1")))
WIDTH, HEIGHT, IMG_TOKENS = 64, 48, 12
WORDS = ("red", "green", "blue", "yellow", "small", "large")
PROMPTS = [f"a {word} {shape}" for word in WORDS for shape in ("circle", "square", "triangle")]


def new_suite(*, autoencoder=False):
    with pytest.MonkeyPatch.context() as patch:
        for variable in (*SPEC.transformer_env, *SPEC.autoencoder_env):
            patch.delenv(variable, raising=False)
        return Suite(SPEC, locate_model(SPEC, autoencoder=autoencoder), plan(0), torch.bfloat16)


def recipe_of(**changes):
    recipe = Recipe(
        spec=SPEC,
        width=WIDTH,
        height=HEIGHT,
        num_steps=3,
        guidance=2.5,
        sites=SITES,
        steps=(0, 1),
        stored_dtype=torch.bfloat16,
        network_dtype=torch.bfloat16,
    )
    return replace(recipe, **changes)


def settings_of(*, prompts=PROMPTS[:5], repeats=1, batch_size=3, seed=7, verify="checksums", **changes):
    draws = {name: changes.pop(name, False) for name in ("save_images", "save_latents")}
    recipe = recipe_of(**changes, to_the_end=any(draws.values()))
    return CollectSettings(recipe, prompts, repeats, seed, batch_size, **draws, verify=verify)


def collect(settings, suite, storage, ranks):
    """The whole job of a rank: yields every generation that it records, and keeps others out until it is done."""
    with one_job_at(storage, ranks):
        job = Collector(settings, suite, storage, ranks)
        for part in (job.verify, job.encode):
            list(part())
        yield from job.record()
        list(job.merge())


def collected(folder, settings, suite, rank=0, world_size=1):
    """Collects, and returns what was recorded. With several ranks, only this one's share; nothing is merged."""
    job = Collector(settings, suite, LocalStorage(folder, rank=rank), Ranks(rank, world_size))
    list(job.verify())
    list(job.encode())
    items = list(job.record())
    if world_size == 1:
        list(job.merge())
    return items


def rows_of(folder):
    """The rows of the index."""
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def tensor_of(folder, row, key):
    """A tensor of one generation, by its row: read with the library that anybody has."""
    with safe_open(folder / row["shard"], framework="pt") as file:
        return file.get_tensor(key)[row["row"]]


def files_of(folder):
    """Every file but those that were found broken, with its content."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in names.items() if not name.startswith("broken/")}
