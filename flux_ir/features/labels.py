"""A short description of each feature, made from some images and judged on others that its maker never saw.

A hash of the prompt splits the images in two. On one half the describer picks, of all candidates (words and phrases of
the prompts, known concepts, what CLIP sees), the one that tells the feature's strong images best from those on which it
is silent. On the other half the judge asks how often the description holds on strong images and how often on silent
ones that look alike: their balanced accuracy, with its interval, is the label's score. A description that is no better
there than chance is no label. All sets have one image of a prompt, so that counts are of independent draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array, hstack
from scipy.stats import hypergeom, norm
from torch import Tensor

from flux_ir.features.compare import image_scores
from flux_ir.features.examples import SKETCH, Best, ScoreRows, chance, rarity
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.significance import q_values
from flux_ir.features.words import StrengthBounds, read_result
from flux_ir.sae.data.splits import Split
from flux_ir.sites import Stream

LABELS_FILE = "labels.json"
MOST_IMAGES = 100
"""Images of each kind (strong, look-alike, other silent ones) for the describer and for the judge, at most."""
LEAST_IMAGES = 10
"""With fewer strong or silent images, for the describer or the judge, there is no label."""
POOL_IMAGES = 4000
"""Images, of different prompts, among which silent ones are searched: so many for each of the two."""
LEAST_GAIN = 0.05
"""A second term is joined if it raises the describer's score by at least this."""
_SHORTER = 1e-4  # the price of a word: of descriptions with one score the shortest is picked
_ENTRIES_AT_ONCE = 1 << 23  # numbers of a dense block: 64 MB
_NOT_SILENT = -2.0  # in place of a likeness: below every cosine

Ints = NDArray[np.int64]


class Candidates(NamedTuple):
    """Descriptions to choose from, and the images that each holds on."""

    texts: list[str]
    kinds: list[str]
    """Where each is from: words, concepts, clip."""
    has: csr_array
    """[images, descriptions]: 1 where it holds."""


class FeatureImages(NamedTuple):
    """Images of each feature for the describer, or the judge: [d_sae, MOST_IMAGES] each, -1 where there are fewer."""

    strong: Ints
    alike: Ints
    """Silent ones, most like the strong ones in what else fires on them."""
    silent: Ints
    """Any silent ones."""


class Description(NamedTuple):
    """What the describer picked for each feature, [d_sae]: one candidate, or two joined by "and" or "or"."""

    first: Ints
    """-1: there was nothing to describe."""
    second: Ints
    """-1: one is enough."""
    both: NDArray[np.bool_]
    """Joined by "and"; else by "or"."""
    score: NDArray[np.float64]
    """Its balanced accuracy on the describer's own images: too good, as it was picked there."""


@dataclass(frozen=True)
class LabelScores:
    """The scores of the descriptions on the judge's images, [d_sae] each."""

    strong: tuple[Ints, Ints]
    """The strong images that the description holds on, and all of them, as counts."""
    alike: tuple[Ints, Ints]
    silent: tuple[Ints, Ints]
    score: NDArray[np.float64]
    """Balanced accuracy of strong images against look-alikes; NaN where there were too few."""
    low: NDArray[np.float64]
    """The score's 95% interval."""
    high: NDArray[np.float64]
    score_silent: NDArray[np.float64]
    """Balanced accuracy against any silent images."""
    q: NDArray[np.float64]
    """The q-value of Fisher's exact test against look-alikes, over all features judged."""


CLIP_SHARES = (0.05, 0.15, 0.4)
"""On which share of the images a text holds for CLIP. All are candidates: how frequent a thing is, is not known."""


def clip_candidates(texts: Sequence[str], pictures: Tensor, phrases: Tensor) -> Candidates:
    """What CLIP sees: a text holds on the images whose pictures are most like it, a share of all.

    `pictures` [images, d] and `phrases` [texts, d] are of CLIP's shared space. Each text is there once for each of the
    `CLIP_SHARES`. Cosines of different texts cannot be compared (some are like everything), those of one text can.
    """
    units = [torch.nn.functional.normalize(rows.float(), dim=1) for rows in (pictures, phrases)]
    columns = []
    for share in CLIP_SHARES:
        most = max(1, round(share * len(pictures)))
        for text in units[1]:
            column = np.zeros((len(pictures), 1), np.float32)
            column[(units[0] @ text).topk(most).indices.cpu().numpy()] = 1
            columns.append(csc_array(column))
    every = list(texts) * len(CLIP_SHARES)
    return Candidates(every, ["clip"] * len(every), csr_array(hstack(columns)))


# ---- Whose images


def judged_images(folder: FeatureFolder) -> NDArray[np.bool_]:
    """Whether an image is the judge's, [images]: by a hash of its prompt, so alike in every collection."""
    split = Split("prompt", 0.5)
    return np.array([split.has("held_out", row.id, row.prompt) for row in folder.images])


def feature_images(
    folder: FeatureFolder, stream: Stream, bounds: StrengthBounds, groups: Ints, judged: NDArray[np.bool_], *, seed: int
) -> tuple[FeatureImages, FeatureImages]:
    """The describer's images of each feature, and the judge's."""
    d_sae, table = folder.settings.d_sae, folder.table(stream)
    draw = np.random.default_rng(seed)
    signs = draw.integers(0, 2, (d_sae, SKETCH), np.int8).astype(np.float32) * 2 - 1
    directions = signs * rarity(table, folder.settings.images)[:, None]
    strong, sketches = Best(2 * d_sae, MOST_IMAGES), np.zeros((len(groups), SKETCH), np.float32)
    for part in folder.scores(stream):
        image = part.images.start + part.image_of_rows()
        feature = part.feature.astype(np.int64)
        for start, stop in zip(part.image_ptr[:-1], part.image_ptr[1:], strict=True):
            rows = slice(int(start), int(stop))
            if stop > start:
                sketches[image[rows.start]] = part.max[rows] @ directions[feature[rows]]
        entry = np.flatnonzero(part.max >= bounds.strong[feature])
        slot = 2 * feature[entry] + judged[image[entry]]
        nowhere = np.full(len(entry), -1)
        found = ScoreRows(
            slot,
            image[entry],
            groups[image[entry]],
            part.max[entry],
            nowhere.astype(np.int32),
            nowhere.astype(np.int16),
        )
        strong.add(slot, chance(seed, slot, groups[image[entry]]), found)
    sides = []
    for side in (0, 1):
        numbers, values = strong.image[side::2], strong.value[side::2]
        pool = _pool(groups, np.flatnonzero(judged == bool(side)), seed)
        alike, silent = _silent_ones(folder, stream, bounds, numbers, values, pool, sketches, directions)
        sides.append(FeatureImages(numbers, alike, silent))
    return sides[0], sides[1]


def _pool(groups: Ints, images: Ints, seed: int) -> Ints:
    """At most `POOL_IMAGES` of these images, of different prompts, in random order."""
    firsts = images[np.unique(groups[images], return_index=True)[1]]
    return np.random.default_rng(seed).permutation(firsts)[:POOL_IMAGES]


def _silent_ones(
    folder: FeatureFolder,
    stream: Stream,
    bounds: StrengthBounds,
    strong: Ints,
    values: NDArray[np.float32],
    pool: Ints,
    sketches: NDArray[np.float32],
    directions: NDArray[np.float32],
) -> tuple[Ints, Ints]:
    """For each feature, images of the pool on which it is silent: those most like its strong ones, and any."""
    d_sae = len(strong)
    alike, silent = (np.full((d_sae, MOST_IMAGES), -1, np.int64) for _ in range(2))
    if not len(pool):
        return alike, silent
    scores = csc_array(image_scores(folder, stream, pool))
    units = _unit(sketches[pool])
    step = max(1, _ENTRIES_AT_ONCE // max(len(pool), MOST_IMAGES * SKETCH))
    for start in range(0, d_sae, step):
        run = slice(start, start + step)
        # A look-alike is like the strong images' sketches without what the feature itself adds to them.
        own = values[run, :, None] * directions[run, None]
        mean = (_unit(sketches[strong[run]] - own) * (strong[run] >= 0)[..., None]).sum(1)
        is_silent = scores[:, run].toarray() <= bounds.silent[run]
        likeness = np.where(is_silent, units @ _unit(mean).T, _NOT_SILENT)
        most = min(MOST_IMAGES, len(pool))
        order = np.argsort(-likeness, axis=0, kind="stable")[:most]
        found = np.take_along_axis(likeness, order, 0) > _NOT_SILENT
        alike[run, :most] = np.where(found, pool[order], -1).T
        first = np.argsort(~is_silent, axis=0, kind="stable")[:most]  # the pool's own order is random
        found = np.take_along_axis(is_silent, first, 0)
        silent[run, :most] = np.where(found, pool[first], -1).T
    return alike, silent


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    units: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
    return units


# ---- The describer


def describe(candidates: Candidates, side: FeatureImages) -> Description:
    """For every feature the candidate that tells its strong images best from silent ones, on the describer's images.

    The score is balanced accuracy, silent images being look-alikes and others in equal parts. A second candidate is
    joined to the first, by "or" or by "and", if the score gains 0.05.
    """
    d_sae, most = len(side.strong), len(candidates.texts)
    first, second = (np.full(d_sae, -1, np.int64) for _ in range(2))
    both, score = np.zeros(d_sae, np.bool_), np.full(d_sae, np.nan)
    if not most:
        return Description(first, second, both, score)
    enough = np.flatnonzero(np.min([(images >= 0).sum(1) for images in side], axis=0) >= LEAST_IMAGES)
    price = _SHORTER * np.array([len(text.split()) for text in candidates.texts])
    step = max(1, _ENTRIES_AT_ONCE // most)
    for start in range(0, len(enough), step):
        run = enough[start : start + step]
        sets = [_indicators(images[run], candidates.has.shape[0]) for images in side]
        counts = [np.asarray(images.sum(axis=1))[:, None] for images in sets]
        shares = [(images @ candidates.has).toarray() / count for images, count in zip(sets, counts, strict=True)]
        gain = _balanced(shares) - price
        best = gain.argmax(1)
        rows = np.arange(len(run))
        first[run], score[run] = best, gain[rows, best] + price[best]
        own = candidates.has[:, best]  # [images, run]: where each one's first term holds
        # "A or B" holds on the share of A plus that of B without A; "A and B" on the share of B among those with A.
        for is_and in (False, True):
            added = []
            for images, count, share in zip(sets, counts, shares, strict=True):
                kept = images * own.T if is_and else images - images * own.T
                more = (csr_array(kept) @ candidates.has).toarray() / count
                added.append(more if is_and else share[rows, best][:, None] + more)
            gain = _balanced(added) - price
            other = gain.argmax(1)
            value = gain[rows, other] + price[other]
            better = value >= np.where(second[run] >= 0, score[run], score[run] + LEAST_GAIN)
            second[run[better]], both[run[better]], score[run[better]] = other[better], is_and, value[better]
    return Description(first, second, both, score)


def _indicators(images: Ints, n: int) -> csr_array:
    """[features, images]: 1 for those of each list."""
    row, column = np.nonzero(images >= 0)
    return csr_array((np.ones(len(row)), (row, images[row, column])), shape=(len(images), n))


def _balanced(shares: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Balanced accuracy, from the shares of strong, look-alike and other silent images that a description holds on."""
    strong, alike, silent = shares
    found: NDArray[np.float64] = 0.5 + (strong - (alike + silent) / 2) / 2
    return found


def holds(candidates: Candidates, described: Description, features: Ints, images: Ints) -> NDArray[np.bool_]:
    """[features, MOST_IMAGES]: whether each one's description holds on its images; False where there is none."""
    has, most = candidates.has, candidates.has.shape[1]
    keys = np.sort(np.repeat(np.arange(has.shape[0]), np.diff(has.indptr)) * most + has.indices)

    def one(which: Ints) -> NDArray[np.bool_]:
        column = np.broadcast_to(which[:, None], images.shape)
        asked = (images >= 0) & (column >= 0)
        key, found = images[asked] * most + column[asked], np.zeros(images.shape, np.bool_)
        nearest = np.minimum(np.searchsorted(keys, key), max(0, len(keys) - 1))
        found[asked] = keys[nearest] == key if len(keys) else False
        return found

    a, b = one(described.first[features]), one(described.second[features])
    alone = (described.second[features] < 0)[:, None]
    return np.where(alone, a, np.where(described.both[features][:, None], a & b, a | b))


def description_text(candidates: Candidates, described: Description, feature: int) -> str:
    """A description in words, as a person reads it."""
    first, second = int(described.first[feature]), int(described.second[feature])
    if second < 0:
        return candidates.texts[first]
    return f"{candidates.texts[first]} {'and' if described.both[feature] else 'or'} {candidates.texts[second]}"


def sources_of(candidates: Candidates, described: Description, feature: int) -> str:
    """Where the terms of a description come from, as labels.json says it."""
    terms = (described.first[feature], described.second[feature])
    return " and ".join(dict.fromkeys(candidates.kinds[int(term)] for term in terms if term >= 0))


# ---- The judge


def judge(candidates: Candidates, described: Description, side: FeatureImages) -> LabelScores:
    """How well each description tells strong images from silent ones, on the judge's images."""
    d_sae = len(described.first)
    counts = []
    for images in side:
        held = holds(candidates, described, np.arange(d_sae), images).sum(1).astype(np.int64)
        total = (images >= 0).sum(1).astype(np.int64)
        counts.append((held, total))
    strong, alike, silent = counts
    enough = (described.first >= 0) & (np.min([total for _, total in counts], axis=0) >= LEAST_IMAGES)
    low, high = _difference_interval(*strong, *alike)
    score, score_silent = (0.5 + (_share(*strong) - _share(*others)) / 2 for others in (alike, silent))
    # Fisher's exact test: how likely as many strong images are, given how many of all images it holds on.
    p = hypergeom.sf(strong[0] - 1, strong[1] + alike[1], strong[0] + alike[0], strong[1])
    score, low, high, score_silent, p = (
        np.where(enough, column, np.nan) for column in (score, 0.5 + low / 2, 0.5 + high / 2, score_silent, p)
    )
    return LabelScores(strong, alike, silent, score, low, high, score_silent, q_values(p))


def _share(held: Ints, total: Ints) -> NDArray[np.float64]:
    found: NDArray[np.float64] = held / np.maximum(total, 1)
    return found


def _difference_interval(a: Ints, of_a: Ints, b: Ints, of_b: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95% interval of the difference of two shares (Newcombe, 1998, method 10)."""
    p_a, p_b = _share(a, of_a), _share(b, of_b)
    (low_a, high_a), (low_b, high_b) = _wilson(a, of_a), _wilson(b, of_b)
    low = p_a - p_b - np.sqrt((p_a - low_a) ** 2 + (high_b - p_b) ** 2)
    high = p_a - p_b + np.sqrt((high_a - p_a) ** 2 + (p_b - low_b) ** 2)
    return low, high


def _wilson(held: Ints, total: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95% interval of a share (Wilson, 1927)."""
    n, z = np.maximum(total, 1), float(norm.ppf(0.975))
    p = held / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return middle - half, middle + half


def together(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of several sources as one list."""
    texts = [text for part in parts for text in part.texts]
    kinds = [kind for part in parts for kind in part.kinds]
    return Candidates(texts, kinds, csr_array(hstack([part.has for part in parts])))


def read_labels(folder: FeatureFolder, stream: Stream = "img") -> dict[int, Mapping[str, Any]] | None:
    """The labels by feature: `text`, `source`, `score`, `low`, `high`, and counts.

    None: flux-ir label-features has not been run.
    """
    found = read_result(folder, LABELS_FILE)
    if found is None:
        return None
    return {row["feature"]: row for row in found["streams"][stream] if row["text"] is not None}
