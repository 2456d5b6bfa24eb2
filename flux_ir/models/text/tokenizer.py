"""Prompts as token numbers, by the library `tokenizers`, from the files beside a text encoder.

The files are a `tokenizer.json`, which says everything, or the older form: `vocab.json` with `merges.txt` of CLIP,
`spiece.model` of T5 (SentencePiece, Kudo & Richardson, 2018). Read from the older form, the token numbers are those of
transformers (`tests/models/text/test_tokenizer.py`), whose import takes several times as long as PyTorch's.

A prompt is cut or padded to a fixed length, as in the reference. Nothing of a tokenizer changes once it is made, so
any number of threads may use one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.checkpoints.pretrained import unreadable
from flux_ir.shapes import TokenIds

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARY, MERGES, SENTENCEPIECE = "vocab.json", "merges.txt", "spiece.model"
_SPECIAL_TOKENS = "special_tokens_map.json"
"""Where older folders say which of their tokens begin, end and pad a text."""
_ROLES = ("eos_token", "pad_token", "unk_token", "bos_token")
# What stands for these where a folder does not say it.
_CLIP_ROLES = dict.fromkeys(_ROLES, "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
_T5_ROLES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Where OpenAI's CLIP cuts a text before its byte pairs are merged, besides its two special tokens.
_CLIP_CUTS = r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# SentencePiece's mark for the space before a word, and its number for unigram models.
_SPACE, _UNIGRAM = "\u2581", 1


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
    """The tokenizer of the folder, of the newest of the files that it has.

    Raises FluxIRError if there is none that can be read. `what` is the model's name there.
    """
    try:
        roles = _roles(folder)
        backend = _backend(folder, roles)
        names = _usual_roles(backend) | roles
        if lacking := [role for role in ("eos_token", "pad_token") if role not in names]:
            raise FluxIRError(f"{TOKENIZER_CONFIG} does not say what the {' and the '.join(lacking)} is")
        return PromptTokenizer(
            backend, end=names["eos_token"], padding=names["pad_token"], unknown=names.get("unk_token")
        )
    except (OSError, ValueError) as error:
        raise unreadable(folder, f"the tokenizer: {error}", what=what) from error
    except FluxIRError as error:
        raise unreadable(folder, f"the tokenizer: {error.message}", what=what) from error


def _backend(folder: Path, roles: dict[str, str]) -> Tokenizer:
    # The library and SentencePiece raise nothing narrower than Exception for files that they cannot read.
    try:
        if (folder / TOKENIZER_FILE).is_file():
            return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
            return _byte_pairs(folder, roles)
        if (folder / SENTENCEPIECE).is_file():
            return _unigrams(folder, roles)
    except FluxIRError:
        raise
    except Exception as error:
        raise ValueError(str(error)) from error
    raise FluxIRError(f"no {TOKENIZER_FILE}, no {VOCABULARY} with {MERGES}, no {SENTENCEPIECE}")


def _byte_pairs(folder: Path, roles: dict[str, str]) -> Tokenizer:
    """CLIP's: bytes that merge within a word (Sennrich et al., 2016), the text in lower case, between two marks."""
    names = _CLIP_ROLES | roles
    start, end = names["bos_token"], names["eos_token"]
    backend = Tokenizer(
        models.BPE.from_file(
            str(folder / VOCABULARY),
            str(folder / MERGES),
            unk_token=names["unk_token"],
            end_of_word_suffix="</w>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    cuts = Regex("|".join([*(re.escape(_CLIP_ROLES[role]) for role in ("bos_token", "eos_token")), _CLIP_CUTS]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(cuts, "removed", invert=True),  # what is cut out is kept, what lies between is not
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    _add_special(backend, folder, list(names.values()))
    numbers = [(name, backend.token_to_id(name)) for name in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=numbers)
    return backend


def _unigrams(folder: Path, roles: dict[str, str]) -> Tokenizer:
    """T5's: the likeliest of all ways to cut every word into pieces (Kudo, 2018), with an end mark behind.

    Raises FluxIRError for a SentencePiece model of another kind.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema  # with protobuf: needed for this form alone

    model: Any = schema.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString((folder / SENTENCEPIECE).read_bytes())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type != _UNIGRAM or trainer.byte_fallback or not normalizer.add_dummy_prefix:
        raise FluxIRError(f"{SENTENCEPIECE} must be a unigram model without bytes, as that of T5 is")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    # T5's sentinels (Raffel et al., 2020, section 3.1.4) stand behind the pieces of the file, the last of them first.
    sentinels = [f"<extra_id_{number}>" for number in range(_tokenizer_config(folder).get("extra_ids", 100))]
    backend = Tokenizer(
        models.Unigram([*pieces, *((sentinel, 0.0) for sentinel in reversed(sentinels))], unk_id=trainer.unk_id)
    )
    if normalizer.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(normalizer.precompiled_charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")]
    )
    names = _T5_ROLES | roles
    _add_special(backend, folder, [*names.values(), *sentinels])
    end = names["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    return backend


def _add_special(backend: Tokenizer, folder: Path, names: list[str]) -> None:
    """Has these tokens taken as a whole wherever they stand in a text, and those that the folder says it has added.

    Raises FluxIRError for an added token that would get another number than the folder says.
    """
    backend.add_special_tokens(list(dict.fromkeys(names)))
    config = _tokenizer_config(folder)
    added = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    for number, token in sorted(added.items()):
        flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
        backend.add_tokens([AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != number:
            raise FluxIRError(f"{token['content']!r} must have the number {number} that {TOKENIZER_CONFIG} says")


def _usual_roles(backend: Tokenizer) -> dict[str, str]:
    """What ends and pads texts by custom, if the tokenizer has CLIP's or T5's tokens for that."""
    for roles in (_CLIP_ROLES, _T5_ROLES):
        known = {role: name for role, name in roles.items() if backend.token_to_id(name) is not None}
        if known.keys() | {"unk_token"} == roles.keys():
            return known
    return {}


def _roles(folder: Path) -> dict[str, str]:
    """The special tokens that the folder names, by their roles, as transformers calls these."""
    older = read_json(folder / _SPECIAL_TOKENS) if (folder / _SPECIAL_TOKENS).is_file() else {}
    said = older | {role: token for role, token in _tokenizer_config(folder).items() if token is not None}
    named = {role: said[role] for role in _ROLES if said.get(role) is not None}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; empty where there is none."""
    return read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
