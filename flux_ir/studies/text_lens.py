"""The text's own lens: what is drawn from an earlier layer of the text encoders, or from some tokens alone.

A layer of T5 is read with the norm that stands behind the last one, a layer of CLIP likewise, at the end of the text
(Toker et al., "Diffusion Lens", 2024). The tokens of T5 that are not chosen come from elsewhere: from an empty prompt,
as zeros, from the last layer, from another prompt, or they are left out (Toker et al., "Padding Tone", 2025; Kaplan et
al., "Follow the Flow", 2025). With the last layer and all tokens it is the plain embedding, bit for bit. On captions of
flux-tiny's world the judge says what of the scene is right: `score`. Next: `flux_ir.api.text_lens`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.demo.judge import Sight, compare
from flux_ir.demo.scenes import Scene
from flux_ir.errors import FluxIRError
from flux_ir.maps.words import PromptTokens, Word, prompt_tokens
from flux_ir.models.registry import ModelSpec
from flux_ir.models.suite import TextEncoders
from flux_ir.models.text import TextEmbedding, TextEncoder, encode
from flux_ir.recording.recorder import MemorySink, TextRecorder
from flux_ir.shapes import Context, Pooled
from flux_ir.sites import Site, nearest_names, site_names, text_sites

TokenGroup = Literal["all", "words", "end", "padding"]
"""Tokens of T5: all; those of the text; its end mark; the padding behind it."""
TokenSource = Literal["empty", "zeros", "removed", "last", "other"]
"""Where the tokens that are not chosen come from: the empty prompt, at the same layer; zeros; nowhere, so that the text
is shorter; the last layer of the prompt itself; the other prompt, at the same layer."""
PooledSource = Literal["prompt", "empty", "zeros", "other"]
"""Where CLIP's vector comes from."""

EMBEDDINGS = "embeddings"
"""Before the first layer: `t5.embeddings` is what `t5.0` is given."""
EVERYTHING = "everything"
ASPECTS = ("number", "background", "colour", "shape", "size", "place", "relation", EVERYTHING)
"""What a picture and its caption can agree in. Of two objects both must be right; place is asked of one object,
relation of two."""
SHIFTS = 5
"""Other captions that each picture is held against for what is right by chance, at most."""


# ---- Layers


def layer_names(spec: ModelSpec) -> list[str]:
    """Every layer that can be read: t5.embeddings, t5.0 and so on, then those of CLIP."""
    names = []
    for site in text_sites(spec.t5_layers, spec.clip_layers):
        names += [f"{site.kind}.{EMBEDDINGS}"] if site.block == 0 else []
        names.append(str(site))
    return names


def choose_layers(layers: str | Sequence[str] | None, spec: ModelSpec) -> list[str]:
    """The layers of these names or patterns, by depth; None: all of T5.

    Raises FluxIRError for one that the model does not have, naming the nearest.
    """
    names = layer_names(spec)
    chosen: set[str] = set()
    for pattern in ("t5.*",) if layers is None else site_names(layers):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise FluxIRError(
                f"{spec.name} has {spec.t5_layers} layers of T5 and {spec.clip_layers} of CLIP, and none matches "
                f"{pattern!r}",
                hint=f"the nearest are {nearest_names(pattern, names)}",
            )
        chosen |= found
    return [name for name in names if name in chosen]


class LayerReadings(NamedTuple):
    """What the transformer would be told of one prompt, had an encoder stopped earlier."""

    plain: TextEmbedding
    """What it is told: of the last layers."""
    txt: Mapping[str, Context]
    """By layer of T5, [1, tokens, d]."""
    y: Mapping[str, Pooled]
    """By layer of CLIP, [1, d]."""


@torch.no_grad()
def read_layers(encoders: TextEncoders, prompt: str, layers: Sequence[str]) -> LayerReadings:
    """Some layers of both encoders, named as `layer_names` does, each read as if it were the last; on the CPU."""
    prompts = [prompt]
    sink = MemorySink()
    with TextRecorder(encoders, [Site.parse(name) for name in layers if not name.endswith(EMBEDDINGS)], sink):
        plain = encode(encoders.t5, encoders.clip, prompts)

    def readings(kind: str, encoder: TextEncoder) -> dict[str, Tensor]:
        states = {
            name: encoder.embed(prompts) if name.endswith(EMBEDDINGS) else sink.read(name)
            for name in layers
            if name.startswith(kind)
        }
        return {name: encoder.read_out(state, prompts).cpu() for name, state in states.items()}

    return LayerReadings(
        TextEmbedding(plain.txt.cpu(), plain.y.cpu()), readings("t5", encoders.t5), readings("clip", encoders.clip)
    )


# ---- Tokens


class Selection(NamedTuple):
    """Tokens of T5 that come from the prompt, under the name that is shown: a group, or words joined by +."""

    name: str
    tokens: tuple[int, ...]


class Swap(NamedTuple):
    """A word, or phrase, of the prompt in whose place one of the other prompt stands, token by token."""

    word: Word
    other: Word


def select(prompt: PromptTokens, groups: Sequence[TokenGroup], words: Sequence[str], length: int) -> list[Selection]:
    """The words and phrases that are asked for, each by itself, or else these groups of tokens.

    `length` is that of the text, padding included. Raises FluxIRError for a word that is not in the prompt.
    """
    if words:
        return [_words(prompt, names) for names in words]
    return [_group(prompt, group, length) for group in groups]


def _group(tokens: PromptTokens, group: TokenGroup, length: int) -> Selection:
    outside = {*tokens.end, *tokens.padding}
    match group:
        case "all":
            return Selection("all", tuple(range(length)))
        case "words":
            return Selection("words", tuple(token for token in range(length) if token not in outside))
        case "end":
            return Selection("end", tokens.end)
        case "padding":
            return Selection("padding", tokens.padding)


def _words(tokens: PromptTokens, names: str) -> Selection:
    words = tokens.choose(names.split("+"))
    return Selection(names, tuple(sorted({token for word in words for token in word.tokens})))


def read_swap(text: str, tokens: PromptTokens, others: PromptTokens) -> Swap:
    """What `red=blue` means: the prompt's `red` is told as the other prompt's `blue`; `red` alone, by its own name.

    Raises FluxIRError for words that are not there, are there several times, or have unequal numbers of tokens.
    """
    name, _, other_name = text.partition("=")
    pair = []
    for prompt_words, wanted, whose in ((tokens, name, "the prompt"), (others, other_name or name, "the other prompt")):
        try:
            words = prompt_words.choose([wanted])
        except FluxIRError as error:
            raise FluxIRError(f"{whose} has no word {wanted!r}", hint=error.hint) from error
        if len(words) != 1:
            raise FluxIRError(
                f"a swap is of one place: {whose} has {', '.join(word.name for word in words)}",
                hint=f"name one of them, such as {words[0].name}",
            )
        pair += words
    word, other = pair
    if len(word.tokens) != len(other.tokens):
        raise FluxIRError(
            f"words that are swapped have as many tokens as each other: {word.name} has {len(word.tokens)}, "
            f"{other.name} has {len(other.tokens)}",
            hint="swap longer phrases around them, or words of as many tokens",
        )
    return Swap(word, other)


class TextMix(NamedTuple):
    """What stands in place of what: the same for every layer and selection of a prompt."""

    swaps: tuple[Swap, ...]
    rest: TokenSource
    pooled: PooledSource

    def embedding(
        self,
        layer: str,
        selection: Selection,
        prompt: LayerReadings,
        empty: LayerReadings | None,
        other: LayerReadings | None,
    ) -> TextEmbedding:
        """What the transformer is told: the prompt's chosen tokens at a layer, and the rest from where it comes.

        `empty` and `other` are needed where something comes from them. Where a layer is CLIP's, T5's is the last.
        """
        txt = _at(prompt.txt, layer, prompt.plain.txt)
        if self.swaps:
            swapped = _at(_given(other).txt, layer, _given(other).plain.txt)
            txt = txt.clone()
            for swap in self.swaps:
                txt[:, list(swap.word.tokens)] = swapped[:, list(swap.other.tokens)]
        kept = torch.zeros(txt.shape[1], dtype=torch.bool)
        kept[list(selection.tokens)] = True
        match self.rest:
            case "removed":
                txt = txt[:, kept]
            case "zeros":
                txt = torch.where(kept[:, None], txt, torch.zeros_like(txt))
            case "last":
                txt = torch.where(kept[:, None], txt, prompt.plain.txt)
            case "empty" | "other" if not kept.all():
                rest = _given(empty if self.rest == "empty" else other)
                txt = torch.where(kept[:, None], txt, _at(rest.txt, layer, rest.plain.txt))
        if self.pooled == "zeros":
            return TextEmbedding(txt, torch.zeros_like(prompt.plain.y))
        of = prompt if self.pooled == "prompt" else _given(empty if self.pooled == "empty" else other)
        return TextEmbedding(txt, _at(of.y, layer, of.plain.y))


def _at(readings: Mapping[str, Tensor], layer: str, last: Tensor) -> Tensor:
    """The reading of a layer; of the last one, where the layer is the other encoder's."""
    return readings.get(layer, last)


def _given(readings: LayerReadings | None) -> LayerReadings:
    if readings is None:
        raise ValueError("the prompt that something comes from was not read")
    return readings


def words_of_prompt(encoders: TextEncoders, prompt: str) -> PromptTokens:
    """What each token of T5 is."""
    return prompt_tokens(encoders.t5.tokenizer, prompt, encoders.t5.max_tokens)


# ---- Known answers


def answers(sight: Sight, scene: Scene) -> dict[str, bool]:
    """Which of `ASPECTS` a picture has right, of those that the scene's caption asks for."""
    verdict = compare(sight, scene)
    objects = verdict.objects
    asked: dict[str, bool | None] = {
        "number": verdict.number,
        "background": verdict.background,
        "colour": all(found.colour for found in objects),
        "shape": all(found.shape for found in objects),
        "size": all(found.size for found in objects),
        "place": objects[0].place if scene.relation is None else None,
        "relation": verdict.relation,
    }
    given = {aspect: right for aspect, right in asked.items() if right is not None}
    return given | {EVERYTHING: all(given.values())}


class JudgedPicture(NamedTuple):
    """What is on one picture."""

    prompt: int
    """The number of the prompt among all."""
    tokens: str
    """The name of the selection."""
    layer: str
    seed: int
    sight: Sight


class AspectScore(NamedTuple):
    """How often one aspect is right, at one layer, with some tokens."""

    tokens: str
    layer: str
    aspect: str
    right: float
    """The share of pictures."""
    low: float
    high: float
    """Wilson's 95 % interval with as many cases as prompts: as if further seeds of a prompt told nothing new."""
    prompts: int
    pictures: int
    chance: float | None
    """The share that is right of captions of the list that nothing comes from and that ask for it; None: none do."""
    other: float | None
    """The share that is right of the other prompt's caption; None: nothing comes from one that asks for it."""


class Settled(NamedTuple):
    """From which layer on an aspect stays right, in shares of pictures."""

    tokens: str
    encoder: str
    aspect: str
    layers: Mapping[str, float]
    """The first layer from which on it is right at every later one that was read; "never": not at the last."""
    pictures: int


NEVER = "never"


def score(
    pictures: Iterable[JudgedPicture], scenes: Sequence[Scene], others: Sequence[Scene | None]
) -> list[AspectScore]:
    """The judge's answers by selection, layer and aspect, in the order in which they come.

    `scenes` are those of the prompts, `others` those of the prompts that something comes from.
    """
    groups: dict[tuple[str, str], list[JudgedPicture]] = {}
    for picture in pictures:
        groups.setdefault((picture.tokens, picture.layer), []).append(picture)
    shifted = [_shifted(scenes, number, others[number]) for number in range(len(scenes))]
    found = []
    for (tokens, layer), group in groups.items():
        own = [(picture.prompt, answers(picture.sight, scenes[picture.prompt])) for picture in group]
        chance = [answers(picture.sight, scene) for picture in group for scene in shifted[picture.prompt]]
        other = [answers(p.sight, scene) for p in group if (scene := others[p.prompt]) is not None]
        for aspect in ASPECTS:
            right = [given[aspect] for _, given in own if aspect in given]
            if right:
                prompts = len({prompt for prompt, given in own if aspect in given})
                share = sum(right) / len(right)
                low, high = wilson(share, prompts)
                by_chance, of_other = _share(chance, aspect), _share(other, aspect)
                found.append(
                    AspectScore(tokens, layer, aspect, share, low, high, prompts, len(right), by_chance, of_other)
                )
    return found


def settling(pictures: Iterable[JudgedPicture], scenes: Sequence[Scene]) -> list[Settled]:
    """From which layer of each encoder on every aspect stays right: of pictures that differ in the layer alone.

    The pictures of a prompt, seed and selection come by depth.
    """
    runs: dict[tuple[str, str], dict[tuple[int, int], list[tuple[str, dict[str, bool]]]]] = {}
    for picture in pictures:
        of_encoder = runs.setdefault((picture.tokens, picture.layer.split(".")[0]), {})
        given = answers(picture.sight, scenes[picture.prompt])
        of_encoder.setdefault((picture.prompt, picture.seed), []).append((picture.layer, given))
    found = []
    for (tokens, encoder), by_picture in runs.items():
        layers = [layer for layer, _ in next(iter(by_picture.values()))]
        for aspect in ASPECTS:
            first = [_settles(run, aspect) for run in by_picture.values() if aspect in run[0][1]]
            if first:
                shares = {layer: first.count(layer) / len(first) for layer in [*layers, NEVER]}
                found.append(Settled(tokens, encoder, aspect, shares, len(first)))
    return found


def _settles(run: Sequence[tuple[str, Mapping[str, bool]]], aspect: str) -> str:
    settled = NEVER
    for layer, given in reversed(run):
        if not given[aspect]:
            break
        settled = layer
    return settled


def wilson(share: float, cases: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share among so many cases; the share may be a mean of means."""
    z = 1.959964
    centre = (share + z**2 / (2 * cases)) / (1 + z**2 / cases)
    half = z / (1 + z**2 / cases) * math.sqrt(share * (1 - share) / cases + z**2 / (4 * cases**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _shifted(scenes: Sequence[Scene], number: int, other: Scene | None) -> list[Scene]:
    """Up to `SHIFTS` scenes that follow this one in the list, in a circle, that nothing of the picture comes from."""
    told = [scene.caption for scene in (scenes[number], other) if scene is not None]
    following = (scenes[(number + shift) % len(scenes)] for shift in range(1, len(scenes)))
    return [scene for scene in following if scene.caption not in told][:SHIFTS]


def _share(given: Sequence[Mapping[str, bool]], aspect: str) -> float | None:
    right = [one[aspect] for one in given if aspect in one]
    return sum(right) / len(right) if right else None
