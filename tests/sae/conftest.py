"""Small random autoencoders whose every parameter counts, and tokens that some of their features fire on."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder

WIDTH, FEATURES = 12, 40


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Makes raw tokens around a mean that is far from 0, one dimension of which is huge."""

    def make(n: int = 30, d: int = WIDTH, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        mean = 3 * torch.randn(d, generator=torch.Generator().manual_seed(99))
        x = torch.randn(n, d, generator=draw) + mean
        x[:, 0] *= 20
        return x.to(dtype)

    return make


@pytest.fixture
def random_sae(tokens: Callable[..., Tensor]) -> Callable[..., SparseAutoencoder]:
    """Makes an autoencoder as training might leave it: encoder and decoder apart, biases and thresholds spread."""

    def make(architecture: str, *, seed: int = 0, **fields: Any) -> SparseAutoencoder:
        config = SAEConfig(**{"d_in": WIDTH, "d_sae": FEATURES, "k": 5, **fields}, architecture=architecture)
        sae = make_sae(config, sample=tokens(500, config.d_in, seed=7))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            if not config.tied:
                sae.encoder += 0.1 * torch.randn(sae.encoder.shape, generator=draw)
            for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
                if name in ("b_enc", "b_mag", "r_mag", "b_dec"):
                    tensor += 0.2 * torch.randn(tensor.shape, generator=draw)
                if name == "threshold":
                    tensor.copy_(0.3 * math.sqrt(config.d_in) * torch.rand(tensor.shape, generator=draw) + 0.01)
        return sae

    return make
