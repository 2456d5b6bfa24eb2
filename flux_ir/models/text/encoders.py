"""Text encoders with their tokenizers: T5 gives every token a vector, CLIP gives the prompt one vector.

As in the reference, prompts are padded to a fixed length and the padding is attended to (no mask). The networks are in
`t5` and `clip`, and have the names that the published checkpoints have; the few other names that files use are here.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.encoder_configs import Encoder
from flux_ir.models.checkpoints.locate_text import EncoderSource
from flux_ir.models.checkpoints.lora.read import LoRA
from flux_ir.models.checkpoints.pretrained import Opened, load_pretrained, open_pretrained, read_config, read_params
from flux_ir.models.streaming import take_rows_one_by_one
from flux_ir.models.text.clip import ClipPhrase, ClipText, ClipTextParams
from flux_ir.models.text.t5 import T5Encoder, T5Params
from flux_ir.models.text.tokenizer import PromptTokenizer, load_tokenizer
from flux_ir.shapes import Context, Pooled, TokenIds

CLIP_TOKENS = 77
_WHAT, _WHAT_CLIP = "the text encoder", "the CLIP model"  # in errors

# T5's embedding may stand under the name that it has inside the encoder, or under both: they are one tensor.
T5_ALIASES = {"encoder.embed_tokens.": "shared."}
# What transformers 5 saves as a text encoder alone has lost the first level of its names.
CLIP_ALIASES = {name: f"text_model.{name}" for name in ("embeddings.", "encoder.", "final_layer_norm.")}
# Other parts of the checkpoints.
_T5_LEFT_OUT = ("decoder.", "lm_head.")
_CLIP_LEFT_OUT = ("vision_model.", "visual_projection.", "logit_scale")
_CLIP_POOLED_LEFT_OUT = (*_CLIP_LEFT_OUT, "text_projection.")
LISTABLE_WORDS = 100  # vocabularies up to this size are spelt out in the note on unknown words
UNKNOWN_WORDS_TOLD = 20
LONGEST_WORD_TOLD = 40  # characters
_WORDS = re.compile(r"\w+|[^\w\s]+")


class TextEmbedding(NamedTuple):
    """What the transformer is told: a vector per text token from T5 and one pooled vector from CLIP."""

    txt: Context
    """[prompts, tokens, d] from T5, padding included; `Flux.txt_in` brings it to the width of the network."""
    y: Pooled
    """[prompts, d] from CLIP. The reference code calls it `vec`; here `vec` is what `Flux.conditioning` makes of it."""

    def digest(self) -> str:
        """16 hex digits that stand for the values, whatever their dtype and device."""
        parts = [part.float().contiguous().numpy(force=True).tobytes() for part in self]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class TextEncoder(nn.Module):
    """A text network with its tokenizer. `forward` gives token vectors (T5) or a pooled vector (CLIP) per prompt."""

    def __init__(
        self, model: T5Encoder | ClipText, tokenizer: PromptTokenizer, max_tokens: int, *, streamed: bool = False
    ) -> None:
        super().__init__()
        self.streamed = streamed
        """Whether every call fetches the weights anew: many prompts are better encoded by one."""
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def token_ids(self, prompts: list[str]) -> TokenIds:
        """Token numbers, int64 [prompts, max_tokens], cut or padded to the fixed length."""
        return self.tokenizer.fixed(prompts, self.max_tokens)

    def forward(self, prompts: list[str]) -> Tensor:
        return self.model(self._ids(prompts))

    def embed(self, prompts: list[str]) -> Tensor:
        """What the first layer is given, [prompts, max_tokens, d]."""
        return self.model.embed(self._ids(prompts))

    def read_out(self, hidden: Tensor, prompts: list[str]) -> Tensor:
        """What `forward` would give if the encoder stopped at the layer that puts out `hidden` of these prompts.

        The lens of text encoders (Toker et al., 2024): the norm behind the last layer, applied earlier. Of the last
        layer it gives what `forward` gives, bit for bit.
        """
        return self.model.read_out(hidden, self._ids(prompts))

    def _ids(self, prompts: list[str]) -> TokenIds:
        return self.token_ids(prompts).to(next(self.model.parameters()).device)

    @property
    def name(self) -> str:
        """What people call the encoder."""
        return "T5" if isinstance(self.model, T5Encoder) else "CLIP"

    @property
    def d(self) -> int:
        """The width of a vector."""
        return self.model.params.d_model if isinstance(self.model, T5Encoder) else self.model.params.hidden_size

    def length(self, prompt: str) -> int:
        """How many tokens the whole prompt has, with its end mark."""
        return len(self.tokenizer.numbers([prompt])[0])

    def notes(self, prompt: str) -> list[str]:
        """What a user should know of this prompt: where it is cut, and words that the tokenizer has never seen."""
        notes = []
        if (length := self.length(prompt)) > self.max_tokens:
            notes.append(f"the prompt has {length} tokens and is cut after {self.max_tokens} for {self.name}")
        if unknown := self.unknown_words(prompt):
            told = [repr(word[:LONGEST_WORD_TOLD]) for word in unknown[:UNKNOWN_WORDS_TOLD]]
            more = f" and {len(unknown) - len(told)} more" if len(unknown) > len(told) else ""
            notes.append(f"words never seen in training: {', '.join(told)}{more}{self._known_words()}")
        return notes

    def unknown_words(self, prompt: str) -> list[str]:
        """The words and runs of punctuation in `prompt` that hold something the tokenizer has no token for.

        Each once, in order.
        """
        unknown_id = self.tokenizer.unknown_id
        words = list(dict.fromkeys(_WORDS.findall(prompt)))
        if not words or unknown_id is None or unknown_id == self.tokenizer.end_id:
            return []  # byte-level vocabularies such as CLIP's can spell anything
        ids = self.tokenizer.numbers(words, special=False)
        return [word for word, tokens in zip(words, ids, strict=True) if unknown_id in tokens]

    def _known_words(self) -> str:
        words = self.tokenizer.words()
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
    streamed: bool = False,
    loras: Sequence[LoRA] = (),
) -> TextEncoder:
    """The T5 encoder of a local transformers folder, or of one file of weights with `config` and `prefix`.

    `max_tokens`: the text length the transformer was trained with. `streamed`: its blocks' weights come from the file
    one after the other whenever it runs; it cannot be moved to another device then. What `loras` change is merged.

    Raises FluxIRError for files that are broken or quantised, lack weights or have too many, for the tokenizer of
    another model, and for float16, beyond whose largest number T5's feed-forward layers go.
    """
    if dtype == torch.float16:
        raise FluxIRError("T5 must be in bfloat16 or float32: float16 ends at 65504, and its layers go beyond")
    params = read_params(T5Params, model, what=_WHAT, config=config)
    t5 = load_pretrained(
        T5Encoder,
        params,
        model,
        device,
        dtype,
        what=_WHAT,
        aliases=T5_ALIASES,
        left_out=_T5_LEFT_OUT,
        prefix=prefix,
        streamed=[f"encoder.block.{number}" for number in range(params.num_layers)] if streamed else (),
        loras=loras,
        part="t5",
    )
    tokenizer = _tokenizer(tokenizer_dir, t5.params)
    return TextEncoder(t5, tokenizer, max_tokens, streamed=streamed).eval()


def load_clip(
    model: Path,
    tokenizer_dir: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    beside_streamed: bool = False,
    loras: Sequence[LoRA] = (),
) -> TextEncoder:
    """The CLIP text encoder, from what `load_t5` takes. Raises FluxIRError as it does.

    `beside_streamed`: on a CPU it gives each prompt of a batch the bits that it has by itself, as a streamed T5 does.
    """
    clip = load_pretrained(
        ClipText,
        read_params(ClipTextParams, model, what=_WHAT, config=config, section="text_config"),
        model,
        device,
        dtype,
        what=_WHAT,
        aliases=CLIP_ALIASES,
        left_out=_CLIP_POOLED_LEFT_OUT,
        prefix=prefix,
        loras=loras,
        part="clip",
    )
    if beside_streamed and torch.device(device).type == "cpu":
        for layer in clip.text_model.encoder.layers:
            take_rows_one_by_one(layer)
    tokenizer = _tokenizer(tokenizer_dir, clip.params)
    return TextEncoder(clip, tokenizer, min(CLIP_TOKENS, clip.params.max_position_embeddings)).eval()


def open_encoder(encoder: Encoder, source: EncoderSource) -> Opened[T5Encoder] | Opened[ClipText]:
    """A text encoder without its weights, and its weights unread. Raises FluxIRError as `load_t5` does."""
    if encoder == "t5":
        return open_pretrained(
            T5Encoder,
            read_params(T5Params, source.path, what=_WHAT, config=source.config),
            source.path,
            what=_WHAT,
            aliases=T5_ALIASES,
            left_out=_T5_LEFT_OUT,
            prefix=source.prefix,
        )
    return open_pretrained(
        ClipText,
        read_params(ClipTextParams, source.path, what=_WHAT, config=source.config, section="text_config"),
        source.path,
        what=_WHAT,
        aliases=CLIP_ALIASES,
        left_out=_CLIP_POOLED_LEFT_OUT,
        prefix=source.prefix,
    )


def load_phrase_tower(folder: Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    """CLIP's text half with its projection and tokenizer, from a folder of transformers.

    Raises FluxIRError as `load_t5` does.
    """
    size = read_config(folder, what=_WHAT_CLIP).get("projection_dim", 512)
    clip = load_pretrained(
        partial(ClipPhrase, projection_dim=size),
        read_params(ClipTextParams, folder, what=_WHAT_CLIP, section="text_config"),
        folder,
        device,
        dtype,
        what=_WHAT_CLIP,
        aliases=CLIP_ALIASES,
        left_out=_CLIP_LEFT_OUT,
    )
    tokenizer = _tokenizer(folder, clip.params)
    return TextEncoder(clip, tokenizer, min(CLIP_TOKENS, clip.params.max_position_embeddings)).eval()


def _tokenizer(folder: Path, params: T5Params | ClipTextParams) -> PromptTokenizer:
    """The tokenizer of the folder. Raises FluxIRError if it is another model's: their numbers would be nonsense."""
    tokenizer = load_tokenizer(folder, what=_WHAT)
    words, end = params.vocab_size, params.eos_token_id
    # CLIP was published with 2 as its end of text, which it never was: it is the last of its tokens.
    if len(tokenizer) > words or tokenizer.end_id not in (end, words - 1):
        raise FluxIRError(
            f"the tokenizer in {folder} is not that of the text encoder: it has {len(tokenizer)} tokens and ends texts "
            f"with number {tokenizer.end_id}; the encoder knows {words} and the end {end}",
            hint="fetch the tokenizer's folder of the same model",
        )
    return tokenizer


@torch.no_grad()
def encode(t5: TextEncoder, clip: TextEncoder, prompts: list[str]) -> TextEmbedding:
    """Both embeddings of some prompts, each on its encoder's device."""
    return TextEmbedding(t5(prompts), clip(prompts))
