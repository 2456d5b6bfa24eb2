"""Attention probabilities of a few chosen tokens, exactly, without the matrix of all tokens against all.

A fused kernel that computes attention knows the log-sum-exp of every query's logits, lse_i = log sum_j exp(q_i k_j s)
with s = 1 / sqrt(head width). The probability that query i gives key c is then exp(q_i k_c s - lse_i): no second
softmax, and memory in proportion to tokens x chosen. Of chosen queries the whole row is taken, which is as small.

`AttentionSink` is what a `Recorder` writes queries and keys to. It only reads: the picture keeps its bits. The price is
one more run of the attention kernel in each block that is looked at. Next: `words`, which says which keys are a word's.
"""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.maps.words import Word
from flux_ir.recording.recorder import StepContext
from flux_ir.shapes import Heads, Tokens
from flux_ir.sites import Site, nearest_names

Lse = Float[Tensor, "batch heads tokens"]
Keys = Float[Tensor, "batch heads keys head_dim"]
Shares = Float[Tensor, "batch heads tokens keys"]
"""Of every query, how much of its attention it gives to each key."""

_LOGITS_AT_ONCE = 1 << 24
"""Logits of one chunk where a device's kernel gives no log-sum-exp: 64 MB in float32."""


# ---- Exact probabilities


def log_sum_exp(q: Heads, k: Keys) -> Lse:
    """Log sum_j exp(q_i k_j / sqrt(head width)) of every query, in float32: from the fused kernel where it gives it.

    On a CPU, and on CUDA in 16 bits, that is the flash kernel. Elsewhere logits are summed up chunk by chunk, in
    float32: as exact, and slower.
    """
    ops = torch.ops.aten
    if q.device.type == "cpu" and hasattr(ops, "_scaled_dot_product_flash_attention_for_cpu"):
        return ops._scaled_dot_product_flash_attention_for_cpu(q, k, k)[1].float()
    # Heads of at most 256 channels in multiples of 8: the flash kernel on CUDA takes no others.
    fits_flash = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    if q.device.type == "cuda" and fits_flash and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return ops._scaled_dot_product_flash_attention(q, k, k)[1][..., : q.shape[2]].float()
    return log_sum_exp_in_chunks(q, k)


def log_sum_exp_in_chunks(q: Heads, k: Keys, logits_at_once: int = _LOGITS_AT_ONCE) -> Lse:
    """The same from the logits themselves, so many of them at a time: for devices whose kernel does not give it."""
    rows = max(1, logits_at_once // (q.shape[0] * q.shape[1] * k.shape[2]))
    return torch.cat([_logits(part, k).logsumexp(dim=-1) for part in torch.split(q, rows, dim=2)], dim=2)


def key_probabilities(q: Heads, chosen_k: Keys, lse: Lse) -> Shares:
    """How much of its attention every query gives to each of the chosen keys: exp(q k s - lse)."""
    return torch.exp(_logits(q, chosen_k) - lse[..., None])


def query_probabilities(chosen_q: Heads, k: Keys) -> Shares:
    """How much of its attention each of the chosen queries gives to every key: the softmax of its own row."""
    return _logits(chosen_q, k).softmax(dim=-1)


def _logits(q: Heads, k: Keys) -> Shares:
    # In float32 whatever the network computes in: the kernels accumulate so too.
    return (q.float() / math.sqrt(q.shape[-1])) @ k.float().mT


# ---- Maps of a block


class MapTargets(NamedTuple):
    """Of which tokens maps are made, and how the text's tokens are grouped."""

    words: Sequence[Word]
    patches: Sequence[int] = ()
    """Image tokens, counted row by row from 0, whose own attention over the image is mapped."""
    end: Sequence[int] = ()
    padding: Sequence[int] = ()


GROUPS = ("words", "other words", "end", "padding", "image", "reference")
"""What all tokens are divided into: the chosen words, the rest of the prompt with its punctuation, the end mark, the
padding, the image's own tokens and those of a reference picture."""


class BlockMaps(NamedTuple):
    """Maps of one block at one step, of one picture. With heads kept they have an axis more, in front."""

    to_words: Float[Tensor, "*heads words img"]
    """The share of its attention that each image token gives to a word: the sum over the word's tokens."""
    from_words: Float[Tensor, "*heads words img"]
    """The share of its attention that a word gives to each image token: the mean over the word's tokens."""
    from_patches: Float[Tensor, "*heads patches img"]
    """The share of its attention that a chosen image token gives to each image token."""
    mass: Float[Tensor, "*heads groups"]
    """The attention of image tokens on each of `GROUPS`, mean over image tokens: adds up to 1."""


def block_maps(
    q: Heads, k: Heads, targets: MapTargets, txt_tokens: int, *, cond_k: Keys | None = None, keep_heads: bool = False
) -> BlockMaps:
    """Maps of one picture from the rotated queries and keys of text and image, text first.

    `cond_k` are the keys of a reference picture's tokens, which stand behind. One head after the other, so that memory
    is that of the text's keys for one head.
    """
    every_k = k if cond_k is None else torch.cat([k, cond_k], dim=2)
    lse = log_sum_exp(q, every_k)
    heads = [
        _head_maps(q[:, h : h + 1], every_k[:, h : h + 1], lse[:, h : h + 1], targets, txt_tokens, k.shape[2])
        for h in range(q.shape[1])
    ]
    stacked = [torch.stack(values) for values in zip(*heads, strict=True)]
    return BlockMaps(*(stacked if keep_heads else (values.mean(dim=0) for values in stacked)))


def _head_maps(q: Heads, k: Keys, lse: Lse, targets: MapTargets, txt_tokens: int, own_tokens: int) -> BlockMaps:
    img = slice(txt_tokens, own_tokens)
    to_text = key_probabilities(q[:, :, img], k[:, :, :txt_tokens], lse[:, :, img])[0, 0]  # [img, txt]
    to_words = [to_text[:, list(word.tokens)].sum(dim=1) for word in targets.words]
    rows = sorted({token for word in targets.words for token in word.tokens})
    of_rows = query_probabilities(q[:, :, rows], k)[0, 0][:, img]
    from_words = [of_rows[[rows.index(token) for token in word.tokens]].mean(dim=0) for word in targets.words]
    patches = [txt_tokens + patch for patch in targets.patches]
    from_patches = query_probabilities(q[:, :, patches], k)[0, 0][:, img]

    text = to_text.mean(dim=0)
    named = {*rows, *targets.end, *targets.padding}
    of_prompt = [token for token in range(txt_tokens) if token not in named]
    in_text = [text[list(tokens)].sum() for tokens in (rows, of_prompt, targets.end, targets.padding)]
    reference = text.new_zeros(())
    for chunk in torch.split(k[:, :, own_tokens:], 256, dim=2):
        reference = reference + key_probabilities(q[:, :, img], chunk, lse[:, :, img])[0, 0].mean(dim=0).sum()
    mass = [*in_text, 1 - text.sum() - reference, reference]
    empty = to_text.new_zeros((0, to_text.shape[0]))
    return BlockMaps(
        torch.stack(to_words) if to_words else empty,
        torch.stack(from_words) if from_words else empty,
        from_patches,
        torch.stack(mass),
    )


# ---- While a picture is sampled


def block_names(patterns: Sequence[str] | None, depth: int, depth_single_blocks: int) -> list[str]:
    """The blocks that are meant (`double.3`, `single.*`), in depth order; None: all.

    Raises FluxIRError for a pattern that matches none.
    """
    every = [f"double.{n}" for n in range(depth)] + [f"single.{n}" for n in range(depth_single_blocks)]
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in every):
            raise FluxIRError(
                f"this model has {depth} double and {depth_single_blocks} single blocks, and none matches {pattern!r}",
                hint=f"the nearest are {nearest_names(pattern, every)}",
            )
    return [name for name in every if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)]


def attention_sites(blocks: Sequence[str], *, cond: bool = False) -> list[Site]:
    """The sites that maps of these blocks are made of: queries, then keys; `cond`: a reference's keys between them."""
    parts = ("q", "cond.k", "k") if cond else ("q", "k")
    return [Site.parse(f"{block}.{part}") for block in blocks for part in parts]


class AttentionSink:
    """A recorder's sink that makes maps of a block as soon as its keys come, and keeps nothing else.

        targets = MapTargets([Word("red", (2,))])
        with Recorder(model, attention_sites(["double.3", "single.0"]), AttentionSink(heads, targets, take)):
            ...

    `take(step, block, maps)` is called once for each block of a step. One picture at a time. A reference's keys must be
    recorded before those of text and image, as `attention_sites` lists them.
    """

    def __init__(
        self,
        heads: int,
        targets: MapTargets,
        take: Callable[[int, str, BlockMaps], None],
        *,
        keep_heads: bool = False,
    ) -> None:
        self.heads, self.targets, self.take, self.keep_heads = heads, targets, take, keep_heads
        self._q: Tokens | None = None
        self._cond_k: Tokens | None = None
        self._txt_tokens = 0

    def begin_step(self, step: int, context: StepContext) -> None:
        if context.img.shape[0] != 1:
            raise FluxIRError(
                f"attention maps are made of one picture at a time: got {context.img.shape[0]}",
                hint="sample prompts one by one",
            )
        self._txt_tokens = context.txt_tokens

    def write(self, step: int, site: Site, value: Tensor) -> None:
        if site.part == "q":
            self._q = value
            return
        if site.stream == "cond":
            self._cond_k = value
            return
        assert self._q is not None  # `attention_sites` has queries first, and so does the network
        q, k, cond_k = self._apart(self._q), self._apart(value), self._cond_k
        maps = block_maps(
            q,
            k,
            self.targets,
            self._txt_tokens,
            cond_k=None if cond_k is None else self._apart(cond_k),
            keep_heads=self.keep_heads,
        )
        self._q = self._cond_k = None
        self.take(step, f"{site.kind}.{site.block}", BlockMaps(*(part.cpu() for part in maps)))

    def _apart(self, value: Tokens) -> Heads:
        return rearrange(value, "b n (heads d) -> b heads n d", heads=self.heads).contiguous()
