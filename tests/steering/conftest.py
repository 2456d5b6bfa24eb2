"""What tests of steering share: the tiny transformer as a registered model, and dictionaries for its widths."""

from dataclasses import replace

import pytest
import torch

from flux_ir.models.registry import get_spec
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.steering.apply import Steering
from flux_ir.steering.regions import Grid

GRID = Grid(width=48, height=64)
TXT_TOKENS = 7
D_SAE = 20


@pytest.fixture
def tiny_spec(tiny_flux_params):
    """`tiny_flux` as the registry would have it: T5 and CLIP of two layers each."""
    return replace(
        get_spec("flux-tiny"), flux=tiny_flux_params, text_tokens=TXT_TOKENS, t5_layers=2, clip_layers=2, clip_tokens=7
    )


@pytest.fixture
def tiny_sae():
    """Makes a random autoencoder, of `double.1.img` unless told otherwise, which knows how active its features are."""

    def make(site="double.1.img", d_in=64, architecture="topk", seed=0, model="flux-tiny"):
        sae = make_sae(SAEConfig(architecture, d_in=d_in, d_sae=D_SAE, k=6, site=site, model=model, seed=seed))
        draw = torch.Generator().manual_seed(seed)
        sae.set_normalisation(0.1 * torch.randn(d_in, generator=draw), 1.5)
        sae = sae.folded()
        sae.max_active = 1 + torch.rand(D_SAE, generator=draw)
        sae.mean_active = 0.3 * sae.max_active
        return sae.requires_grad_(False)

    return make


@pytest.fixture
def steering(tiny_spec):
    """Makes edits ready for the tiny model."""

    def make(*edits, num_steps=1):
        return Steering(edits, tiny_spec, grid=GRID, num_steps=num_steps)

    return make
