"""Training in units of what the prompt does not decide, so that what it decides is learnt, however small it is.

Most of the variance of a stream is the noise it has to predict, and colours; the shape of an object is a per cent of
it, and no feature is spent on that. Tokens of one prompt, step and position that differ in the noise alone show what
noise does; the means of positions and steps over all prompts show what these do. In x' = S^-1/2 (x - mean), with S the
sum of both covariances, what they move is small, and what the prompt decides and noise hardly touches is large (the
within-class whitening of Fisher's discriminant; classes are prompts, so no label is needed). `fold` takes the
transformation into the weights, so files, `encode` and other programs know nothing of it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flux_ir.activations.blocks import TokenBlock, TokenSource, run_of
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.filters import Filters, SiteKey
from flux_ir.sae.data.splits import Split

LEAST_TOKENS = 100_000
"""Differences between tokens that S is measured on, or 20 for each dimension, whichever is more."""
MOST_REPEATS = 16
"""Generations of one prompt that are compared at once, and so held in memory."""
FLOOR = 1e-3
"""The share of the mean variance that is added to every direction: one without noise would be infinitely long."""


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
        """Raw tokens of any float dtype in the units of training, float32."""
        return (x.float() - self.mean) @ self.matrix

    @torch.no_grad()
    def fold(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """The autoencoder of raw tokens that computes what this one computes of whitened tokens.

        Rows of the decoder become directions of raw space and get length 1 there; each feature's activation is in raw
        units then, and its bias and threshold with it. So the active features stay, and x_hat is the same.
        """
        raw = sae.folded()
        # x_hat = mean + x_hat' S^1/2, so d_f = d'_f S^1/2, which is divided by its length again.
        rows = raw.W_dec @ self.inverse
        length = rows.norm(dim=1)
        raw.b_dec.copy_(self.mean + raw.b_dec @ self.inverse)
        raw.W_dec.copy_(rows / length[:, None])
        # x' - b'_dec = (x - b_dec) S^-1/2, so e_f = e'_f S^-1/2, times the length that d_f was divided by.
        raw.encoder.copy_((raw.encoder @ self.matrix) * length[:, None])
        for name in raw.in_feature_units:
            scaled = getattr(raw, name) * length  # one threshold for all becomes one for each
            if name in dict(raw.named_buffers()):
                raw.register_buffer(name, scaled)
            else:
                getattr(raw, name).copy_(scaled)
        return raw


def whitening_of(mean: Float[Tensor, "d"], undecided: Float[Tensor, "d d"]) -> Whitening:
    """The whitening by what the prompt does not decide, S, around the mean of the data."""
    # S^-1/2 and S^1/2 by the eigenvectors of S. The floor keeps a direction without noise from an infinite length.
    exact = undecided.double()
    floor = FLOOR * exact.diagonal().mean()
    variances, axes = torch.linalg.eigh(exact)
    deviations = (variances.clamp_min(0) + floor).sqrt()
    return Whitening(mean.float(), ((axes / deviations) @ axes.T).float(), ((axes * deviations) @ axes.T).float())


def undecided_covariance(
    source: TokenSource,
    site: SiteKey,
    *,
    filters: Filters,
    split: Split,
    least_tokens: int = LEAST_TOKENS,
    seed: int = 0,
) -> Float[Tensor, "d d"]:
    """What the prompt does not decide, as a covariance: float64.

    The sum of two. Noise: of tokens around the mean of their prompt, step and position. Position and step: of their
    means over prompts.

    Over training prompts with several generations, in an order that the seed sets, until there are enough differences.
    Raises FluxIRError if there are none, or if generations of a prompt kept tokens of different positions.
    """
    groups, half = repeated(source, split), filters.half(site)
    steps, d = filters.steps_of(source.steps), source.d(half)
    sums = _CovarianceSums(steps, source.tokens(half), d)
    for number in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        for step in steps:
            blocks = [source.read(index, half, step) for index in groups[number][:MOST_REPEATS]]
            tokens = torch.stack([block.floats() for block in blocks])
            sums.add(steps.index(step), tokens, _compared(blocks, tokens, site, step, filters))
        if sums.differences >= max(least_tokens, 20 * d):
            break
    noise = sums.noise()
    if not torch.isfinite(noise).all() or not noise.any():
        raise FluxIRError(
            f"generations of one prompt must differ, by finite numbers: at {site or 'the array'} they do not",
            hint="whiten with captures of several seeds for each prompt",
        )
    return noise + sums.positions()


class _CovarianceSums:
    """What an analysis of variance of tokens by step, position and prompt adds up. Everything in float64."""

    def __init__(self, steps: Sequence[int], tokens: int, d: int) -> None:
        self.noise_squares, self.prompt_squares = torch.zeros(2, d, d, dtype=torch.float64)
        self.differences = 0
        self.means = torch.zeros(len(steps), tokens, d, dtype=torch.float64)
        """Sums over prompts of the mean of a prompt, for each step and position."""
        self.counts = torch.zeros(len(steps), tokens, dtype=torch.float64)

    def add(self, step: int, tokens: Float[Tensor, "repeats tokens d"], compared: Bool[Tensor, "tokens"]) -> None:
        """Generations of one prompt at one step, of which some positions are compared."""
        exact = tokens[:, compared].double()
        means = exact.mean(dim=0)
        deviations = (exact - means).flatten(0, 1)
        self.noise_squares += deviations.T @ deviations
        self.prompt_squares += means.T @ means
        self.differences += (len(exact) - 1) * len(means)
        rows = compared.nonzero().flatten()
        self.means[step, rows] += means
        self.counts[step, rows] += 1

    def noise(self) -> Tensor:
        """The covariance of tokens around the mean of their prompt, step and position."""
        return self.noise_squares / max(self.differences, 1)

    def positions(self) -> Tensor:
        """The covariance of the means of steps and positions.

        A cell is a step and position; each prompt gives a cell one mean. Means of cells over so few prompts differ by
        chance as well: what is expected of that, within * cells / prompt_means, is taken off the covariance between.
        """
        seen = self.counts > 0
        sums, counts = self.means[seen], self.counts[seen][:, None]
        means, cells, prompt_means = sums / counts, len(counts), counts.sum()
        centre = sums.sum(dim=0) / prompt_means
        between = ((means - centre) * counts).T @ (means - centre) / prompt_means
        if prompt_means == cells:  # one prompt: what it decides and what its positions do are the same
            return torch.zeros_like(between)
        within = (self.prompt_squares - sums.T @ means) / (prompt_means - cells)
        variances, axes = torch.linalg.eigh(between - within * cells / prompt_means)
        return (axes * variances.clamp_min(0)) @ axes.T  # below 0 by chance, it would take noise away


def repeated(source: TokenSource, split: Split) -> list[list[int]]:
    """The generations of each training prompt that has several. Raises FluxIRError if none has."""
    by_prompt = defaultdict[str, list[int]](list)
    for index, generation in enumerate(source.generations):
        if generation.prompt and split.has("training", generation.id, generation.prompt):
            by_prompt[generation.prompt].append(index)
    groups = [group for group in by_prompt.values() if len(group) > 1]
    if not groups:
        raise FluxIRError(
            f"whitening takes several generations of a prompt: of {len(by_prompt)} prompts on the training side "
            "none has two",
            hint="collect some prompts with --repeats 4, and name that collection with --whiten",
        )
    return groups


def _compared(
    blocks: Sequence[TokenBlock], tokens: Tensor, site: SiteKey, step: int, filters: Filters
) -> Bool[Tensor, "tokens"]:
    """Which positions of generations of one prompt are trained on in all of them."""
    first = blocks[0]
    if any(not torch.equal(block.positions, first.positions) for block in blocks):
        raise FluxIRError(
            f"whitening compares tokens of one position: {first.generation} and others of its prompt kept tokens "
            "of different positions",
            hint="collect without --tokens_per_image",
        )
    rows = filters.rows(first)
    used = filters.used(run_of(first, rows))
    compared = torch.zeros(len(first.positions), dtype=torch.bool)
    compared[rows.start : rows.stop] = True if used is None else used[0]
    within = filters.within_limit(tokens.flatten(0, 1), site, step)
    return compared if within is None else compared & within.view(len(blocks), -1).all(dim=0)
