"""A small collection with text and image tokens, an autoencoder for it, and everything by brute force."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import flux_ir
from flux_ir.activations.source import open_source
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from tests.activations.conftest import write_collection

D, FEATURES = 64, 48
STEPS = (0, 2)


class Dense(NamedTuple):
    """Every activation of a stream: [images, steps, tokens, d_sae], NaN where there is no token; and the tokens."""

    z: np.ndarray
    x: np.ndarray
    x_hat: np.ndarray


def save_small_sae(folder, site, *, architecture="topk", k=5, d=D, steps=STEPS, model="tiny", seed=0, **config):
    """An untrained autoencoder, as training would leave it."""
    draw = torch.Generator().manual_seed(seed + 100)
    sample = torch.randn(500, d, generator=draw)
    sae = make_sae(
        SAEConfig(architecture, d, FEATURES, k=k, site=site, model=model, steps=steps, seed=seed, **config),
        sample=sample,
    )
    with torch.no_grad():
        sae.b_enc += 0.3 * torch.randn(FEATURES, generator=draw)
        sae.b_enc[3] = -100  # dead
    sae.metadata = {"filters": {"stream": None, "steps": None if steps is None else list(steps)}}
    return save_sae(sae, folder)


def dense_of(sae_folder, captures, site, stream, steps=STEPS):
    """The same by the plainest means: one token block after the other, `encode` of all of it."""
    sae, source = flux_ir.load_sae(sae_folder), open_source(captures)
    z, x, x_hat = [], [], []
    for index in range(len(source.generations)):
        for step in steps:
            block = source.read(index, site, step)
            values = block.floats().float()
            rows = slice(0, block.txt_tokens) if stream == "txt" else slice(block.txt_tokens, None)
            values = values[rows].clone()
            if stream == "txt" and block.used_txt is not None:
                values[block.positions[rows] >= block.used_txt] = torch.nan
            known = ~values.isnan().any(1)
            features = torch.full((len(values), sae.config.d_sae), torch.nan)
            features[known] = sae.encode(values[known])
            z.append(features)
            x.append(values)
            x_hat.append(sae.decode(features))
    shape = (len(source.generations), len(steps), len(x[0]))
    return Dense(*(torch.stack(part).reshape(*shape, -1).detach().double().numpy() for part in (z, x, x_hat)))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A collection of ten images of 4 x 3 tokens and seven text tokens, three of them used, and its scores."""
    folder = tmp_path_factory.mktemp("features")
    write_collection(folder / "captures", 5, sites=("double.0.img", "single.1"), img_tokens=12)
    say_sizes(folder / "captures", 64, 48)
    for name, site in (("img", "double.0.img"), ("whole", "single.1")):
        save_small_sae(folder / "saes" / name, site)
        flux_ir.score_features(folder / "saes" / name, folder / "captures", output_dir=folder / "features")
    return folder


def say_sizes(folder, height, width):
    """Write the sizes of the pictures into the shards' headers, as `collect` does."""
    for path in sorted((folder / "shards").iterdir()):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"] |= {"width": str(width), "height": str(height)}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
