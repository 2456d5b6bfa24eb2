"""Prompts as token numbers, by the library `tokenizers` and the `tokenizer.json` beside a text encoder.

A prompt is cut or padded to a fixed length, as in the reference. Nothing of a tokenizer changes once it is made, so
any number of threads may use one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from flux_ir.errors import FluxIRError
from flux_ir.models.pretrained import unreadable
from flux_ir.models.registry import read_object
from flux_ir.shapes import TokenIds

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL_TOKENS = (TOKENIZER_CONFIG, "special_tokens_map.json")
"""Where a folder may say which of its tokens end and pad a text. The second is older."""


class PromptTokenizer:
    """Text to the numbers of its tokens, with what stands before and after every text. `None`: no such token."""

    def __init__(self, backend: Tokenizer, *, end: str, padding: str, unknown: str | None) -> None:
        """Takes over `backend`. Raises FluxIRError for a token that it does not have."""
        backend.no_truncation()  # a tokenizer.json may have been saved with either
        backend.no_padding()
        self._backend = backend
        self.end, self.padding, self.unknown = end, padding, unknown
        self.end_id, self.padding_id = self._number(end), self._number(padding)
        self.unknown_id = None if unknown is None else self._number(unknown)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer of the library: how to save it."""
        return self._backend

    def numbers(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The token numbers of each text, as many as it needs. `special`: with the end token and its like."""
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=special)
        return [text.ids for text in encoded]

    def fixed(self, texts: Sequence[str], length: int) -> TokenIds:
        """Token numbers of exactly `length`: longer texts are cut before their end token, shorter ones padded."""
        rows = [self.cut(numbers, length) for numbers in self.numbers(texts)]
        return torch.tensor([row + [self.padding_id] * (length - len(row)) for row in rows])

    def used(self, text: str, length: int) -> int:
        """How many of `length` tokens are the text's, with its end: the rest is padding."""
        return min(len(self.numbers([text])[0]), length)

    def cut(self, numbers: list[int], length: int) -> list[int]:
        """At most `length` of a text's numbers; the end token stays the last."""
        if len(numbers) <= length:
            return numbers
        return [*numbers[: length - 1], self.end_id] if numbers[-1] == self.end_id else numbers[:length]

    def words(self) -> set[str]:
        """All tokens that stand for text."""
        special = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        return self._backend.get_vocab(with_added_tokens=True).keys() - special - {self.end, self.padding, self.unknown}

    def _number(self, token: str) -> int:
        number = self._backend.token_to_id(token)
        if number is None:
            raise FluxIRError(f"a tokenizer must have every token that it names: it has no {token!r}")
        return number


def load_tokenizer(folder: Path, *, what: str) -> PromptTokenizer:
    """The tokenizer of the folder. Raises FluxIRError if there is none that can be read."""
    named = _special_tokens(folder)
    end, padding, unknown = (named.get(f"{kind}_token") for kind in ("eos", "pad", "unk"))
    try:
        if not (folder / TOKENIZER_FILE).is_file() or end is None or padding is None:
            return _converted(folder)
        return PromptTokenizer(_read(folder / TOKENIZER_FILE), end=end, padding=padding, unknown=unknown)
    except (OSError, ValueError) as error:
        raise unreadable(folder, f"the tokenizer: {error}", what=what) from error
    except FluxIRError as error:
        raise unreadable(folder, f"the tokenizer: {error.message}", what=what) from error


def _read(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from error


def _converted(folder: Path) -> PromptTokenizer:
    """The tokenizer of older files (spiece.model, or vocab.json with merges.txt), or one whose folder does not name its
    special tokens. transformers can convert the former and knows the latter; it is slow to import, so only here.
    """
    from transformers import AutoTokenizer

    known: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = Tokenizer.from_str(known.backend_tokenizer.to_str())
    return PromptTokenizer(backend, end=known.eos_token, padding=known.pad_token, unknown=known.unk_token)


def _special_tokens(folder: Path) -> dict[str, str | None]:
    """The special tokens that the folder names, by what transformers calls them. Older files have objects there."""
    named: dict[str, str | None] = {}
    for file in _SPECIAL_TOKENS:
        said = read_object(folder / file) if (folder / file).is_file() else {}
        tokens = {name: said[name] for name in ("eos_token", "pad_token", "unk_token") if said.get(name) is not None}
        named = {name: t["content"] if isinstance(t, dict) else str(t) for name, t in tokens.items()} | named
    return named
