"""Collections as they were before shards (version 1): a capture file for every generation, in groups of 64."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import safetensors.torch

from flux_ir.collecting.batches import record_batch
from flux_ir.collecting.collection import as_lines, versions_of, weights_digest
from flux_ir.collecting.embeddings import embed_prompts, embedding_content, embedding_name
from flux_ir.collecting.prompts import WorkList
from flux_ir.recording.writer import CaptureWriter
from flux_ir.sampling.latents import unpack


def write_old_collection(folder, settings, suite):
    """Everything that an old collection held and that is still of use, but for the statistics."""
    recipe, size = settings.recipe, settings.batch_size
    items = WorkList(settings.prompts, repeats=settings.repeats, seed=settings.seed).items(0, 10**6)
    with suite.text_encoders() as encoders:
        embedded = {item.prompt: embed_prompts(encoders, [item.prompt])[0] for item in items}
    for prompt, one in embedded.items():
        put(folder / embedding_name(prompt), embedding_content(one))
    rows = []
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    with suite.transformer() as model:
        for batch in batches:
            recorded = record_batch(model, recipe, batch, [embedded[item.prompt] for item in batch])
            rows += [write_capture(folder, settings, generation) for generation in recorded.generations()]
    put(folder / "index.jsonl", as_lines(rows))
    described = settings.described(device="cpu", weights=weights_digest(suite.source, autoencoder=False))
    described["network_dtype"], described["dtype"] = described["dtype"], described.pop("store_dtype")
    told = {"version": 1, "settings": described, "generations": len(items), "group": 64}
    told |= {"model": asdict(recipe.spec.flux), "versions": versions_of(model.img_in.weight.device)}
    put(folder / "collection.json", json.dumps(told).encode())


def write_capture(folder, settings, generation):
    """One capture file, and its latent; the row."""
    item, recipe = generation.item, settings.recipe
    row = {**item._asdict(), "model": recipe.spec.name, "path": f"groups/000000/{item.id}.pt"}
    row |= {"sites": [str(site) for site in recipe.sites], "steps": list(recipe.steps)}
    (folder / "groups/000000").mkdir(parents=True, exist_ok=True)
    with CaptureWriter(folder / row["path"], recipe.plan(item)) as sink:
        for step, context in generation.contexts.items():
            sink.begin_step(step, context)
            for site in recipe.sites:
                sink.write(step, site, generation.values[step, site])
    row |= facts(folder / row["path"]) | {"used_txt": generation.used_txt}
    if settings.save_latents:
        path = folder / f"groups/000000/{item.id}.latent.safetensors"
        latent = unpack(generation.latent, recipe.height, recipe.width)[0].contiguous()
        put(path, safetensors.torch.save({"latent": latent}))
        row["latent"] = {"path": path.relative_to(folder).as_posix(), **facts(path)}
    return row


def facts(path):
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def put(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
