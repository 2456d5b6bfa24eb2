"""The list of all features as the pages hold it: a column per number, what the search reads, and first pictures."""

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.features.contents import FeatureTable
from flux_ir.features.folder import FeatureFolder
from flux_ir.sites import Stream

Ints = NDArray[np.integer[Any]]
Unit = Literal["number", "share", "count", "step"]

TOP_THUMBNAILS = 8
CHUNK = 4096  # features whose prompts' words are counted at once
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


class ListColumn(NamedTuple):
    """A number that every feature has. NaN where it is not known."""

    name: str
    title: str
    unit: Unit
    about: str
    values: NDArray[np.floating[Any]]


_TABLE: tuple[tuple[str, str, Unit, str], ...] = (
    ("frequency", "density", "share", "Share of the tokens it fires on."),
    ("max_active", "max", "number", "Its largest activation."),
    ("mean_active", "mean", "number", "Mean activation over the tokens it fires on."),
    ("images", "pictures", "count", "Pictures it fires on."),
    ("share", "share", "share", "Its part of what all features add to the reconstruction."),
    ("spread", "spread", "number", "How far from its centre a map reaches, in units of the longer side."),
    ("entropy", "entropy", "number", "From 0, a map on one token, to 1, equal on all."),
    ("position_r2", "place", "share", "Share of its variance that a token's position explains."),
    ("centre_x", "centre x", "number", "Where it fires on average, from 0, left, to 1."),
    ("centre_y", "centre y", "number", "Where it fires on average, from 0, above, to 1."),
)
_LATER: Mapping[str, tuple[str, Unit, str]] = {
    "coherence": ("coherence", "number", "Monosemanticity: how alike its pictures are, weighted by activation."),
    "coherence_z": ("coherence z", "number", "The same in standard deviations above pictures drawn at random."),
    "coherence_p": ("coherence p", "number", "Share of random draws of pictures that are at least as alike."),
    "coherence_q": ("coherence q", "number", "The same as a false discovery rate over all features."),
    "stability": ("stability", "number", "Cosine of the nearest feature of an autoencoder of another seed."),
    "effect": ("effect", "number", "How much it changes what the network puts out, per unit of activation."),
    "contrast": ("contrast", "number", "How much it differs between the prompts of a contrast, and how surely."),
    "contrast_difference": ("contrast diff.", "number", "Mean difference between the prompts of a contrast."),
    "contrast_p": ("contrast p", "number", "How often chance makes such a difference."),
    "contrast_q": ("contrast q", "number", "The same as a false discovery rate over all features."),
    "region": ("region", "number", "Mean activation inside the region asked for minus outside."),
    "step_variance": ("step variance", "number", "Variance over steps of its largest activation."),
    "effect_active": ("effect active", "number", "The same over the tokens it is active on alone."),
    "label_score": ("label", "number", "How well its description tells its pictures from look-alikes: .5 is chance."),
    "on_end": ("on end", "share", "Share of its activation that lies on the ends of texts."),
    "on_padding": ("on padding", "share", "Share of its activation that lies on the padding behind texts."),
    "encoder_decoder_cosine": ("enc·dec", "number", "Cosine of what it reads and what it writes."),
}
SHOWN = ("label_score", "coherence", "stability", "frequency", "max_active", "images", "position_r2")
"""The columns that the list shows first, of those that there are."""
SORT = ("coherence", "max_active")
"""What the list is sorted by first: the first of these that is known."""


def columns_of(table: FeatureTable, steps: Sequence[int], later: Mapping[str, NDArray[Any]]) -> list[ListColumn]:
    """All numbers of the features of one stream: those of the table, and what later stages found, by name."""
    found = [
        ListColumn(name, title, unit, about, np.asarray(getattr(table, name), np.float32))
        for name, title, unit, about in _TABLE
        if np.isfinite(getattr(table, name)).any()
    ]
    if len(steps) > 1:
        strongest = np.asarray(steps, np.float32)[np.argmax(table.step_mean, axis=1)]
        about = "The step at which it is strongest."
        found.append(ListColumn("peak_step", "step", "step", about, np.where(table.count > 0, strongest, np.nan)))
    for name, values in later.items():
        title, unit, about = _LATER.get(name, (name.replace("_", " "), "number", "A later stage's number."))
        found.append(ListColumn(name, title, unit, about, np.asarray(values, np.float32)))
    return found


def columns_text(columns: Sequence[ListColumn]) -> str:
    """All columns one after the other, float32 little endian, in base64."""
    return _base64(np.concatenate([column.values for column in columns]).astype("<f4"))


def first_pictures(folder: FeatureFolder, stream: Stream, image: Ints, token: NDArray[Any]) -> dict[str, str]:
    """The first eight of each feature's strongest images, and where in their pictures the largest value is.

    `image` and `token` are [d_sae, n], the strongest first. In the result `top` are the images' numbers, int32, -1 for
    none. `peaks` are the largest value's distances from the left and the top edge of the square in the middle of the
    picture, a byte each: 255 is the whole side, and what lies outside the square is moved to its edge.
    """
    top = np.full((len(image), TOP_THUMBNAILS), -1, "<i4")
    peaks = np.full((*top.shape, 2), 127, np.uint8)
    kept = min(TOP_THUMBNAILS, image.shape[1])
    top[:, :kept] = image[:, :kept]
    if stream == "img":
        grids = np.array([row.grid or (1, 1) for row in folder.images], np.int64).reshape(-1, 2)
        rows, columns = (grids[image[:, :kept].clip(0), side] for side in (0, 1))
        place = token[:, :kept].clip(0)
        across, down = (place % columns + 0.5) / columns, (place // columns + 0.5) / rows
        sides = np.array([(row.width or 1, row.height or 1) for row in folder.images], np.float64).reshape(-1, 2)
        sides = (sides / sides.min(axis=1, keepdims=True))[image[:, :kept].clip(0)]
        peaks[:, :kept] = np.rint(255 * (0.5 + (np.stack([across, down], axis=2) - 0.5) * sides).clip(0, 1))
    return {"top": _base64(top), "peaks": _base64(peaks)}


def prompt_words(folder: FeatureFolder, image: Ints) -> dict[str, Any]:
    """Which words the prompts of each feature's largest examples [d_sae, n] have, as an index by word.

    `words` are in the order of the alphabet; those of word w are `features[ptr[w]:ptr[w + 1]]` (uint32), and `counts`
    (a byte each) says on how many of the examples.
    """
    said = [sorted({word.lower() for word in _WORD.findall(row.prompt)}) for row in folder.images]
    words = sorted({word for some in said for word in some})
    number = {word: index for index, word in enumerate(words)}
    lengths = np.array([len(some) for some in said], np.int64)
    starts = np.cumsum(lengths) - lengths
    flat = np.array([number[word] for some in said for word in some], np.int64)
    keys, counts = [], []
    for first in range(0, len(image), CHUNK):
        feature, place = np.nonzero(image[first : first + CHUNK] >= 0)
        of = image[first : first + CHUNK][feature, place]
        many = lengths[of]
        at = np.arange(many.sum()) + np.repeat(starts[of] - (np.cumsum(many) - many), many)
        key, count = np.unique(flat[at] * len(image) + np.repeat(feature + first, many), return_counts=True)
        keys.append(key)
        counts.append(count.clip(0, 255).astype(np.uint8))
    key, count = np.concatenate(keys), np.concatenate(counts)
    order = np.argsort(key, kind="stable")
    ptr = np.searchsorted(key[order] // len(image), np.arange(len(words) + 1))
    features = (key[order] % len(image)).astype("<u4")
    return {
        "words": words,
        "ptr": _base64(ptr.astype("<u4")),
        "features": _base64(features),
        "counts": _base64(count[order]),
    }


def common_words(folder: FeatureFolder, image: Ints, most: int = 4) -> Iterator[str]:
    """For each feature, the words most of its largest examples' prompts have and few prompts have otherwise.

    What the list shows of a feature that nobody has labelled. A word counts by n log2(n / expected), and needs three
    letters: "of" and "on" say little.
    """
    said = [sorted({word.lower() for word in _WORD.findall(row.prompt)}) for row in folder.images]
    documents: dict[str, int] = {}
    for some in said:
        for word in some:
            documents[word] = documents.get(word, 0) + 1
    for row in image:
        shown = [said[at] for at in row if at >= 0]
        counts: dict[str, int] = {}
        for some in shown:
            for word in some:
                counts[word] = counts.get(word, 0) + 1
        scored = [
            (count * np.log2(count * len(said) / (len(shown) * documents[word])), word)
            for word, count in counts.items()
            if count > 1 and len(word) > 2 and count * len(said) > 1.5 * len(shown) * documents[word]
        ]
        yield ", ".join(word for _, word in sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:most])


def _base64(array: NDArray[Any]) -> str:
    return b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
