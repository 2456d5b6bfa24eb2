"""Captions, and activations whose every feature is known: what a word lifts is what was planted."""

import itertools

import numpy as np
import torch

import flux_ir
from flux_ir.activations.shards import ShardLayout, ShardTensor, ShardWriter, site_key
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from flux_ir.sites import Site

SITE = Site.parse("double.0.img")
SIZES, COLOURS, SHAPES = ("large", "small"), ("red", "blue", "green", "yellow"), ("circle", "square", "star", "ring")
BACKGROUNDS, TIMES = ("white", "black", "gray"), ("dawn", "noon", "dusk", "night", "midnight")
CAPTIONS = [
    f"a {size} {colour} {shape} on a {background} background, at {time}"
    for size, colour, shape, background, time in itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS, TIMES)
]
RED, CIRCLE, RED_SQUARE, ROUND, NOISE, DEAD, RARE, ALWAYS, LARGE_ON_WHITE = range(9)
FEATURES, REPEATS, TOKENS, PER_SHARD = 16, 2, 3, 96


def strengths(caption, draw, image):
    """How strong each feature is on an image of the caption."""
    found = np.zeros(FEATURES, np.float32)

    def plant(feature, there, least=2.0):
        found[feature] = (least + draw.random()) * there

    plant(RED, "red" in caption)
    plant(CIRCLE, "circle" in caption)
    plant(RED_SQUARE, "red square" in caption)
    plant(ROUND, "circle" in caption or "ring" in caption)
    plant(NOISE, draw.random() < 0.3)
    plant(RARE, image in (3, 200, 500, 700))
    plant(ALWAYS, True, least=4.0 if "star" in caption else 1.0)
    plant(LARGE_ON_WHITE, "large" in caption and "white" in caption)
    return found


def write_planted(root):
    """The captures, the autoencoder that reads them off, and its scores; gives the folder of features."""
    draw = np.random.default_rng(0)
    prompts = [caption for caption in CAPTIONS for _ in range(REPEATS)]
    values = torch.zeros(len(prompts), TOKENS, FEATURES)
    for image, prompt in enumerate(prompts):
        token = draw.integers(TOKENS)
        values[image, token] = torch.from_numpy(strengths(prompt, draw, image))
    (root / "captures" / "shards").mkdir(parents=True)
    (root / "captures" / "collection.json").write_text('{"version": 2, "settings": {"model": "tiny"}}')
    key = site_key(SITE, 0)
    for number, start in enumerate(range(0, len(prompts), PER_SHARD)):
        run = range(start, start + PER_SHARD)
        rows = {"ids": [f"{image:016x}" for image in run], "prompts": [prompts[image] for image in run]}
        rows |= {"seeds": list(run), "used_txt": [3] * len(run)}
        tensors = {key: ShardTensor(torch.float32, (len(run), TOKENS, FEATURES))}
        layout = ShardLayout(tensors, rows, {"model": "tiny", "txt_tokens": 7, "width": 48, "height": 16})
        with ShardWriter(root / "captures" / "shards" / f"{number:06d}.safetensors", layout) as writer:
            writer.write(key, 0, values[start : start + PER_SHARD])
    config = SAEConfig("l1", FEATURES, FEATURES, site=str(SITE), model="tiny", steps=(0,))
    sae = make_sae(config, sample=values.flatten(0, 1))
    with torch.no_grad():
        for weight in (sae.W_dec, sae.encoder):
            weight.copy_(torch.eye(FEATURES))
        for bias in (sae.b_enc, sae.b_dec, sae.norm_mean):
            bias.zero_()
        sae.norm_scale.fill_(1)
    save_sae(sae, root / "saes" / "planted")
    return flux_ir.score_features(root / "saes" / "planted", root / "captures", output_dir=root / "features")
