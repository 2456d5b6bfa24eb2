"""Text encoders: T5 gives every token a vector, CLIP gives the prompt one vector. Both through transformers.

As in the reference, prompts are padded to a fixed length and the padding is attended to (no mask). What encodes no
prompt does not wait for transformers, whose models take longer to import than PyTorch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.pretrained import load_pretrained, load_tokenizer
from flux_ir.shapes import Pooled, TxtTokens

CLIP_TOKENS = 77
_WHAT = "the text encoder"
LISTABLE_WORDS = 100  # vocabularies up to this size are spelt out in the note on unknown words
UNKNOWN_WORDS_TOLD = 20
LONGEST_WORD_TOLD = 40  # characters
_WORDS = re.compile(r"\w+|[^\w\s]+")


class TextEmbedding(NamedTuple):
    """What the transformer is told: a vector per text token from T5 and one pooled vector from CLIP."""

    txt: TxtTokens
    """[prompts, tokens, d] from T5."""
    y: Pooled
    """[prompts, d] from CLIP: `vec` in the reference code."""


class TextEncoder(nn.Module):
    """A text model of transformers with its tokenizer.

    `forward` gives token vectors (T5) or a pooled vector (CLIP) per prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_tokens: int,
        output: Literal["last_hidden_state", "pooler_output"],
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.output = output

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Token numbers, int64 [prompts, max_tokens], cut or padded to the fixed length."""
        encoded = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return encoded["input_ids"]

    def forward(self, prompts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return getattr(self.model(input_ids=self.token_ids(prompts).to(device)), self.output)

    @property
    def name(self) -> str:
        """What people call the encoder."""
        return "T5" if self.output == "last_hidden_state" else "CLIP"

    def notes(self, prompt: str) -> list[str]:
        """What a user should know of this prompt: where it is cut, and words that the tokenizer has never seen."""
        ids = self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        notes = []
        if len(ids) > self.max_tokens:
            notes.append(f"the prompt has {len(ids)} tokens and is cut after {self.max_tokens} for {self.name}")
        if unknown := self.unknown_words(prompt):
            told = [repr(word[:LONGEST_WORD_TOLD]) for word in unknown[:UNKNOWN_WORDS_TOLD]]
            more = f" and {len(unknown) - len(told)} more" if len(unknown) > len(told) else ""
            notes.append(f"words never seen in training: {', '.join(told)}{more}{self._known_words()}")
        return notes

    def unknown_words(self, prompt: str) -> list[str]:
        """The words and runs of punctuation in `prompt` that hold something the tokenizer has no token for.

        Each once, in order.
        """
        unknown_id = self.tokenizer.unk_token_id
        words = list(dict.fromkeys(_WORDS.findall(prompt)))
        if not words or unknown_id is None or unknown_id == self.tokenizer.eos_token_id:
            return []  # byte-level vocabularies such as CLIP's can spell anything
        ids = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        return [word for word, tokens in zip(words, ids, strict=True) if unknown_id in tokens]

    def _known_words(self) -> str:
        words = self.tokenizer.get_vocab().keys() - set(self.tokenizer.all_special_tokens)
        return f". It knows these words: {', '.join(sorted(words))}" if len(words) <= LISTABLE_WORDS else ""


def load_t5(
    model: Path,
    tokenizer_dir: Path,
    max_tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> TextEncoder:
    """The T5 encoder of a local transformers folder, or of one file of weights with `config` and `prefix`.

    `max_tokens`: the text length the transformer was trained with.

    Raises FluxIRError for files that are broken or quantised, lack weights or have too many, and for the tokenizer of
    another model.
    """
    from transformers import T5EncoderModel

    left_out = ("decoder.", "lm_head.")
    t5 = load_pretrained(T5EncoderModel, model, dtype, what=_WHAT, left_out=left_out, config=config, prefix=prefix)
    return _finished(TextEncoder(t5, _tokenizer(tokenizer_dir, t5), max_tokens, "last_hidden_state"), device)


def load_clip(
    model: Path,
    tokenizer_dir: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> TextEncoder:
    """The CLIP text encoder, from what `load_t5` takes. Raises FluxIRError as it does."""
    from transformers import CLIPTextModel

    left_out = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    clip: Any = load_pretrained(
        CLIPTextModel, model, dtype, what=_WHAT, left_out=left_out, config=config, prefix=prefix
    )
    max_tokens = min(CLIP_TOKENS, clip.config.max_position_embeddings)
    return _finished(TextEncoder(clip, _tokenizer(tokenizer_dir, clip), max_tokens, "pooler_output"), device)


def _tokenizer(folder: Path, model: Any) -> Any:
    """The tokenizer of the folder. Raises FluxIRError if it is another model's: their numbers would be nonsense."""
    tokenizer = load_tokenizer(folder, what=_WHAT)
    words = model.config.vocab_size
    # CLIP was published with 2 as its end of text, which it never was: it is the last of its tokens.
    ends = {model.config.eos_token_id, words - 1}
    if len(tokenizer) > words or tokenizer.eos_token_id not in ends:
        raise FluxIRError(
            f"the tokenizer in {folder} is not that of the text encoder: it has {len(tokenizer)} tokens and ends texts "
            f"with number {tokenizer.eos_token_id}; the encoder knows {words} and the end {model.config.eos_token_id}",
            hint="fetch the tokenizer's folder of the same model",
        )
    return tokenizer


def _finished(encoder: TextEncoder, device: torch.device | str) -> TextEncoder:
    return encoder.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(t5: TextEncoder, clip: TextEncoder, prompts: list[str]) -> TextEmbedding:
    """Both embeddings of some prompts, each on its encoder's device."""
    return TextEmbedding(t5(prompts), clip(prompts))
