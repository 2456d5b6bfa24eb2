"""Two folders of features side by side: two sites, steps, autoencoders, models, or guidance strengths of one model.

What is compared are the generations that both folders have: one prompt, seed and size. Features are matched by what
they do there or by their directions (`matching`), and a pair's frequency and mean activation are compared generation by
generation, so that what a fine-tuned model moves can be told from noise. Beside it stands how alike the activations
themselves are (CKA).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array, vstack
from torch import Tensor

from flux_ir.activations.blocks import TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.features.contents import ImageRow, ScorePart
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.matching import PairedActivations, permuted_groups
from flux_ir.features.scoring import half_of
from flux_ir.features.significance import q_values
from flux_ir.lens.measures import LinearCKA
from flux_ir.sites import Site, Stream

MOST_ROWS = 2**20
"""Tokens that are correlated, at most: 0.8 GB a side where 64 features are active on each."""
_FLIPS_AT_ONCE = 1000
_CHANGE_BYTES = 2**28  # of dense differences [prompts, features]


class Common(NamedTuple):
    """The generations that two folders share, in the order of the first."""

    a: NDArray[np.int64]
    """[n]: their numbers in the first."""
    b: NDArray[np.int64]
    groups: NDArray[np.int64]
    """[n]: equal for those of one prompt."""

    def thinned(self, most: int) -> "Common":
        """At most so many of them, evenly spaced."""
        n = len(self.a)
        chosen = np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(np.int64))
        return Common(self.a[chosen], self.b[chosen], self.groups[chosen])


class Change(NamedTuple):
    """How one number of each pair differs between the sides, over the same generations."""

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    z: NDArray[np.float64]
    """The difference in units of its standard deviation when the sides of each prompt are swapped at random."""
    p: NDArray[np.float64]
    """Two-sided: how often swapping makes the difference as large."""
    q: NDArray[np.float64]


class Alignment(NamedTuple):
    """Debiased linear CKA of the activations of one step of each side."""

    step_a: int
    step_b: int
    tokens: int
    cka: float
    permuted: float
    """The same with the images of one side permuted and positions kept: what is alike by position alone."""


# ---- The same generations


def common_generations(a: FeatureFolder, b: FeatureFolder) -> Common:
    """The generations of both with one prompt, seed and size (without a seed: one id); there may be none."""
    index_in_b = {_key(row): row.index for row in b.images}
    shared = [(row.index, index_in_b[_key(row)], row.prompt or row.id) for row in a.images if _key(row) in index_in_b]
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(prompt, len(numbers)) for _, _, prompt in shared]
    return Common(
        np.array([i for i, _, _ in shared], np.int64),
        np.array([j for _, j, _ in shared], np.int64),
        np.array(groups, np.int64),
    )


def _key(row: ImageRow) -> tuple[str | int | None, ...]:
    return (row.prompt, row.id) if row.seed is None else (row.prompt, row.seed, row.width, row.height)


def no_common_generations(a: FeatureFolder, b: FeatureFolder) -> FluxIRError:
    """The error to raise where two generations in common are needed."""
    return FluxIRError(
        f"activations are compared over the same generations: {a.path} and {b.path} share fewer than two of one "
        "prompt, seed and size",
        hint="collect the same prompts with the same --seed and size, or compare directions with --by decoder",
    )


# ---- What features do there


def image_scores(folder: FeatureFolder, stream: Stream, images: NDArray[np.int64], *, mean: bool = False) -> csr_array:
    """S of these generations [n, d_sae], sparse: the largest activation over tokens and steps, or the mean of all."""

    def rows_of(part: ScorePart, within: NDArray[np.int64]) -> csr_array:
        values = np.asarray(part.mean if mean else part.max, np.float64)
        shape = (len(part.images), folder.settings.d_sae)
        return csr_array((values, part.feature.astype(np.int64), part.image_ptr), shape=shape)[within]

    return _gathered(folder, stream, images, rows_of)


def token_values(folder: FeatureFolder, stream: Stream, images: NDArray[np.int64], steps: Sequence[int]) -> csr_array:
    """The activations on every token of these generations at these steps [n * steps * tokens, d_sae], sparse.

    Padding and tokens that were not kept are rows of zeros.
    """
    at = np.array([folder.steps.index(step) for step in steps], np.int64)

    def rows_of(part: ScorePart, within: NDArray[np.int64]) -> csr_array:
        places = len(part.steps) * part.tokens
        image = np.repeat(np.arange(len(part.images)), np.diff(part.row_ptr[part.image_ptr]))
        feature = np.repeat(part.feature.astype(np.int64), np.diff(part.row_ptr))
        shape = (len(part.images) * places, folder.settings.d_sae)
        values = np.asarray(part.value, np.float64)
        every = csr_array((values, (image * places + part.place.astype(np.int64), feature)), shape=shape)
        row = (within[:, None, None] * len(part.steps) + at[:, None]) * part.tokens + np.arange(part.tokens)
        return every[row.ravel()]

    return _gathered(folder, stream, images, rows_of)


def _gathered(
    folder: FeatureFolder,
    stream: Stream,
    images: NDArray[np.int64],
    rows_of: Callable[[ScorePart, NDArray[np.int64]], csr_array],
) -> csr_array:
    """The rows of these images, in their order, a part at a time."""
    part = images // folder.part_images
    pieces, order = [], []
    for number in np.unique(part):
        chosen = np.flatnonzero(part == number)
        pieces.append(rows_of(folder.part(stream, int(number)), images[chosen] - number * folder.part_images))
        order.append(chosen)
    every, order_of = csr_array(vstack(pieces)), np.argsort(np.concatenate(order), kind="stable")
    each = every.shape[0] // len(images)
    return every[(order_of[:, None] * each + np.arange(each)).ravel()]


def paired_steps(a: FeatureFolder, b: FeatureFolder) -> list[tuple[int, int]]:
    """The steps to compare: those that both have; if each has a single step, these two, whatever their numbers."""
    if len(a.steps) == len(b.steps) == 1:
        return [(a.steps[0], b.steps[0])]
    return [(step, step) for step in a.steps if step in b.steps]


def activations_of(
    a: FeatureFolder, b: FeatureFolder, streams: tuple[Stream, Stream], common: Common, *, tokens: bool
) -> PairedActivations:
    """What all features of both do on the same images, or with `tokens` on the same tokens of them.

    Raises FluxIRError where the tokens are not the same ones.
    """
    if not tokens:
        scores = [image_scores(f, s, images) for f, s, images in zip((a, b), streams, common[:2], strict=True)]
        return PairedActivations(csc_array(scores[0]), scores[1], 1, common.groups)
    pairs = paired_steps(a, b)
    _check_tokens(a, b, streams, common, pairs)
    steps = [[pair[side] for pair in pairs] for side in (0, 1)]
    values = [token_values(*each) for each in zip((a, b), streams, common[:2], steps, strict=True)]
    return PairedActivations(csc_array(values[0]), values[1], values[0].shape[0] // len(common.a), common.groups)


def _check_tokens(
    a: FeatureFolder, b: FeatureFolder, streams: tuple[Stream, Stream], common: Common, pairs: Sequence[object]
) -> None:
    if not pairs:
        raise FluxIRError(
            f"tokens are compared at the same steps: {a.path} has {', '.join(map(str, a.steps))} and {b.path} has "
            f"{', '.join(map(str, b.steps))}",
            hint="compare images with --level image, or score an autoencoder of the other's steps",
        )
    if streams[0] != streams[1] or not all(
        np.array_equal(*positions) for positions in zip(*map(_positions, (a, b), streams, common[:2]), strict=True)
    ):
        raise FluxIRError(
            f"tokens are compared at the same positions: {a.path} and {b.path} have others",
            hint="compare images with --level image, or collect both with the same --tokens_per_image",
        )


def _positions(folder: FeatureFolder, stream: Stream, images: NDArray[np.int64]) -> Iterator[NDArray[np.int32]]:
    for image in images:
        part = folder.part_of(int(image), stream)
        yield part.positions[image - part.images.start]


# ---- What has moved


def paired_change(a: csc_array, b: csc_array, groups: NDArray[np.int64], *, permutations: int, seed: int) -> Change:
    """The means of each column on both sides, over the same rows, and a sign-flip test of their difference.

    Under the null the sides are exchangeable, so the difference of each prompt has a random sign. All images of a
    prompt get one sign, because they are not independent.
    """
    n, columns = a.shape
    prompts, group = np.unique(groups, return_inverse=True)
    member = csr_array((np.ones(n), (group, np.arange(n))), shape=(len(prompts), n))
    z, p = np.zeros(columns), np.ones(columns)
    step = max(1, _CHANGE_BYTES // (8 * len(prompts)))
    for start in range(0, columns, step):
        run = slice(start, start + step)
        difference = (member @ (b[:, run] - a[:, run])).toarray()
        total, length = difference.sum(0), np.sqrt(np.square(difference).sum(0))
        np.divide(total, length, out=z[run], where=length > 0)
        reached = np.zeros(len(total))
        draw = np.random.default_rng(seed)
        for first in range(0, permutations, _FLIPS_AT_ONCE):
            flips = draw.integers(0, 2, (min(_FLIPS_AT_ONCE, permutations - first), len(prompts))) * 2.0 - 1
            # Sums that are equal but for their order of addition count as equal.
            reached += (np.abs(flips @ difference) >= np.abs(total) - 1e-9 * length).sum(0)
        p[run] = (1 + reached) / (1 + permutations)
    return Change(np.asarray(a.mean(axis=0)), np.asarray(b.mean(axis=0)), z, p, q_values(p))


# ---- The activations themselves


def align(
    sources: tuple[TokenSource, TokenSource],
    sites: tuple[Site | None, Site | None],
    common: Common,
    steps: tuple[int, int],
    *,
    seed: int,
) -> Alignment | None:
    """CKA at one step of each, over all tokens of these generations; None if the sides have other tokens."""
    alignment, control = LinearCKA(), LinearCKA()
    others = common.b[permuted_groups(common.groups, np.random.default_rng(seed))]
    for image, same, other in zip(common.a, common.b, others, strict=True):
        x, y, z = (
            _tokens(source, int(number), site, step)
            for source, number, site, step in (
                (sources[0], image, sites[0], steps[0]),
                (sources[1], same, sites[1], steps[1]),
                (sources[1], other, sites[1], steps[1]),
            )
        )
        if len(x) != len(y):
            return None
        alignment.add(x, y)
        shared = min(len(x), len(z))  # prompts differ in length
        control.add(x[:shared], z[:shared])
    return Alignment(*steps, alignment.tokens, alignment.value(), control.value())


def _tokens(source: TokenSource, image: int, site: Site | None, step: int) -> Tensor:
    """The tokens of an image at a step [tokens, d], without padding where it is known."""
    block = source.read(image, site, step)
    values = block.floats()
    if block.used_txt is not None and block.txt_tokens == len(values):
        values = values[: block.used_txt]
    if not torch.isfinite(values).all():
        raise FluxIRError(
            f"activations must be finite numbers: {site or 'the array'} at step {step} holds NaN or infinity in "
            f"generation {source.generations[image].id}",
            hint="capture it again",
        )
    return values


def site_of(folder: FeatureFolder, stream: Stream) -> Site | None:
    """The site whose tokens of this stream a folder is of."""
    return None if folder.settings.site is None else half_of(Site.parse(folder.settings.site), stream)
