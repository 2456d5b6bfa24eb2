"""Training in units of what noise does, so that what a prompt decides is learnt, however little of the variance it is.

Most of the variance of a stream is the noise it has to predict, and colours; the shape of an object is a per cent of
it, and no feature is spent on that. Tokens of one prompt, step and position that differ in the noise alone show what
noise does. In x' = S^-1/2 (x - mean), with S their covariance, every direction is measured in that: what noise moves is
small, what the prompt decides and noise hardly touches is large (the within-class whitening of Fisher's discriminant;
classes are prompts, so no label is needed). `fold` takes the transformation into the weights, so files, `encode` and
other programs know nothing of it.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flux_ir.activations.blocks import TokenBlock, TokenSource, run_of
from flux_ir.errors import FluxIRError
from flux_ir.sae.data.filters import Filters, SiteKey
from flux_ir.sae.data.splits import Split
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder

LEAST_TOKENS = 100_000
"""Differences between tokens that S is measured on, or 20 for each dimension, whichever is more."""
MOST_REPEATS = 16
"""Generations of one prompt that are compared at once, and so held in memory."""
FLOOR = 1e-3
"""Of the mean variance, added to every direction: directions without any noise would be infinitely long."""


@dataclass(frozen=True)
class Whitening:
    """x' = (x - mean) matrix, and back."""

    mean: Float[Tensor, "d"]
    matrix: Float[Tensor, "d d"]
    """S^-1/2, symmetric."""
    inverse: Float[Tensor, "d d"]

    @classmethod
    def empty(cls, d: int) -> "Whitening":
        """Zeros, to be filled from a checkpoint."""
        return cls(torch.zeros(d), torch.zeros(d, d), torch.zeros(d, d))

    def to(self, device: torch.device) -> "Whitening":
        """The same on a device."""
        return Whitening(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Raw tokens of any float dtype in units of noise, float32."""
        return (x.float() - self.mean) @ self.matrix

    @torch.no_grad()
    def fold(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """The autoencoder of raw tokens that computes what this one computes of whitened tokens.

        Rows of the decoder become directions of raw space and get length 1 there; each feature's activation is in raw
        units then, and its bias and threshold with it. So the active features stay, and x_hat is the same.
        """
        raw = sae.folded()
        rows = raw.W_dec @ self.inverse
        length = rows.norm(dim=1)
        raw.b_dec.copy_(self.mean + raw.b_dec @ self.inverse)
        raw.W_dec.copy_(rows / length[:, None])
        raw.encoder.copy_((raw.encoder @ self.matrix) * length[:, None])
        for name in raw.in_feature_units:
            scaled = getattr(raw, name) * length  # one threshold for all becomes one for each
            if name in dict(raw.named_buffers()):
                raw.register_buffer(name, scaled)
            else:
                getattr(raw, name).copy_(scaled)
        return raw


def whitening_of(mean: Float[Tensor, "d"], noise: Float[Tensor, "d d"]) -> Whitening:
    """The whitening by the covariance of noise, around the mean of the data."""
    exact = noise.double()
    floor = FLOOR * exact.diagonal().mean()
    variances, axes = torch.linalg.eigh(exact)
    deviations = (variances.clamp_min(0) + floor).sqrt()
    return Whitening(mean.float(), ((axes / deviations) @ axes.T).float(), ((axes * deviations) @ axes.T).float())


def noise_covariance(
    source: TokenSource,
    site: SiteKey,
    *,
    filters: Filters,
    split: Split,
    least_tokens: int = LEAST_TOKENS,
    seed: int = 0,
) -> Float[Tensor, "d d"]:
    """The covariance of tokens around the mean of their prompt, step and position: float64.

    Over training prompts with several generations, in an order that the seed sets, until there are enough differences.
    Raises FluxIRError if there are none, or if generations of a prompt kept tokens of different positions.
    """
    groups = repeated(source, split)
    steps = filters.steps_of(source.steps)
    d = source.d(filters.half(site))
    squares, differences = torch.zeros(d, d, dtype=torch.float64), 0
    for number in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        for step in steps:
            blocks = [source.read(index, filters.half(site), step) for index in groups[number][:MOST_REPEATS]]
            tokens = _without_outliers(_same_positions(blocks, filters), site, step, filters).double()
            apart = (tokens - tokens.mean(dim=0)).flatten(0, 1)
            squares += apart.T @ apart
            differences += (len(tokens) - 1) * tokens.shape[1]
        if differences >= max(least_tokens, 20 * d):
            break
    if not torch.isfinite(squares).all() or not squares.any():
        raise FluxIRError(
            f"generations of one prompt must differ, by finite numbers: at {site or 'the array'} they do not",
            hint="whiten with captures of several seeds for each prompt",
        )
    return squares / differences


def repeated(source: TokenSource, split: Split) -> list[list[int]]:
    """The generations of each training prompt that has several. Raises FluxIRError if none has."""
    by_prompt = defaultdict[str, list[int]](list)
    for index, generation in enumerate(source.generations):
        if generation.prompt and split.has("training", generation.id, generation.prompt):
            by_prompt[generation.prompt].append(index)
    groups = [found for found in by_prompt.values() if len(found) > 1]
    if not groups:
        raise FluxIRError(
            f"whitening takes several generations of a prompt: of {len(by_prompt)} prompts on the training side "
            "none has two",
            hint="collect some prompts with --repeats 4, and name that collection with --whiten",
        )
    return groups


def _same_positions(blocks: list[TokenBlock], filters: Filters) -> Float[Tensor, "repeats tokens d"]:
    """The tokens that are trained on of generations of one prompt."""
    first = blocks[0]
    if any(not torch.equal(block.positions, first.positions) for block in blocks):
        raise FluxIRError(
            f"whitening compares tokens of one position: {blocks[0].generation} and others of its prompt kept tokens "
            "of different positions",
            hint="collect without --tokens_per_image",
        )
    rows = filters.rows(first)
    used = filters.used(run_of(first, rows))
    kept = torch.ones(len(rows), dtype=torch.bool) if used is None else used[0]
    return torch.stack([block.floats()[rows.start : rows.stop][kept].float() for block in blocks])


def _without_outliers(tokens: Tensor, site: SiteKey, step: int, filters: Filters) -> Float[Tensor, "repeats kept d"]:
    """The tokens at the positions where none is an outlier."""
    within = filters.within_limit(tokens.flatten(0, 1), site, step)
    return tokens if within is None else tokens[:, within.view(len(tokens), -1).all(dim=0)]
