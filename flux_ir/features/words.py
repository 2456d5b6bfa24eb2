"""Words and features: which words of the prompts lift a feature, and which tokens of the text it fires on.

A word lifts a feature if prompts with it are more often among those of the feature's strong images than they are among
all. How much more is PMI, in bits, always beside its counts: of few prompts it says little. Whether it is more than
chance is Fisher's exact test, over prompts and not over images: those of one prompt are no independent draws. Next:
`labels`, which makes the best description of these words and judges it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array
from scipy.stats import hypergeom

from flux_ir.features.examples import prompt_numbers
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.significance import q_values
from flux_ir.files import read_json
from flux_ir.models.checkpoints.locate_text import tokenizer_on_disk
from flux_ir.models.registry import ModelSpec, get_spec, model_names
from flux_ir.models.text.tokenizer import PromptTokenizer, load_tokenizer
from flux_ir.sites import Stream

STAGE, WORDS_FILE = "labels", "words.json"
LONGEST = 3
"""Words of a phrase, at most."""
STRONG_SHARE, LEAST_STRONG, MOST_STRONG = 0.2, 50, 1000
"""A feature's strong images are the strongest fifth of those it fires on; at least 50 if there are, at most 1,000."""
OCTAVES, BINS_PER_OCTAVE = 16, 16
"""The histogram of S that ranks a feature's images: 16 octaves below its largest S, 16 bins each."""
TOKENS_KEPT = 12
"""Tokens of the text that words.json lists of each feature, at most."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_ARTICLES = {"a", "an", "the"}
_SMALL = _ARTICLES | {"and", "as", "at", "by", "for", "from", "in", "is", "it", "its", "of", "on", "or", "to", "with"}
_PAIRS_AT_ONCE = 1 << 22
_MORE_BITS = 0.5  # of PMI, by which a phrase must exceed its words on the list
_FAR = 1.5  # standard deviations above the expected count, from which on the exact test is made


class Phrases(NamedTuple):
    """Words and short phrases of prompts."""

    texts: list[str]
    has: csr_array
    """[prompts, phrases]: 1 where the prompt has the phrase."""


class StrengthBounds(NamedTuple):
    """What counts as a strong image of a feature, and what as a silent one: two bounds of S, [d_sae] each."""

    strong: NDArray[np.float64]
    """S of a strong image is at least this; infinity for a feature that never fires."""
    silent: NDArray[np.float64]
    """S of a silent image is at most this: 0, or so much that a fifth of all images count as silent, if the feature is
    without activation on fewer than a fifth."""


class Lift(NamedTuple):
    """Pairs of a feature and a word, by feature and then by p, the surest first."""

    feature: NDArray[np.int64]
    word: NDArray[np.int64]
    pmi: NDArray[np.float64]
    """Bits: log2 of how much more frequent the word is in prompts of the feature's strong images than in all."""
    both: NDArray[np.int64]
    """Prompts with the word and a strong image."""
    strong: NDArray[np.int64]
    """Prompts with a strong image."""
    with_word: NDArray[np.int64]
    """Prompts with the word."""
    p: NDArray[np.float64]
    q: NDArray[np.float64]


# ---- Words of the prompts


def phrases_of(prompts: Sequence[str], *, min_count: int, most: int, longest: int = LONGEST) -> Phrases:
    """The words and phrases of at most `longest` words that at least `min_count` of the prompts have, but not all.

    A phrase neither begins nor ends with an article, has no punctuation inside, and is not only small words ("on the").
    Of phrases that are in exactly the same prompts the one with the most other words is kept, and of these the `most`
    most frequent.
    """
    rows: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        for phrase in _phrases_in(prompt, longest):
            rows.setdefault(phrase, []).append(number)
    kept = {phrase: found for phrase, found in rows.items() if min_count <= len(found) < len(prompts)}
    stands_for: dict[tuple[int, ...], str] = {}
    for phrase, found in kept.items():
        best = stands_for.setdefault(tuple(found), phrase)
        if _readable(phrase) > _readable(best):
            stands_for[tuple(found)] = phrase
    texts = sorted(stands_for.values(), key=lambda phrase: (-len(rows[phrase]), phrase))[:most]
    column = np.repeat(np.arange(len(texts)), [len(rows[text]) for text in texts])
    row = np.concatenate([np.array(rows[text], np.int64) for text in texts]) if texts else np.zeros(0, np.int64)
    ones = np.ones(len(row), np.float32)
    return Phrases(texts, csr_array((ones, (row, column)), shape=(len(prompts), len(texts))))


def _phrases_in(prompt: str, longest: int) -> set[str]:
    phrases = set()
    for part in re.split(r"[^\w\s'\u2019-]+", prompt.lower()):
        words = _WORD.findall(part)
        for size in range(1, longest + 1):
            for start in range(len(words) - size + 1):
                phrase = words[start : start + size]
                if not _ARTICLES & {phrase[0], phrase[-1]} and not _SMALL.issuperset(phrase):
                    phrases.add(" ".join(phrase))
    return phrases


def _readable(phrase: str) -> tuple[int, bool, int, str]:
    """Sorts phrases of the same prompts: more words that are not small, one of these at the end, fewer words."""
    words = phrase.split()
    return sum(word not in _SMALL for word in words), words[-1] not in _SMALL, -len(words), phrase


# ---- Which images count


def strength_bounds(folder: FeatureFolder, stream: Stream) -> StrengthBounds:
    """The bounds of every feature, to a sixteenth of an octave: S is read for its largest, then for a histogram."""
    table, n = folder.table(stream), folder.settings.images
    largest, strong_counts = np.zeros(len(table.images), np.float64), _strong_counts(table.images)
    for part in folder.scores(stream):
        np.maximum.at(largest, part.feature, part.max)
    histogram = np.zeros((len(largest), OCTAVES * BINS_PER_OCTAVE), np.int32)
    for part in folder.scores(stream):
        octaves = np.log2(largest[part.feature] / part.max)  # below the feature's largest
        bins = np.minimum(octaves * BINS_PER_OCTAVE, histogram.shape[1] - 1).astype(np.int64)
        np.add.at(histogram, (part.feature, bins), 1)
    at_least = np.cumsum(histogram, axis=1)
    edge = (at_least < strong_counts[:, None]).sum(1) + 1  # the lower edge of the bin that completes the count
    strong = np.where(table.images > 0, largest * 2.0 ** (-edge / BINS_PER_OCTAVE), np.inf)
    weak = np.maximum(STRONG_SHARE * n - (n - table.images), 0)  # images it fires on that count as silent too
    edge = (at_least <= (table.images - weak)[:, None]).sum(1)
    silent = np.where(weak > 0, largest * 2.0 ** (-edge / BINS_PER_OCTAVE), 0)
    return StrengthBounds(strong, np.minimum(silent, np.nextafter(strong, 0)))


def _strong_counts(images: NDArray[np.int64]) -> NDArray[np.int64]:
    share = np.ceil(STRONG_SHARE * images).astype(np.int64)
    return np.minimum(np.clip(share, LEAST_STRONG, MOST_STRONG), images)


def strong_prompts(
    folder: FeatureFolder, stream: Stream, bounds: StrengthBounds, groups: NDArray[np.int64]
) -> csr_array:
    """The prompts with a strong image of each feature, [prompts, d_sae]: 1 or 0. `groups` [images] are the prompts."""
    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in folder.scores(stream):
        entry = np.flatnonzero(part.max >= bounds.strong[part.feature])
        image = part.images.start + np.searchsorted(part.image_ptr, entry, side="right") - 1
        rows.append(groups[image])
        columns.append(part.feature[entry].astype(np.int64))
    row, column = np.concatenate(rows), np.concatenate(columns)
    once = np.unique(row * folder.settings.d_sae + column)
    shape = (int(groups.max()) + 1, folder.settings.d_sae)
    return csr_array((np.ones(len(once)), np.divmod(once, folder.settings.d_sae)), shape=shape)


# ---- Words that lift a feature


def lift(phrases: Phrases, strong: csr_array, *, min_count: int, fdr: float) -> Lift:
    """The words that lift each feature more than chance, at the rate `fdr` over all features and words.

    `strong` [prompts, d_sae] says which prompts have a strong image. Words in fewer than `min_count` of a feature's
    strong prompts are not tested.

    With n prompts, of which w have the word, s are strong and b are both: PMI = log2(b n / (w s)), and p is the upper
    tail of the hypergeometric distribution of b (Fisher's exact test).
    """
    n, features = strong.shape
    with_word = np.asarray(phrases.has.sum(axis=0)).astype(np.int64)
    strong_of = np.asarray(strong.sum(axis=0)).astype(np.int64)
    found: list[tuple[NDArray[Any], ...]] = []
    words_of = csr_array(phrases.has.T)
    step = max(1, _PAIRS_AT_ONCE // max(1, len(phrases.texts)))
    by_feature = csc_array(strong)
    for start in range(0, features, step):
        both_of = (words_of @ by_feature[:, start : start + step]).tocoo()
        word, feature = both_of.coords[0].astype(np.int64), both_of.coords[1].astype(np.int64) + start
        both = np.rint(both_of.data).astype(np.int64)
        share = with_word[word] * strong_of[feature] / n
        pmi = np.log2(both / share)
        variance = share * (1 - with_word[word] / n) * (n - strong_of[feature]) / max(1, n - 1)
        # The exact test is slow, so it is made only for counts well above the expected one: others are never listed.
        kept = (both >= min_count) & (both - share > _FAR * np.sqrt(variance))
        word, feature, both, pmi = word[kept], feature[kept], both[kept], pmi[kept]
        p = hypergeom.sf(both - 1, n, with_word[word], strong_of[feature])
        kept = p <= fdr  # q is at least p
        found.append((feature[kept], word[kept], pmi[kept], both[kept], p[kept]))
    feature, word, pmi, both, p = (np.concatenate(column) for column in zip(*found, strict=True))
    q = q_values(p, tests=max(1, int((strong_of > 0).sum()) * len(phrases.texts)))
    kept = np.flatnonzero(q <= fdr)
    order = kept[np.lexsort((word[kept], -pmi[kept], p[kept], feature[kept]))]
    feature, word = feature[order], word[order]
    return Lift(feature, word, pmi[order], both[order], strong_of[feature], with_word[word], p[order], q[order])


def shortened(found: Lift, texts: Sequence[str], most: int) -> Lift:
    """At most `most` words of each feature, without phrases that say no more than a part of them.

    A phrase is left out if its PMI is not half a bit above that of a part of it that is before it on the list.
    """
    kept: list[int] = []
    ends = np.flatnonzero(np.diff(found.feature)) + 1
    for rows in np.split(np.arange(len(found.feature)), ends):
        chosen: list[int] = []
        for row in rows.tolist():
            padded = f" {texts[found.word[row]]} "
            says_more = all(
                found.pmi[row] > found.pmi[other] + _MORE_BITS
                for other in chosen
                if f" {texts[found.word[other]]} " in padded
            )
            if says_more and len(chosen) < most:
                chosen.append(row)
        kept += chosen
    return Lift._make(column[kept] for column in found)


# ---- Tokens of the text


class PromptTokens(NamedTuple):
    """The tokens of every image's prompt, as numbers in `strings`."""

    strings: list[str]
    ids: NDArray[np.int64]
    """[images, tokens]."""
    end: int
    """The number of the token that ends a text."""
    padding: int


class TokenLists(NamedTuple):
    """The tokens of the text that each feature fires on, by their share of its activation: the largest first."""

    token: NDArray[np.int64]
    """[d_sae, TOKENS_KEPT]: number of the string; -1 where there are fewer."""
    fired: NDArray[np.int64]
    """How often it fires on this token, over all steps."""
    of: NDArray[np.int64]
    """How often the token occurs, over all steps."""
    mean: NDArray[np.float64]
    """Mean activation where it fires."""
    on_end: NDArray[np.float64]
    """[d_sae]: share of its activation that lies on ends of texts."""
    on_padding: NDArray[np.float64]
    """[d_sae]: share that lies on padding, which is scored only if the ends of prompts are not known."""


def find_tokenizer(model: str | None, tokenizer: Path | None) -> PromptTokenizer | None:
    """The T5 tokenizer of a model, on this machine: that of the folder, if one is named. None: there is none."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer, what="the tokenizer")
    spec: ModelSpec | None = get_spec(model) if model in model_names() else None
    folder = None if spec is None else tokenizer_on_disk(spec, "t5")
    return None if folder is None else load_tokenizer(folder, what="the tokenizer")


def prompt_tokens(tokenizer: PromptTokenizer, prompts: Sequence[str], length: int) -> PromptTokens:
    """The prompts as the text encoder got them: cut or padded to `length` tokens, with the token that ends a text."""
    groups = prompt_numbers_of(prompts)
    firsts = np.unique(groups, return_index=True)[1]
    ids = tokenizer.fixed([prompts[first] for first in firsts], length).numpy()
    numbers, compact = np.unique(np.append(ids, [tokenizer.end_id, tokenizer.padding_id]), return_inverse=True)
    backend = tokenizer.backend
    strings = [str(backend.id_to_token(int(number))).replace("\u2581", " ") for number in numbers]
    return PromptTokens(strings, compact[:-2].reshape(ids.shape)[groups], int(compact[-2]), int(compact[-1]))


def token_lists(folder: FeatureFolder, tokens: PromptTokens) -> TokenLists:
    """For each feature of text tokens, the tokens it fires on. Memory: two numbers for each such pair."""
    d_sae, words, steps = folder.settings.d_sae, len(tokens.strings), len(folder.steps)
    count, total = (csr_array((d_sae, words), dtype=np.float64) for _ in range(2))
    occurrences = np.zeros(words, np.int64)
    for part in folder.scores("txt"):
        images = np.arange(part.images.start, part.images.stop)
        is_scored = part.positions >= 0
        at = np.where(is_scored, tokens.ids[images[:, None], np.where(is_scored, part.positions, 0)], -1)
        occurrences += steps * np.bincount(at[is_scored], minlength=words)
        image = np.repeat(np.arange(len(images)), np.diff(part.row_ptr[part.image_ptr]))
        feature = np.repeat(part.feature.astype(np.int64), np.diff(part.row_ptr))
        token = at[image, part.place.astype(np.int64) % part.tokens]
        values = np.asarray(part.value, np.float64)
        count += csr_array((np.ones(len(token)), (feature, token)), shape=(d_sae, words))
        total += csr_array((values, (feature, token)), shape=(d_sae, words))
    sums = np.maximum(np.asarray(total.sum(axis=1)), np.finfo(np.float64).tiny)
    shares = [np.asarray(csc_array(total)[:, [token]].sum(axis=1)) / sums for token in (tokens.end, tokens.padding)]
    listed = np.full((d_sae, TOKENS_KEPT), -1, np.int64)
    counts, means = np.zeros(listed.shape, np.int64), np.zeros(listed.shape)
    count.sort_indices()
    total.sort_indices()
    for number in range(d_sae):
        row = slice(total.indptr[number], total.indptr[number + 1])
        order = np.argsort(-total.data[row], kind="stable")[:TOKENS_KEPT]
        listed[number, : len(order)] = total.indices[row][order]
        counts[number, : len(order)] = count.data[row][order]
        means[number, : len(order)] = total.data[row][order] / count.data[row][order]
    return TokenLists(listed, counts, np.where(listed >= 0, occurrences[listed], 0), means, *shares)


def prompt_numbers_of(prompts: Sequence[str]) -> NDArray[np.int64]:
    """[images]: the number of each image's prompt, from 0; every image without one counts as a prompt of its own."""
    return np.unique(prompt_numbers(prompts), return_inverse=True)[1].astype(np.int64)


# ---- The files


def read_words(folder: FeatureFolder, stream: Stream = "img") -> list[list[tuple[str, float, int]]] | None:
    """For each feature the words that lift it: word, PMI [bits], and how many prompts have it and a strong image.

    None: flux-ir label-features has not been run.
    """
    content = read_result(folder, WORDS_FILE)
    if content is None:
        return None
    texts, rows = content["streams"][stream]["words"], content["streams"][stream]["features"]
    return [
        [(texts[word], pmi, both) for word, pmi, both, *_ in rows.get(str(feature), [])]
        for feature in range(folder.settings.d_sae)
    ]


def read_result(folder: FeatureFolder, file: str) -> Mapping[str, Any] | None:
    """A file of the stage of words and labels; None: it has not been run. Raises FluxIRError for one that is broken."""
    if STAGE not in folder.stages:
        return None
    return read_json(folder.path / file, hint="run flux-ir label-features again")
