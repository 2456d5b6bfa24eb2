"""The autoencoders on the page, and what is known of their features: which are active in a token, labels, examples.

Next: `studio`, whose tokens they read.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.labels import read_labels
from flux_ir.models.registry import ModelSpec
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.folder import load_sae
from flux_ir.sae.files.formats import weights_file
from flux_ir.sites import Site
from flux_ir.steering.apply import Steering
from flux_ir.steering.edits import Edit, Unit
from flux_ir.steering.regions import Grid
from flux_ir.visualize.pictures import PictureReader

EXAMPLE_PX = 96


class ActiveFeature(NamedTuple):
    """A feature in one token."""

    dictionary: int
    """Which of the page's autoencoders it is of."""
    feature: int
    activation: float
    share: float | None
    """Of the largest activation that it had in training; None: the autoencoder's folder does not say that."""


class Dictionary:
    """One autoencoder: the folder as it was given, its weights, its site, and a folder of features if there is one."""

    def __init__(self, folder: str, sae: SparseAutoencoder, known: FeatureFolder | None) -> None:
        self.folder, self.sae, self.known = folder, sae, known
        self.site = Site.parse(str(sae.config.site))
        labels = read_labels(known) if known is not None and "labels" in known.stages else None
        self._labels = labels or {}

    @property
    def unit(self) -> Unit:
        """What strengths are measured in: the feature's own maximum where it is known, else the tokens' length."""
        return "norm" if self.sae.max_active is None else "max"

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps it was trained on; none: they are not known."""
        return self.sae.config.steps or ()

    def check_feature(self, feature: int) -> None:
        """Raises FluxIRError for a feature that there is not."""
        if not 0 <= feature < self.sae.config.d_sae:
            raise FluxIRError(
                f"{Path(self.folder).name} has the features 0 to {self.sae.config.d_sae - 1}: got {feature}",
                hint="features of another autoencoder have other numbers",
            )

    @torch.no_grad()
    def active(self, number: int, token: Tensor, *, most: int) -> list[ActiveFeature]:
        """The strongest features of a token [d], as the page's autoencoder of this number."""
        z = self.sae.encode(token[None].float())[0]
        values, features = z.topk(min(most, len(z)))
        return [
            ActiveFeature(number, int(feature), float(value), self.share(int(feature), float(value)))
            for value, feature in zip(values, features, strict=True)
            if value > 0
        ]

    def share(self, feature: int, activation: float) -> float | None:
        """An activation in the feature's own maximum; None where that is not known, or is 0."""
        if self.sae.max_active is None or not self.sae.max_active[feature] > 0:
            return None
        return activation / float(self.sae.max_active[feature])

    def label(self, feature: int) -> str | None:
        """A short description that was judged on pictures its maker never saw, if there is one."""
        label: dict[str, Any] | None = self._labels.get(feature)  # type: ignore[assignment]  # any mapping
        return None if label is None else str(label["text"])

    def examples(self, feature: int, count: int = 3) -> list[Image.Image]:
        """Small pictures of the images on which a feature is strongest, as far as they are there."""
        if self.known is None or "examples" not in self.known.stages:
            return []
        images = [int(image) for image in self.known.examples().top[feature] if image >= 0]
        paths = [path for image in images[:count] if (path := self.known.picture(image)) is not None]
        reader = PictureReader(skip_broken=True)
        pictures = [picture for path in paths if (picture := reader.read(path, draft_px=EXAMPLE_PX)) is not None]
        for picture in pictures:
            picture.thumbnail((EXAMPLE_PX, EXAMPLE_PX))
        return pictures


def open_dictionaries(
    saes: Sequence[str | Path], features: Sequence[str | Path], spec: ModelSpec, grid: Grid, device: str
) -> list[Dictionary]:
    """The autoencoders of these folders, each with its folder of features if that is among `features`.

    Raises FluxIRError for an autoencoder that is not of image tokens of this model, and for features of another one.
    """
    digests = {str(folder): _weights(folder) for folder in saes}
    if len(set(digests.values())) < len(saes):
        raise FluxIRError("--sae names one autoencoder twice", hint="leave one of them out")
    known: dict[str, FeatureFolder] = {}
    for folder in map(open_features, features):
        if folder.settings.weights not in digests.values():
            raise FluxIRError(
                f"{folder.path} holds the features of another autoencoder: of {folder.sae}",
                hint="name that one with --sae, or leave these out",
            )
        known[folder.settings.weights] = folder
    dictionaries = []
    for path, digest in digests.items():
        sae = load_sae(path, device=device)
        _check(path, sae, spec, grid)
        dictionaries.append(Dictionary(path, sae, known.get(digest)))
    return dictionaries


def _weights(folder: str | Path) -> str:
    with weights_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: str, sae: SparseAutoencoder, spec: ModelSpec, grid: Grid) -> None:
    if sae.config.site is None:
        raise FluxIRError(
            f"the autoencoder in {folder} does not say of which site it is",
            hint="flux-ir steer takes it, with --sites",
        )
    site = Site.parse(sae.config.site)
    if site.per_prompt or site.stream == "txt":
        raise FluxIRError(
            f"the page shows the features of a picture's patches: {folder} is of {site}, which has text tokens",
            hint="flux-ir steer turns its features",
        )
    # An edit that is ready for this model has the right model, site and width, all of which are said in words there.
    Steering([Edit(kind="ablate", sae=folder, feature=0)], spec, grid=grid, num_steps=1, loaded={folder: sae})
