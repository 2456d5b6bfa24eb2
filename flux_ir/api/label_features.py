"""Words that lift each feature, the tokens of the text it fires on, and a label that was judged on other images."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from flux_ir.api.arguments import check_least
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError, counted
from flux_ir.features.contents import digest_of
from flux_ir.features.embeddings import BATCH, ClipEmbedder, clip_digest, make_embeddings, read_embeddings
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.labels import (
    LABELS_FILE,
    Candidates,
    Description,
    LabelScores,
    clip_candidates,
    describe,
    description_text,
    feature_images,
    judge,
    judged_images,
    sources_of,
    together,
)
from flux_ir.features.words import (
    STAGE,
    WORDS_FILE,
    Phrases,
    PromptTokens,
    StrengthBounds,
    find_tokenizer,
    lift,
    phrases_of,
    prompt_numbers_of,
    prompt_tokens,
    shortened,
    strength_bounds,
    strong_prompts,
    token_lists,
)
from flux_ir.files import complete_file, read_json
from flux_ir.models.clip import load_picture_tower, locate_clip, read_preprocessing
from flux_ir.models.placement import plan
from flux_ir.models.text import load_phrase_tower
from flux_ir.sites import Stream

WORDS_KEPT = 12
"""Words that words.json lists of each feature, at most."""
MOST_PHRASES, CLIP_PHRASES = 20_000, 500
"""How many phrases of the prompts, the most frequent ones, features are described by, and how many CLIP looks for."""


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """What words and labels depend on besides the scores: with the same ones they are not made again."""

    min_count: int = 5
    fdr: float = 0.05
    min_score: float = 0.7
    seed: int = 0
    concepts: str | None = None
    """A digest of the file's content; None: there is none."""
    clip: str | None = None
    """A digest of its weights."""
    vocabulary: str | None = None
    """A digest of the file's content."""
    tokenizer: str | None = None


def label_features(
    features: str | Path | FeatureFolder,
    *,
    min_count: int = 5,
    fdr: float = 0.05,
    min_score: float = 0.7,
    concepts: str | Path | None = None,
    clip: str | None = None,
    vocabulary: str | Path | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Watch = unwatched,
) -> FeatureFolder:
    """Find the words that lift each feature, and describe it, unless that is there for these settings.

    `features` is the folder that `score_features` left. words.json gets, of each feature, the words and phrases that
    are more often in prompts of its strong images than in others: in `min_count` prompts at least, and significant at
    the rate `fdr` over all features and words; of text tokens also the tokens it fires on, by the model's `tokenizer`
    (a folder; None: the model's own, if it is on this machine). labels.json gets a description of each feature, made of
    such words, of `concepts` (a JSON file: {"concept": [ids of the generations that have it]}), and of what `clip` (a
    folder as transformers saves it, or a repository of the hub) sees in the pictures: the prompts' most frequent
    phrases, and the lines of the file `vocabulary`. It is a label if its balanced accuracy on images of other prompts,
    strong ones and silent look-alikes, is beyond chance at the rate `fdr` and at least `min_score`.

    Raises FluxIRError for a folder that is not scored, and files that cannot be read.
    """
    folder = open_features(features)
    folder.check_done("score")
    _check_arguments(min_count=min_count, fdr=fdr, min_score=min_score, seed=seed, vocabulary=vocabulary, clip=clip)
    clip_folder = None if clip is None else locate_clip(clip, announce=lambda text: progress(Note(text)))
    settings = LabelSettings(
        min_count=min_count,
        fdr=fdr,
        min_score=min_score,
        seed=seed,
        concepts=None if concepts is None else _content_digest(Path(concepts)),
        clip=None if clip_folder is None else clip_digest(clip_folder),
        vocabulary=None if vocabulary is None else _content_digest(Path(vocabulary)),
        tokenizer=None if tokenizer is None else str(tokenizer),
    )
    if folder.is_done(STAGE, asdict(settings), after=["score"]):
        progress(Note(f"the words and labels in {folder.path} are complete"))
        return folder
    prompt_numbers, phrases = _read_prompts(folder, min_count, progress)
    sources = [_prompt_candidates(phrases, prompt_numbers)]
    if concepts is not None:
        sources.append(read_concepts(Path(concepts), folder))
    if clip_folder is not None:
        texts = [*_lines(vocabulary), *phrases.texts[:CLIP_PHRASES]]
        sources.append(_clip_candidates(folder, clip_folder, list(dict.fromkeys(texts)), device, progress))
    candidates = together(sources)
    words: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for stream in folder.streams:
        with phase(progress, f"words {stream}"):
            bounds = strength_bounds(folder, stream)
            words[stream] = _lifting_words(folder, stream, bounds, prompt_numbers, phrases, settings)
            if stream == "txt":
                words[stream]["tokens"] = _fired_tokens(folder, Path(tokenizer) if tokenizer else None, progress)
        with phase(progress, f"labels {stream}"):
            labels[stream] = _labels(folder, stream, bounds, prompt_numbers, candidates, settings)
        if not any(row["text"] for row in labels[stream]):
            progress(
                Note(f"note: no description of a feature of {stream} tokens was better than chance on other images")
            )
    _write(folder.path / WORDS_FILE, {"version": 1, "streams": words})
    _write(folder.path / LABELS_FILE, {"version": 1, "settings": asdict(settings), "streams": labels})
    return folder.mark_done(STAGE, asdict(settings), after=["score"])


def _check_arguments(
    *, min_count: int, fdr: float, min_score: float, seed: int, vocabulary: str | Path | None, clip: str | None
) -> None:
    """Raises FluxIRError for numbers out of range, and for a vocabulary that nothing reads."""
    check_least({"min_count": min_count, "seed": seed})
    for name, value, least in (("fdr", fdr, 0.0), ("min_score", min_score, 0.5)):
        if not least <= value <= 1:
            raise FluxIRError(f"--{name} must be {least:g} to 1: got {value}", hint="leave it out for the usual one")
    if vocabulary is not None and clip is None:
        raise FluxIRError("--vocabulary is what CLIP looks for: got no --clip", hint="name a CLIP, or leave it out")


# ---- What descriptions are made of: words of the prompts, known concepts, what CLIP sees


def _read_prompts(folder: FeatureFolder, min_count: int, progress: Watch) -> tuple[NDArray[np.int64], Phrases]:
    """The number of each image's prompt, [images], and the phrases of the prompts, a row for each number."""
    prompts = [row.prompt for row in folder.images]
    prompt_numbers = prompt_numbers_of(prompts)
    different = [prompts[first] for first in np.unique(prompt_numbers, return_index=True)[1]]
    phrases = phrases_of(different, min_count=min_count, most=MOST_PHRASES)
    if not phrases.texts:
        progress(Note(f"note: no word is in {min_count} prompts and not in all, so prompts say nothing of features"))
    return prompt_numbers, phrases


def _prompt_candidates(phrases: Phrases, prompt_numbers: NDArray[np.int64]) -> Candidates:
    """The phrases as descriptions of images: one holds on the images whose prompt has it."""
    return Candidates(phrases.texts, ["words"] * len(phrases.texts), csr_array(phrases.has[prompt_numbers]))


def read_concepts(path: Path, folder: FeatureFolder) -> Candidates:
    """The concepts of a JSON file, {"concept": [ids of the generations that have it]}, as candidates.

    Raises FluxIRError for any other file, and for ids that the folder does not have.
    """
    hint = 'write {"red": ["0123456789abcdef", ...]}; images.jsonl has the ids'
    try:
        concepts = {str(name): [str(one) for one in ids] for name, ids in read_json(path, hint=hint).items()}
    except TypeError as error:
        raise FluxIRError(f"{path} must hold concepts, each with a list of ids: {error}", hint=hint) from error
    numbers = {row.id: row.index for row in folder.images}
    unknown = [one for ids in concepts.values() for one in ids if one not in numbers]
    if unknown:
        raise FluxIRError(
            f"{path} names {counted(len(unknown), 'generation')} that {folder.path} lacks, such as {unknown[0]}",
            hint="images.jsonl has the ids",
        )
    row = np.array([numbers[one] for ids in concepts.values() for one in ids], np.int64)
    column = np.repeat(np.arange(len(concepts)), [len(ids) for ids in concepts.values()])
    has = csr_array((np.ones(len(row), np.float32), (row, column)), shape=(len(numbers), len(concepts)))
    has.data[:] = 1  # an id may be there twice
    return Candidates(list(concepts), ["concepts"] * len(concepts), has)


def _clip_candidates(
    folder: FeatureFolder, clip: Path, texts: list[str], device: str | None, progress: Watch
) -> Candidates:
    """What CLIP sees in the pictures. Their embeddings are kept in the folder, where `select_features` finds them."""
    placed = plan(torch.cuda.device_count(), device=device).transformer
    tower = load_picture_tower(clip, placed, torch.float32)
    embedder = ClipEmbedder(folder, tower, read_preprocessing(clip), clip_digest(clip))
    for _ in follow(progress, "pictures", make_embeddings(folder, embedder), total=folder.parts):
        pass
    with phase(progress, "texts"), torch.no_grad():
        encoder = load_phrase_tower(clip, placed, torch.float32)
        sentences = [f"a picture of {text}" for text in texts]
        batches = [encoder(sentences[start : start + BATCH]).cpu() for start in range(0, len(sentences), BATCH)]
    return clip_candidates(texts, read_embeddings(folder, embedder), torch.cat(batches))


def _lines(vocabulary: str | Path | None) -> list[str]:
    """The lines of the vocabulary that are not empty; none without a file. Raises FluxIRError for an empty file."""
    if vocabulary is None:
        return []
    lines = [line.strip() for line in Path(vocabulary).read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise FluxIRError(f"{vocabulary} holds no text", hint="write one text a line")
    return [line for line in lines if line]


# ---- What the two files hold


def _lifting_words(
    folder: FeatureFolder,
    stream: Stream,
    bounds: StrengthBounds,
    prompt_numbers: NDArray[np.int64],
    phrases: Phrases,
    settings: LabelSettings,
) -> dict[str, Any]:
    """What words.json holds of a stream: the words that lift each feature."""
    strong = strong_prompts(folder, stream, bounds, prompt_numbers)
    lifted = lift(phrases, strong, min_count=settings.min_count, fdr=settings.fdr)
    kept = shortened(lifted, phrases.texts, WORDS_KEPT)
    features: dict[str, list[list[float]]] = {}
    for feature, word, pmi, both, q in zip(kept.feature, kept.word, kept.pmi, kept.both, kept.q, strict=True):
        row = [int(word), _rounded(float(pmi)), int(both), _rounded(float(q))]
        features.setdefault(str(int(feature)), []).append(row)
    return {
        "prompts": strong.shape[0],
        "words": phrases.texts,
        "with_word": np.asarray(phrases.has.sum(axis=0)).astype(int).tolist(),
        "strong": np.asarray(strong.sum(axis=0)).astype(int).tolist(),
        "threshold": [None if math.isinf(value) else _rounded(float(value)) for value in bounds.strong],
        "columns": ["word", "pmi", "both", "q"],
        "features": features,
    }


def _fired_tokens(folder: FeatureFolder, tokenizer: Path | None, progress: Watch) -> dict[str, Any] | None:
    """What words.json holds of text tokens: those each feature fires on. None without the model's tokenizer."""
    model_tokenizer = find_tokenizer(folder.settings.model, tokenizer)
    if model_tokenizer is None:
        progress(Note("note: the model's tokenizer is not on this machine, so tokens of the text have no names"))
        return None
    length = folder.settings.tokens["txt"]
    tokens = prompt_tokens(model_tokenizer, [row.prompt for row in folder.images], length)
    _check_used(folder, tokens)
    lists = token_lists(folder, tokens)
    features = {}
    for feature, row in enumerate(lists.token):
        kept = [
            [
                int(token),
                int(lists.fired[feature, at]),
                int(lists.of[feature, at]),
                _rounded(lists.mean[feature, at]),
            ]
            for at, token in enumerate(row)
            if token >= 0
        ]
        if kept:
            features[str(feature)] = kept
    return {
        "strings": tokens.strings,
        "end": tokens.end,
        "padding": tokens.padding,
        "columns": ["token", "fired", "of", "mean"],
        "on_end": [_rounded(float(share)) for share in lists.on_end],
        "on_padding": [_rounded(float(share)) for share in lists.on_padding],
        "features": features,
    }


def _check_used(folder: FeatureFolder, tokens: PromptTokens) -> None:
    """Raises FluxIRError if the texts end elsewhere than they did when they were captured: another tokenizer."""
    used = (tokens.ids != tokens.padding).sum(1)
    for row in folder.images:
        if row.used_txt is not None and row.used_txt != used[row.index]:
            raise FluxIRError(
                f"the tokenizer must be the one of the captures: it makes {used[row.index]} tokens of "
                f"{row.prompt[:60]!r}, which had {row.used_txt}",
                hint="name the folder of the T5 tokenizer that was used with --tokenizer",
            )


def _labels(
    folder: FeatureFolder,
    stream: Stream,
    bounds: StrengthBounds,
    prompt_numbers: NDArray[np.int64],
    candidates: Candidates,
    settings: LabelSettings,
) -> list[dict[str, Any]]:
    """What labels.json holds of a stream: a row for every feature that could be described and judged."""
    own, others = feature_images(folder, stream, bounds, prompt_numbers, judged_images(folder), seed=settings.seed)
    described = describe(candidates, own)
    return list(_rows(candidates, described, judge(candidates, described, others), settings))


def _rows(
    candidates: Candidates, described: Description, verdict: LabelScores, settings: LabelSettings
) -> Iterator[dict[str, Any]]:
    for feature in np.flatnonzero(np.isfinite(verdict.score)).tolist():
        text = description_text(candidates, described, feature)
        is_label = (
            verdict.q[feature] <= settings.fdr
            and verdict.low[feature] > 0.5
            and verdict.score[feature] >= settings.min_score
        )
        yield {
            "feature": feature,
            "text": text if is_label else None,
            "candidate": text,
            "source": sources_of(candidates, described, feature),
            "score": _rounded(verdict.score[feature]),
            "low": _rounded(verdict.low[feature]),
            "high": _rounded(verdict.high[feature]),
            "q": _rounded(verdict.q[feature]),
            "score_silent": _rounded(verdict.score_silent[feature]),
            "score_described": _rounded(described.score[feature]),
            "strong": [int(column[feature]) for column in verdict.strong],
            "alike": [int(column[feature]) for column in verdict.alike],
            "silent": [int(column[feature]) for column in verdict.silent],
        }


def _content_digest(path: Path) -> str:
    try:
        return digest_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FluxIRError(f"{path} cannot be read: {error}", hint="name a text file that exists") from error


def _rounded(value: float | np.floating[Any]) -> float:
    return float(f"{value:.4g}")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with complete_file(path) as beside:
        beside.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
