"""Finding features by contrast: between prompts, between parts of the picture, between steps.

All three read what was scored, part by part, and give one number per feature; nothing is sampled.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flux_ir.errors import FluxIRError, counted
from flux_ir.features.contents import ImageRow, Parts, ScorePart

MOST_DELTAS = 4096
"""Most pairs of prompts times seeds: each is a column of float64 with a number for every feature."""
_TIE = 1e-9


class Sides(NamedTuple):
    """Which images are contrasted. A delta is a mean S over some images of the first side minus one of the second."""

    name: str
    deltas: Sequence[tuple[Sequence[int], Sequence[int]]]
    """One for each seed (the images of a prompt are numbered), or for each pair of prompts and seed."""
    units: NDArray[np.int64]
    """[deltas]: a null of paired sides flips the signs of those of one unit together. All -1: sides are not paired."""
    prompt: NDArray[np.int64]
    """[images]: the number of each image's prompt; images of one prompt stay together."""
    left_out: int
    """Images that have both words, or no partner."""

    @property
    def paired(self) -> bool:
        """Whether each prompt of the first side belongs to one of the second."""
        return bool((self.units >= 0).all())


class Contrast(NamedTuple):
    """The contrast of every feature, [d_sae]."""

    difference: NDArray[np.float64]
    """Mean S of the first side minus that of the second."""
    score: NDArray[np.float64]
    """mean |delta| x |mean sign(delta)|: large, and of one sign for all seeds."""
    p: NDArray[np.float64]
    """Two-sided: how often sides that are drawn at random differ as much, the real ones counted among them."""


def sides_of(images: Sequence[ImageRow], contrast: Sequence[str]) -> Sides:
    """The sides that one or two texts stand for: a word or phrase that prompts hold (whole words, in any case), or a
    .txt file of prompts, one a line. One text is contrasted with the rest. Two files of equally many prompts are pairs,
    line by line; two other texts are two groups, without the images that belong to both.

    Raises FluxIRError for a text that fits no prompt, and for sides without images.
    """
    if not 1 <= len(contrast) <= 2:
        raise FluxIRError(f"a contrast has one side or two: got {len(contrast)}", hint="such as --contrast red,blue")
    numbers: dict[str, int] = {}
    prompt = np.array([numbers.setdefault(row.prompt, len(numbers)) for row in images])
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row in images:
        by_prompt[row.prompt].append(row.index)
    lists = [_prompts_of(text, by_prompt) for text in contrast]
    name = " against ".join(Path(text).stem if text.endswith(".txt") else text for text in contrast)
    if len(lists) == 2 and all(text.endswith(".txt") for text in contrast) and len(lists[0]) == len(lists[1]):
        return _pairs(name, lists[0], lists[1], by_prompt, prompt)
    first, second = set(lists[0]), set(lists[1]) if len(lists) == 2 else by_prompt.keys() - set(lists[0])
    both = first & second
    sides = [[by_prompt[text] for text in by_prompt if text in side - both] for side in (first, second)]
    if not all(sides):
        raise FluxIRError(
            f"both sides of a contrast need images: {name if len(lists) == 2 else f'{name} against the rest'} has "
            f"{len(sides[0])} and {len(sides[1])} prompts",
            hint="choose words that some prompts have and some have not",
        )
    seeds = min(max(map(len, side)) for side in sides)
    deltas = [tuple([images[s] for images in side if s < len(images)] for side in sides) for s in range(seeds)]
    left_out = sum(len(by_prompt[text]) for text in both)
    full = name if len(lists) == 2 else f"{name} against the rest"
    return Sides(full, [(d[0], d[1]) for d in deltas], np.full(seeds, -1), prompt, left_out)


def _pairs(
    name: str, first: Sequence[str], second: Sequence[str], by_prompt: dict[str, list[int]], prompt: NDArray[np.int64]
) -> Sides:
    deltas, units, left_out = [], [], 0
    for unit, texts in enumerate(zip(first, second, strict=True)):
        one, other = (by_prompt[text] for text in texts)
        shared = min(len(one), len(other))
        deltas += [([one[seed]], [other[seed]]) for seed in range(shared)]
        units += [unit] * shared
        left_out += len(one) + len(other) - 2 * shared
    if len(deltas) > MOST_DELTAS:
        raise FluxIRError(
            f"pairs of prompts, times their seeds, may be {MOST_DELTAS}: got {len(deltas)}", hint="give fewer pairs"
        )
    return Sides(name, deltas, np.array(units), prompt, left_out)


def _prompts_of(text: str, known: dict[str, list[int]]) -> list[str]:
    if text.endswith(".txt"):
        path = Path(text)
        if not path.is_file():
            raise FluxIRError(f"there is no list of prompts {path}", hint="a .txt file with a prompt a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if unknown := [line for line in lines if line not in known]:
            raise FluxIRError(
                f"{counted(len(unknown), 'prompt')} of {path} were not collected, such as {unknown[0]!r}",
                hint="list prompts of this collection, or collect these",
            )
        return lines
    pattern = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)
    prompts = [prompt for prompt in known if text and pattern.search(prompt)]
    if not prompts:
        raise FluxIRError(f"no prompt holds {text!r}", hint="words are matched whole, in any case")
    return prompts


@torch.no_grad()
def contrast_prompts(
    parts: Parts, sides: Sides, d_sae: int, *, permutations: int = 0, generator: torch.Generator | None = None
) -> Contrast:
    """How far S differs between the sides, in which direction and how steadily. `p` is NaN without permutations.

    The null of paired sides gives the deltas of each pair of prompts a random sign; that of two groups lets whole
    prompts change sides. Images of one prompt are not independent, so they always stay together.
    """
    draw = generator or torch.Generator().manual_seed(0)
    n, count = len(sides.prompt), len(sides.deltas)
    image = np.concatenate([np.array([*one, *other]) for one, other in sides.deltas])
    column = np.repeat(np.arange(count), [len(one) + len(other) for one, other in sides.deltas])
    weight = np.concatenate(
        [np.repeat([1 / len(one), -1 / len(other)], [len(one), len(other)]) for one, other in sides.deltas]
    )
    side = np.zeros(n)
    side[image] = np.sign(weight)
    exchanged = _exchanged(sides, side, 0 if sides.paired else permutations, draw)
    deltas, sums = np.zeros((d_sae, count)), np.zeros((d_sae, 1 + len(exchanged)))
    for part in parts():
        scores, here = _dense(part, d_sae), slice(part.images.start, part.images.stop)
        columns = np.zeros((len(part.images), count))
        inside = (image >= here.start) & (image < here.stop)
        columns[image[inside] - here.start, column[inside]] = weight[inside]
        deltas += scores @ columns
        sums += scores @ np.stack([_means(side), *map(_means, exchanged)], axis=1)[here]
    difference = sums[:, 0]
    score = np.abs(deltas).mean(axis=1) * np.abs(np.sign(deltas).mean(axis=1))
    if not permutations:
        return Contrast(difference, score, np.full(d_sae, np.nan))
    if sides.paired:
        signs = torch.randint(0, 2, (int(sides.units.max()) + 1, permutations), generator=draw).numpy() * 2.0 - 1
        observed, drawn = deltas.mean(axis=1), deltas @ signs[sides.units] / count
    else:
        observed, drawn = difference, sums[:, 1:]
    reached = (np.abs(drawn) >= np.abs(observed)[:, None] - _TIE).sum(axis=1)
    return Contrast(difference, score, (1 + reached) / (1 + permutations))


def _means(side: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights with which a sum over images is a difference of means."""
    return np.where(side > 0, 1 / max(1, (side > 0).sum()), 0) - np.where(side < 0, 1 / max(1, (side < 0).sum()), 0)


def _exchanged(
    sides: Sides, side: NDArray[np.float64], permutations: int, draw: torch.Generator
) -> list[NDArray[np.float64]]:
    """Draws of the null: the side of every image, -1, 0 or 1, after whole prompts have changed sides."""
    of_prompt = np.zeros(int(sides.prompt.max()) + 1)
    of_prompt[sides.prompt] = side
    contrasted = np.flatnonzero(of_prompt)
    drawn = []
    for _ in range(permutations):
        others = of_prompt.copy()
        others[contrasted] = of_prompt[contrasted[torch.randperm(len(contrasted), generator=draw).numpy()]]
        drawn.append(np.where(side != 0, others[sides.prompt], 0))
    return drawn


def _dense(part: ScorePart, d_sae: int) -> NDArray[np.float64]:
    """S of a part, [d_sae, images]."""
    scores = np.zeros((d_sae, len(part.images)))
    scores[part.feature.astype(np.int64), part.image_of_rows()] = part.max
    return scores


# A region of the picture


def region_mask(region: Sequence[float], rows: int, columns: int) -> NDArray[np.bool_]:
    """Which tokens have their middle in a rectangle (left, top, right, bottom, in shares of the picture from 0 to 1).

    Raises FluxIRError for a rectangle that is none, or that holds no token or all of them.
    """
    if len(region) != 4 or not (0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1):
        raise FluxIRError(
            f"a region is left,top,right,bottom in shares of the picture: got {','.join(f'{x:g}' for x in region)}",
            hint="the upper left quarter is --region 0,0,0.5,0.5",
        )
    left, top, right, bottom = region
    x, y = (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows
    mask = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
    if not mask.any() or mask.all():
        raise FluxIRError(
            f"a region must hold some tokens and leave some out: it holds {mask.sum()} of {mask.size}",
            hint="make it larger than a token, and smaller than the picture",
        )
    return mask


def contrast_region(
    parts: Parts, mask_of: Callable[[int], NDArray[np.bool_] | None], d_sae: int
) -> NDArray[np.float64]:
    """The mean activation of every feature inside a region minus that outside, zeros included, over images and steps.

    `mask_of` gives the region of an image on its grid, [rows, columns], or None for one that has none: it is left out.
    """
    sums, images = np.zeros(d_sae), 0
    for part in parts():
        weights = np.zeros((len(part.images), part.tokens))
        for number, positions in enumerate(part.positions):
            mask = mask_of(part.images.start + number)
            if mask is None:
                continue
            there = positions >= 0
            inside = mask.ravel()[positions[there]]
            if inside.any() and not inside.all():
                weights[number, there] = np.where(inside, 1 / inside.sum(), -1 / (~inside).sum())
                images += 1
        row = part.row_of_entries()
        values = part.value * weights[part.image_of_rows()[row], part.place.astype(np.int64) % part.tokens]
        sums += np.bincount(part.feature[row].astype(np.int64), values, minlength=d_sae) / len(part.steps)
    return sums / images if images else np.full(d_sae, np.nan)


# Steps


def step_variance(parts: Parts, d_sae: int) -> NDArray[np.float64]:
    """The variance over steps of the largest activation at each step, zeros included, averaged over all images."""
    sums, images = np.zeros(d_sae), 0
    for part in parts():
        images += len(part.images)
        if not len(part.value):
            continue
        steps = len(part.steps)
        row = part.row_of_entries()
        run = row * steps + part.place.astype(np.int64) // part.tokens  # ascending, as entries are
        first = np.flatnonzero(np.diff(run, prepend=-1))
        largest = np.maximum.reduceat(np.asarray(part.value, np.float64), first)
        of_row = row[first]
        rows = len(part.feature)
        mean = np.bincount(of_row, largest, minlength=rows) / steps
        square = np.bincount(of_row, largest**2, minlength=rows) / steps
        variance = np.maximum(square - mean**2, 0)
        sums += np.bincount(part.feature.astype(np.int64), variance, minlength=d_sae)
    return sums / max(1, images)
