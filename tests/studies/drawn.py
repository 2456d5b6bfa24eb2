"""Pictures of true scenes, as a collection has them, with tokens of which it is known what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flux_ir.activations.blocks import Drawn, Generation, TokenBlock, TokenRun, run_of
from flux_ir.demo.drawing import draw, silhouette
from flux_ir.demo.scenes import COLOURS, Scene, scenes
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sites import Site

SITE, TEXT = Site.parse("single.6.img"), Site.parse("double.3.txt")
TOKENS, D = 64, 12


def true_cover(scene: Scene) -> np.ndarray:
    """The share of each of 8 x 8 patches that the first and the second object cover, as drawn: [2, 64]."""
    cover = np.zeros((2, TOKENS))
    for number, thing in enumerate(scene.things):
        patches = silhouette(thing).reshape(8, 16, 8, 16)
        cover[number] = patches.mean((1, 3)).reshape(-1)
    return cover


def of_colour(scene: Scene, colour: str) -> np.ndarray:
    """The share of each patch that has this colour: [64]."""
    return sum(
        (cover for cover, thing in zip(true_cover(scene), scene.things, strict=False) if thing.colour == colour),
        np.zeros(TOKENS),
    )


@dataclass
class TrueScenes:
    """Channels 0 to 7 of a token are the shares of the eight colours on its patch, the others noise."""

    folder: Path
    scenes: Sequence[Scene]
    seed: int = 0
    steps: tuple[int, ...] = (0,)
    sites: tuple[Site, ...] = (SITE,)
    model: str | None = "flux-tiny"

    def __post_init__(self):
        noise = np.random.default_rng(self.seed).normal(size=(len(self.steps), len(self.scenes), TOKENS, D))
        for channel, colour in enumerate(COLOURS):
            noise[:, :, :, channel] = [of_colour(scene, colour) for scene in self.scenes]
        self.values = torch.tensor(noise).float()
        (self.folder / "pictures" / "000000").mkdir(parents=True, exist_ok=True)
        for scene, generation in zip(self.scenes, self.generations, strict=True):
            with (self.folder / "pictures" / "000000" / f"{generation.id}.jpg").open("wb") as file:
                Image.fromarray(draw(scene)).save(file, "PNG")  # without a loss

    @cached_property
    def generations(self):
        path = self.folder / "shards" / "000000.safetensors"
        return [Generation(f"{self.seed:04x}{i:012x}", scene.caption, path) for i, scene in enumerate(self.scenes)]

    @property
    def runs(self):
        return [range(len(self.scenes))]

    @property
    def identity(self):
        return f"{self.seed:016x}"

    def drawn(self, image):
        picture = self.folder / "pictures" / "000000" / f"{self.generations[image].id}.jpg"
        return Drawn(image, 128, 128, picture if picture.is_file() else None)

    def d(self, site):
        return D

    def tokens(self, site):
        return TOKENS

    def read(self, index, site, step):
        one, positions = self.generations[index], torch.arange(TOKENS, dtype=torch.int32)
        values = self.values[self.steps.index(step), index]
        return TokenBlock(values, None, site, step, one.id, one.prompt, positions, 0, None)

    def read_run(self, images, site, step, tokens=None, memory=None):
        runs = [run_of(self.read(index, site, step), tokens) for index in images]
        parts = [torch.cat(part) for part in ([run.values for run in runs], [run.positions for run in runs])]
        return TokenRun(parts[0], None, parts[1], 0, [None] * len(images))


def drawn(folder: Path, count: int, seed: int) -> TrueScenes:
    """So many scenes as drawn; those of even seeds share no caption with those of odd ones."""
    return TrueScenes(folder, list(islice(scenes(seed, "held_out" if seed % 2 else "train"), count)), seed)


def channels() -> SparseAutoencoder:
    """An autoencoder whose features are the positive parts of the channels."""
    sae = make_sae(SAEConfig("l1", D, D, site=str(SITE), model="flux-tiny", steps=(0,)))
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        for name in ("b_enc", "b_dec"):
            getattr(sae, name).zero_()
    return sae
