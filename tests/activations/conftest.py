"""Collections of random values, and what the tests of stored activations share with those of recording."""

import json

import pytest
import torch

from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter, scale_key, site_key, state_key
from flux_ir.recording.stored_dtype import scaled
from flux_ir.sites import Site
from tests.recording.cases import IMG, SITES, TXT
from tests.recording.conftest import plan, run, write

__all__ = ["collection", "plan", "run", "write", "write_collection"]

FLOAT8 = torch.float8_e4m3fn
WIDTHS = {site: 256 if site.endswith("neurons") else 64 for site in SITES}


def write_collection(
    folder, shards=3, *, per_shard=2, sites=SITES, steps=(0, 2), dtype=torch.bfloat16, places=None, settings=None,
    model="tiny", images_per_prompt=2, img_tokens=IMG, used_txt=3, bad=None,
):  # fmt: skip
    """Writes a collection of random values; returns them for every image: [tokens, d] by (step, site), all tokens."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "collection.json").write_text(json.dumps(settings or {"version": 2, "settings": {"model": model}}))
    sites = [Site.parse(site) if isinstance(site, str) else site for site in sites]
    count = {"img": img_tokens, "txt": TXT, None: TXT + img_tokens}
    everything = []
    for shard in range(shards):
        images = range(shard * per_shard, (shard + 1) * per_shard)
        values = []
        for image in images:
            draw = torch.Generator().manual_seed(image)
            values.append(
                {
                    (step, site): torch.randn(count[site.stream], WIDTHS.get(str(site), 64), generator=draw)
                    for step in steps
                    for site in sites
                }
            )
        if bad is not None and bad[0] in images:
            image, site, step = bad
            values[image - images.start][step, Site.parse(site)][5, 1] = float("nan")
        tensors, contents = {}, {}
        for step in steps:
            for site in sites:
                key = site_key(site, step)
                stored = torch.stack([_kept(of[step, site], site, places) for of in values])
                if dtype == FLOAT8:
                    parts = scaled(stored)
                    contents[key], contents[scale_key(key)] = parts.values, parts.scale
                else:
                    contents[key] = stored.to(dtype)
            latents = [torch.full((len(places or range(img_tokens)), 64), image + step / 4) for image in images]
            contents[state_key(step)] = torch.stack(latents).bfloat16()
        if places is not None:
            contents["img_positions"] = torch.tensor([places] * per_shard, dtype=torch.int32)
        tensors = {key: ShardTensor(value.dtype, tuple(value.shape)) for key, value in contents.items()}
        rows = {
            "ids": [f"{image:016x}" for image in images],
            "prompts": [f"prompt {image // images_per_prompt}" for image in images],
            "seeds": list(images),
            "used_txt": [used_txt] * per_shard,
        }
        layout = ShardLayout(tensors, rows, {"model": model, "txt_tokens": TXT})
        with ShardWriter(folder / "shards" / f"{shard:06d}.safetensors", layout) as writer:
            for key, value in contents.items():
                writer.write(key, 0, value)
        everything += values
    return everything


def _kept(value, site, places):
    """The tokens that are stored where only some `places` of the image are."""
    if places is None or site.stream == "txt":
        return value
    txt = TXT if site.stream is None else 0
    return torch.cat([value[:txt], value[txt:][places]])


@pytest.fixture
def collection(tmp_path):
    """Writes a collection of two images a shard: its folder, and all values by image."""

    def make(shards=3, **changes):
        folder = tmp_path / "captures"
        return folder, write_collection(folder, shards, **changes)

    return make
