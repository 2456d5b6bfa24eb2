"""A small model on disk that LoRAs are merged into."""

from pathlib import Path
from typing import NamedTuple

import pytest

from flux_ir.models.checkpoints.inspect import WeightSource
from flux_ir.models.checkpoints.locate import locate_transformer
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import ModelSpec


class Base(NamedTuple):
    """A spec, its network, and where its weights are."""

    spec: ModelSpec
    flux: Flux
    source: WeightSource

    def path(self, name: str) -> Path:
        """A file beside the weights."""
        return self.source.path.with_name(f"{name}.safetensors")


@pytest.fixture
def base(tmp_path, tiny_spec, tiny_flux, save):
    """A small model on disk."""
    flux, spec = tiny_flux(), tiny_spec()
    return Base(spec, flux, locate_transformer(spec, save(flux, tmp_path / "flux.safetensors")))
