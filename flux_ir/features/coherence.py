"""How alike the images are on which a feature is active: the monosemanticity score (Pach et al., 2025), exactly.

With activations a_i of a feature, min-max scaled over images, and unit embeddings e_i of the images,

    MS = sum_{i<j} a_i a_j cos(e_i, e_j) / sum_{i<j} a_i a_j
       = (|S|^2 - sum a_i^2) / ((sum a_i)^2 - sum a_i^2),    S = sum_i a_i e_i,

so one matrix product A^T E has the scores of all features, where the pairwise loop is quadratic in the images. An image
on which the feature is silent has a_i = 0 and takes no part.

What the score would be if the feature chose its images at random is known too. Let a permutation of all images say
which embedding each activation meets: the number of active images and their activations stay. Mean and variance of the
score over all n! permutations are in closed form (those of Mantel's test, 1967), which gives `z`; `p` is the share of
drawn permutations that score at least as high, itself included (Phipson & Smyth, 2010).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.features.contents import Parts, ScorePart

MEMORY_BYTES = 2**29
"""Memory for the sums S of permutations that are drawn together; one at least, [d_sae, d_embedding], is held anyway."""
_TIE = 1e-9  # scores of equal embeddings differ by rounding only


class Coherence(NamedTuple):
    """The coherence of every feature, [d_sae] each; NaN for features that are active on fewer than two images."""

    score: Float[Tensor, "d_sae"]
    """The monosemanticity score, from -1 to 1."""
    z: Float[Tensor, "d_sae"]
    """The distance to the mean of all permutations in standard deviations; NaN where all of them score the same."""
    p: Float[Tensor, "d_sae"]
    """The share of permutations that score at least as high, itself counted; NaN where none were drawn."""


class _Scale(NamedTuple):
    """How many images each feature is active on, and its smallest and largest activation over all images, [d_sae]."""

    active: Tensor
    smallest: Tensor
    largest: Tensor


@torch.no_grad()
def coherence(
    parts: Parts,
    embeddings: Float[Tensor, "images d"],
    d_sae: int,
    *,
    permutations: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    memory_bytes: int = MEMORY_BYTES,
) -> Coherence:
    """The score of every feature over these embeddings, one row for each image; their length does not matter.

    Sums are float64: a feature with one strong image and many weak ones leaves differences that float32 cannot hold.
    As many permutations go through one reading as `memory_bytes` allow. `generator` draws them; None: seed 0.

    Raises FluxIRError for embeddings of zero length or that are not finite, and for another number of images.
    """
    units = _unit_rows(embeddings).to(device)
    n, d = units.shape
    scale = _scale_of(parts, n, d_sae, device)
    powers = torch.zeros(4, d_sae, dtype=torch.float64, device=device)
    observed = torch.zeros(d_sae, d, dtype=torch.float64, device=device)
    # S = sum_i a_i e_i and the sums of a, a^2, a^3 and a^4: all that the score, its mean and its variance need.
    for part in parts():
        a = _scaled(part, scale, d_sae, device)
        observed.addmm_(a, units[part.images.start : part.images.stop])
        powers += torch.stack([a.pow(power).sum(dim=1) for power in range(1, 5)])
    score = _score(observed.square().sum(dim=1), powers)
    del observed  # as large as the sums of one permutation, which come next
    draw = generator or torch.Generator().manual_seed(0)
    permuted, left = torch.zeros(d_sae, dtype=torch.int64, device=device), permutations
    while left:
        count = min(left, max(1, memory_bytes // (8 * d_sae * d)))
        orders = torch.stack([torch.randperm(n, generator=draw) for _ in range(count)])
        permuted += _count_at_least(score, parts, units, orders, scale, powers)
        left -= count
    p = (1 + permuted).double() / (1 + permutations) if permutations else torch.full_like(score, torch.nan)
    z = (score - _mean_cosine(units)) / _deviation(powers, units)
    undefined = score.isnan()
    return Coherence(*(column.masked_fill(undefined, torch.nan).cpu() for column in (score, z, p)))


def _count_at_least(
    score: Tensor, parts: Parts, units: Tensor, orders: Tensor, scale: _Scale, powers: Tensor
) -> Int[Tensor, "d_sae"]:
    """How many of these permutations give each feature its score or a higher one."""
    d_sae, d = len(score), units.shape[1]
    sums = torch.zeros(d_sae, len(orders) * d, dtype=torch.float64, device=units.device)
    for part in parts():
        met = units[orders[:, part.images.start : part.images.stop].to(units.device)]  # [permutations, images, d]
        sums.addmm_(_scaled(part, scale, d_sae, units.device), met.transpose(0, 1).flatten(1))
    lengths = sums.view(d_sae, len(orders), d).square().sum(dim=2)
    return (_score(lengths.T, powers) >= score - _TIE).sum(dim=0)


def _unit_rows(embeddings: Tensor) -> Tensor:
    rows = embeddings.double()
    lengths = rows.norm(dim=1, keepdim=True)
    if not (lengths.isfinite() & (lengths > 0)).all():
        bad = int((~(lengths.isfinite() & (lengths > 0))).flatten().nonzero()[0])
        raise FluxIRError(
            f"embeddings of images must be finite and of some length: that of image {bad} is not",
            hint="look at this picture, or use another model's embeddings",
        )
    return rows / lengths


def _scale_of(parts: Parts, images: int, d_sae: int, device: torch.device | str) -> _Scale:
    active = torch.zeros(d_sae, dtype=torch.int64)
    smallest, largest = torch.full((d_sae,), torch.inf), torch.zeros(d_sae)
    read = 0
    for part in parts():
        features, values = torch.from_numpy(part.feature.astype("i8")), torch.from_numpy(part.max.copy())
        active += torch.bincount(features, minlength=d_sae)
        smallest.scatter_reduce_(0, features, values, "amin")
        largest.scatter_reduce_(0, features, values, "amax")
        read += len(part.images)
    if read != images:
        raise FluxIRError(
            f"every image needs an embedding: got {images} embeddings for {read} images",
            hint="embed the collection that was scored",
        )
    smallest[active < images] = 0  # silent images have no row, and count as 0 in the min-max scale
    return _Scale(*(column.to(device) for column in (active, smallest.double(), largest.double())))


def _scaled(part: ScorePart, scale: _Scale, d_sae: int, device: torch.device | str) -> Float[Tensor, "d_sae images"]:
    """Min-max scaled activations of the images of a part: dense, since products with dense parts are the faster ones
    from about one active feature in a hundred on, and a part is small.
    """
    features, images = (torch.from_numpy(numbers.astype("i8")) for numbers in (part.feature, part.image_of_rows()))
    features, images = features.to(device), images.to(device)
    low, high = scale.smallest[features], scale.largest[features]
    # 0 / 0, so NaN, for a feature that has one value on all images.
    values = (torch.from_numpy(part.max.copy()).double().to(device) - low) / (high - low)
    return torch.zeros(d_sae, len(part.images), dtype=torch.float64, device=device).index_put_(
        (features, images), values
    )


def _score(squared_lengths: Float[Tensor, "*permutations d_sae"], powers: Float[Tensor, "4 d_sae"]) -> Tensor:
    """MS of |S|^2 and of the sums of a and a^2. NaN where no two images have a weight."""
    total = powers[0].square() - powers[1]
    return (squared_lengths - powers[1]) / torch.where(total > 0, total, torch.nan)


def _mean_cosine(units: Float[Tensor, "images d"]) -> Tensor:
    """The mean cosine of two different images: the mean of the score over all permutations, whatever the weights."""
    n = len(units)
    return (units.sum(dim=0).square().sum() - n) / max(1, n * (n - 1))


def _deviation(powers: Float[Tensor, "4 d_sae"], units: Float[Tensor, "images d"]) -> Float[Tensor, "d_sae"]:
    """The standard deviation of the score over all permutations; NaN where it is zero.

    X = sum_{i != j} w_ij g_{pi(i) pi(j)} with weights w_ij = a_i a_j and centred cosines g, whose sum is 0. E X^2 adds
    up pairs of pairs by how many images they share: both (A2 B2), one (A1 - A2, B1 - B2) or none.
    """
    n, (s1, s2, s3, s4) = len(units), powers
    total = s1.square() - s2
    A2 = s2.square() - s4  # sum of w_ij^2
    A1 = s2 * s1.square() - 2 * s1 * s3 + s4  # sum over i of (sum_j w_ij)^2
    mean = _mean_cosine(units)
    rows = units @ units.sum(dim=0) - 1 - (n - 1) * mean  # sum_j g_ij
    B1 = rows.square().sum()
    B2 = (units.T @ units).square().sum() - n - n * (n - 1) * mean.square()
    both = 2 * A2 * B2 / max(1, n * (n - 1))
    one = 4 * (A1 - A2) * (B1 - B2) / max(1, n * (n - 1) * (n - 2))
    none = (total.square() - 4 * A1 + 2 * A2) * (2 * B2 - 4 * B1) / max(1, n * (n - 1) * (n - 2) * (n - 3))
    variance = (both + one + none) / total.square()
    return torch.where(variance > _TIE**2, variance, torch.nan).sqrt()
