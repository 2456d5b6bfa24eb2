"""The embedding of every image, by which images are compared: CLIP's, or one of the model's own.

They are made once and kept in the folder of features, a file for each part of the scores, so that a run that was
stopped goes on. Next: `coherence`, which compares the images of a feature by them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flux_ir.collecting.shard_notes import files_digest
from flux_ir.errors import FluxIRError
from flux_ir.features.contents import digest_of
from flux_ir.features.folder import FeatureFolder, read_tensors, write_tensors
from flux_ir.features.scoring import Scoring
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.clip import ClipPicture, Preprocessing, read_pixels
from flux_ir.sites import Stream

FOLDER = "embeddings"
BATCH = 32
"""Images that go through a network together."""


@runtime_checkable
class Embedder(Protocol):
    """Makes the embeddings of images."""

    centred: bool
    """Whether the mean over all images is subtracted before they are compared: most of an activation is the same for
    all images and would make all cosines 1. CLIP's are compared as they are, as the score's authors do.
    """

    def described(self) -> Mapping[str, Any]:
        """What the embeddings depend on besides the captures, as JSON can say it."""

    def embed(self, images: range) -> Float[Tensor, "images d"]:
        """The embeddings of images that lie within one part."""


class SiteEmbedder:
    """The mean token of the autoencoder's own site, at the last of its steps.

    It needs no other model, but features and embeddings are then read from the same activations, so it proves less.
    """

    centred = True

    def __init__(self, scoring: Scoring, stream: Stream) -> None:
        self.scoring, self.stream, self.step = scoring, stream, scoring.settings.steps[-1]

    def described(self) -> Mapping[str, Any]:
        return {"kind": "site", "site": self.scoring.settings.site, "stream": self.stream, "step": self.step}

    def embed(self, images: range) -> Tensor:
        batches = []
        for run in self.scoring.runs(images, BATCH):
            tokens = self.scoring.read(run, self.step, self.stream)
            counted = torch.from_numpy(tokens.counted).float()[..., None]
            batches.append((tokens.values.float() * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1))
        return torch.cat(batches)


class LatentEmbedder:
    """The mean of each picture's latent over its pixels, [channels]: mostly its colours.

    They come from `--save_latents` where they were kept, else from the pictures. Raises FluxIRError without either.
    """

    centred = True

    def __init__(self, folder: FeatureFolder, shards: list[Path | None], autoencoder: AutoEncoder | None) -> None:
        """`shards` are the files of the generations; `autoencoder` encodes pictures where latents were not kept."""
        self.folder, self.shards, self.autoencoder = folder, shards, autoencoder
        self.kept = has_latents(folder, shards)
        if not self.kept and autoencoder is None:
            raise FluxIRError(f"the latents of {folder.captures} were not kept", hint="give the autoencoder")
        if not self.kept:
            check_pictures(folder)

    def described(self) -> Mapping[str, Any]:
        return {"kind": "latents" if self.kept else "encoded pictures"}

    def embed(self, images: range) -> Tensor:
        return torch.stack([self._latent(image).float().flatten(1).mean(dim=1) for image in images])

    @torch.no_grad()
    def _latent(self, image: int) -> Tensor:
        if self.kept:
            path = latent_file(self.folder.images[image].id, self.shards[image])
            assert path is not None  # `has_latents` has looked
            return safetensors.torch.load_file(path)["latent"]
        assert self.autoencoder is not None
        pixels = torch.from_numpy(np.asarray(open_picture(self.folder, image), np.float32)).permute(2, 0, 1) / 127.5 - 1
        return self.autoencoder.encode(pixels[None].to(self.autoencoder.encoder.conv_in.weight)).cpu()[0]


class ClipEmbedder:
    """The pictures in CLIP's shared space, as the monosemanticity score is defined."""

    centred = False

    def __init__(self, folder: FeatureFolder, tower: ClipPicture, preprocessing: Preprocessing, weights: str) -> None:
        """`weights` stands for the content of CLIP's files."""
        check_pictures(folder)
        self.folder, self.tower, self.preprocessing, self.weights = folder, tower, preprocessing, weights

    def described(self) -> Mapping[str, Any]:
        return {"kind": "clip", "weights": self.weights}

    @torch.no_grad()
    def embed(self, images: range) -> Tensor:
        batches = []
        for start in range(images.start, images.stop, BATCH):
            paths = [
                self.folder.picture(image) for image in images[start - images.start : start - images.start + BATCH]
            ]
            pixels = torch.stack([read_pixels(path, self.preprocessing) for path in paths if path is not None])
            batches.append(self.tower(pixels).float().cpu())
        return torch.cat(batches)


def clip_digest(clip: Path) -> str:
    """What stands for the content of CLIP's files: a digest of the weights in its folder."""
    return files_digest(path for pattern in ("*.safetensors", "*.bin") for path in clip.glob(pattern))


def make_embeddings(folder: FeatureFolder, embedder: Embedder) -> Iterator[int]:
    """Makes the embeddings that are missing; yields the number of each part when its file is there."""
    for number in range(folder.parts):
        first = number * folder.part_images
        images = range(first, min(first + folder.part_images, folder.settings.images))
        path = _file(folder, embedder, number)
        if not path.is_file():
            rows = embedder.embed(images)
            if not rows.isfinite().all():
                bad = images[int((~rows.isfinite()).any(dim=1).nonzero()[0])]
                raise FluxIRError(
                    f"the embedding of image {bad} is not finite", hint="look at this picture, or embed in float32"
                )
            write_tensors(path, {"embedding": rows.numpy()}, dict(embedder.described()))
        yield number


def read_embeddings(folder: FeatureFolder, embedder: Embedder) -> Float[Tensor, "images d"]:
    """The embeddings of all images, float64, after `make_embeddings`; minus their mean if the embedder is centred."""
    parts = [read_tensors(_file(folder, embedder, number))[0]["embedding"] for number in range(folder.parts)]
    rows = torch.from_numpy(np.concatenate(parts)).double()
    return rows - rows.mean(dim=0) if embedder.centred else rows


def _file(folder: FeatureFolder, embedder: Embedder, number: int) -> Path:
    name = digest_of([folder.settings.captures, folder.part_images, dict(embedder.described())])
    return folder.path / FOLDER / name / f"{number:05d}.safetensors"


# Pictures and latents


def check_pictures(folder: FeatureFolder) -> None:
    """Raises FluxIRError unless every generation has its picture on this machine."""
    lacking = sum(folder.picture(row.index) is None for row in folder.images)
    if lacking:
        raise FluxIRError(
            f"pictures are needed, and {lacking} of {len(folder.images)} images of {folder.captures} have none here",
            hint="collect with --save_images",
        )


def open_picture(folder: FeatureFolder, image: int) -> Image.Image:
    """The picture of a generation, RGB. Raises FluxIRError for one that is not there, or cannot be read."""
    path = folder.picture(image)
    if path is None:
        raise FluxIRError(f"image {image} of {folder.captures} has no picture here", hint="collect with --save_images")
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise FluxIRError(f"{path} must be a picture that can be read: {error}", hint="collect it again") from error


def latent_file(generation: str, shard: Path | None) -> Path | None:
    """Where `flux-ir collect --save_latents` keeps the latent of a generation; None: nowhere on this machine."""
    if shard is None:
        return None
    path = shard.parents[1] / "latents" / shard.stem / f"{Path(generation).name}.safetensors"
    return path if path.is_file() else None


def has_latents(folder: FeatureFolder, shards: list[Path | None]) -> bool:
    """Whether the latents of all generations were kept."""
    pairs = zip(folder.images, shards, strict=True)
    return "://" not in folder.captures and all(latent_file(row.id, shard) is not None for row, shard in pairs)
