"""The words of a prompt and the tokens of T5 that spell each: a map is of a word, the network's keys are of pieces."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models.text.tokenizer import PromptTokenizer

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


class Word(NamedTuple):
    """A word of a prompt, or a phrase, and its tokens among the text's."""

    name: str
    """In lower case; of a word that comes again `red#1`, `red#2`."""
    tokens: tuple[int, ...]


class PromptTokens(NamedTuple):
    """What each token of an encoded prompt is."""

    words: list[Word]
    """Every word of the prompt, in its order, each place of a word by itself."""
    end: tuple[int, ...]
    padding: tuple[int, ...]

    def choose(self, names: Sequence[str] | None) -> list[Word]:
        """The words and phrases of these names, a repeated one at all its places; None: every word.

        A phrase ("red circle") is several words of the prompt that follow each other. Raises FluxIRError for one that
        is not in the prompt.
        """
        if names is None:
            return list(self.words)
        found = [word for name in names for word in self._places(name)]
        return list(dict.fromkeys(found))

    def _places(self, name: str) -> list[Word]:
        by_name = [word for word in self.words if word.name == name.strip().lower()]
        if by_name:
            return by_name
        parts, plain = _WORD.findall(name.lower()), [word.name.split("#")[0] for word in self.words]
        starts = [at for at in range(len(plain)) if parts and plain[at : at + len(parts)] == parts]
        if not starts:
            raise FluxIRError(
                f"the prompt has no word {name!r}",
                hint=f"its words are {', '.join(word.name for word in self.words) or 'none'}",
            )
        joined, several = " ".join(parts), len(starts) > 1
        return [
            Word(
                f"{joined}#{number}" if several else joined,
                tuple(token for word in self.words[at : at + len(parts)] for token in word.tokens),
            )
            for number, at in enumerate(starts, start=1)
        ]


def prompt_tokens(tokenizer: PromptTokenizer, prompt: str, max_tokens: int) -> PromptTokens:
    """Which tokens of the prompt, as T5 is given it, spell which word; `max_tokens` is the length of the text.

    A token is the word's if it stands for any of its letters; punctuation by itself is no word. A word that lies behind
    the cut of a long prompt is left out.
    """
    encoded = tokenizer.backend.encode(prompt)
    used = tokenizer.cut(list(encoded.ids), max_tokens)
    end = tuple(at for at, number in enumerate(used) if number == tokenizer.end_id and at == len(used) - 1)
    spans = [encoded.offsets[at] for at in range(len(used)) if at not in end]
    found: list[tuple[str, tuple[int, ...]]] = []
    for match in _WORD.finditer(prompt):
        tokens = tuple(at for at, (start, stop) in enumerate(spans) if start < match.end() and stop > match.start())
        if tokens:
            found.append((match.group().lower(), tokens))
    names = [name for name, _ in found]
    seen: dict[str, int] = {}
    words = []
    for name, tokens in found:
        seen[name] = seen.get(name, 0) + 1
        words.append(Word(f"{name}#{seen[name]}" if names.count(name) > 1 else name, tokens))
    return PromptTokens(words, end, tuple(range(len(used), max_tokens)))
