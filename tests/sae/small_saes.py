"""Small autoencoders of every architecture, what their losses are given, and parts of the formulas written out."""

import pytest
import torch

from flux_ir.sae.architectures import losses
from flux_ir.sae.architectures.config import ARCHITECTURES, HAS_K, SAEConfig
from flux_ir.sae.architectures.losses import TrainingState
from flux_ir.sae.architectures.make import make_sae

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
with_k = pytest.mark.parametrize("architecture", HAS_K)
N, D, F, K = 16, 8, 24, 3


def xn_of(n=N, seed=0, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(sae, *, dead=None, sparsity_scale=1.0, across=None, k=None):
    across = losses.OneProcess() if across is None else across
    return TrainingState(0, 0, dead, k or sae.config.k, sparsity_scale, across)


def made(architecture, **fields):
    """Encoder and decoder apart, biases not 0, so that no term hides behind another."""
    sae = make_sae(SAEConfig(architecture, **{"d_in": D, "d_sae": F, "k": K, **fields}))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec" and name != "threshold":
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return sae


def grads(sae, total):
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def plain_pre(sae, xn):
    return (xn - sae.b_dec) @ sae.encoder.T + sae.b_enc


def variance(x):
    return (x - x.mean(dim=0)).square().sum(dim=1).mean()
