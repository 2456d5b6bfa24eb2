"""Attention probabilities of a few chosen tokens, exactly, without the matrix of all tokens against all.

A fused kernel that computes attention knows the log-sum-exp of every query's logits, lse_i = log sum_j exp(q_i k_j s)
with s = 1 / sqrt(head width). The probability that query i gives key c is then exp(q_i k_c s - lse_i): no second
softmax, and memory in proportion to tokens x chosen.

`AttentionMapper` watches the kernels of a network's blocks: where the kernel that PyTorch chooses gives its
log-sum-exp, the same call makes the picture and the maps, so the picture keeps its bits and nothing is computed twice.
Next: `words`, which says which keys are a word's.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from flux_ir.errors import FluxIRError
from flux_ir.maps.words import Word
from flux_ir.models.architecture import Transformer
from flux_ir.models.flux1.attention import Attention, AttentionWord, Kernel, attend
from flux_ir.models.flux1.blocks import DoubleStreamBlock, SingleStreamBlock
from flux_ir.models.suite import Suite
from flux_ir.recording.hooks import NOT_CALLED, StepHooks, TokenCounts, block_input, named
from flux_ir.shapes import Heads
from flux_ir.sites import Site, nearest_names

Lse = Float[Tensor, "batch heads tokens"]
Keys = Float[Tensor, "batch heads keys head_dim"]
Shares = Float[Tensor, "batch heads tokens keys"]
"""Of every query, how much of its attention it gives to each key."""
Output = Float[Tensor, "d heads head_dim"]
"""The output projection of a block's attention, by head."""

_LOGITS_AT_ONCE = 1 << 24
"""Logits of one chunk where a device's kernel gives no log-sum-exp: 64 MB in float32."""
_IN_CACHE = 1 << 16
"""Logits that a CPU works on together: 256 kB in float32, no more than a core's own cache."""
REGISTER_RATIO = 3.0
"""An image token is a register if it comes into a block with more than this many times the median norm. Darcet et al.
(ICLR 2024) cut DINOv2's at 3 times the usual norm, too: its registers have 5 to 10 times that."""


# ---- Exact probabilities


def attention_and_lse(q: Heads, k: Heads, v: Heads, kernel: AttentionWord = "auto") -> tuple[Heads, Lse]:
    """What `Kernel` of this name computes, to the bit, and log sum_j exp(q_i k_j / sqrt(head width)) of every query.

    One call of the flash kernel, where that is named or PyTorch's choice (on CPUs, and on CUDA in 16 bits with heads of
    8 to 256 channels). Elsewhere another makes the output, and logits are summed up chunk by chunk: as exact, and
    slower. The sums are float32.
    """
    ops = torch.ops.aten
    # Heads of at most 256 channels in multiples of 8: others are padded on CUDA before the kernel.
    by_choice = kernel == "auto" and torch._fused_sdp_choice(q, k, v) == SDPBackend.FLASH_ATTENTION.value
    if by_choice or kernel == "flash":
        if q.device.type == "cpu":
            out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            return out, lse.float()
        if q.device.type == "cuda" and q.shape[-1] % 8 == 0:
            out, lse = ops._scaled_dot_product_flash_attention(q, k, v)[:2]
            return out, lse[..., : q.shape[2]].float()
    return attend(q, k, v, kernel), log_sum_exp_in_chunks(q, k)


def log_sum_exp_in_chunks(q: Heads, k: Keys, logits_at_once: int = _LOGITS_AT_ONCE) -> Lse:
    """The log-sum-exp from the logits themselves, so many of them at a time: for kernels that do not give it."""
    rows = max(1, logits_at_once // (q.shape[0] * q.shape[1] * k.shape[2]))
    return torch.cat([_logits(part, k).logsumexp(dim=-1) for part in torch.split(q, rows, dim=2)], dim=2)


def probabilities(q: Heads, chosen_k: Keys, lse: Lse) -> Shares:
    """How much of its attention every query gives to each of the chosen keys: exp(q k s - lse).

    `lse` is the queries' own, over all keys. Of chosen queries and all keys it is the whole row of the softmax.
    """
    return _logits(q, chosen_k).sub_(lse[..., None]).exp_()


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


GROUPS = ("words", "other words", "end", "padding", "image", "registers", "reference")
"""What all tokens are divided into: the chosen words, the rest of the prompt with its punctuation, the end mark, the
padding, the image's own tokens, those of them that are registers (high norm), and those of a reference picture."""
_TEXT_GROUPS = 4


_WITHOUT_HEADS = ("value_to_words", "registers")


class BlockMaps(NamedTuple):
    """Maps of one block at one step, of one picture. With heads kept they have an axis more, in front."""

    to_words: Float[Tensor, "*heads words img"]
    """The share of its attention that each image token gives to a word: the sum over the word's tokens."""
    from_words: Float[Tensor, "*heads words img"]
    """The share of its attention that a word gives to each image token: the mean over the word's tokens."""
    from_patches: Float[Tensor, "*heads patches img"]
    """The share of its attention that a chosen image token gives to each image token."""
    to_groups: Float[Tensor, "*heads groups img"]
    """The share of its attention that each image token gives to each of `GROUPS`: adds up to 1."""
    value_to_words: Float[Tensor, "words img"]
    """The norm of what a word gives to each image token, || sum over heads and tokens of p W_out v ||: in the unit of
    the block's output, before the gate. All heads together, always."""
    registers: Float[Tensor, " img"]
    """1 where an image token is a register, else 0."""

    def mean_of_heads(self) -> "BlockMaps":
        """The same without the axis of heads that was kept."""
        of_heads = {name: maps.mean(dim=0) for name, maps in self._asdict().items() if name not in _WITHOUT_HEADS}
        return self._replace(**of_heads)


def block_maps(
    q: Heads,
    k: Heads,
    v: Heads,
    lse: Lse,
    output: Output,
    targets: MapTargets,
    tokens: TokenCounts,
    *,
    registers: Bool[Tensor, " img"] | None = None,
    keep_heads: bool = False,
) -> BlockMaps:
    """Maps of one picture from what a block's kernel is given: text, then image, then a reference picture.

    `output` is the projection of the image tokens' attention. `registers` says which image tokens are (None: none).
    Memory is in proportion to image tokens x (chosen tokens + groups).
    """
    img, text = slice(tokens.txt, tokens.txt + tokens.img), slice(tokens.txt)
    chosen = sorted({token for word in targets.words for token in word.tokens})
    places = [[chosen.index(token) for token in word.tokens] for word in targets.words]
    where = q.new_zeros(tokens.img, dtype=torch.bool) if registers is None else registers
    img_q, img_lse = q[:, :, img], lse[:, :, img]

    of_text = key_sums(img_q, k[:, :, text], img_lse, _members(targets, chosen, tokens.txt).to(q.device))
    to_tokens, of_groups = of_text[:, :, : len(chosen)], of_text[:, :, len(chosen) :]
    of_registers, of_reference = (
        key_sums(img_q, keys, img_lse, torch.ones(keys.shape[2], 1, device=q.device))
        for keys in (k[:, :, img][:, :, where], k[:, :, img.stop :])
    )
    of_image = 1 - of_groups.sum(dim=2, keepdim=True) - of_registers - of_reference
    to_groups = torch.cat([of_groups, of_image, of_registers, of_reference], dim=2)

    rows = chosen + [tokens.txt + patch for patch in targets.patches]
    from_rows = probabilities(q[:, :, rows], k[:, :, img], lse[:, :, rows])[0]  # [heads, chosen and patches, img]
    given = einsum(v[0, :, chosen].float(), output.float(), "heads n e, d heads e -> heads n d")
    none = to_tokens.new_zeros((q.shape[1], tokens.img))
    maps = BlockMaps(
        _stacked([to_tokens[:, :, at].sum(dim=2) for at in places], none),
        _stacked([from_rows[:, at].mean(dim=1) for at in places], none),
        from_rows[:, len(chosen) :],
        to_groups.mT,
        _stacked([_norms(to_tokens[:, :, at], given[:, at]) for at in places], none[0]),
        where.float(),
    )
    return maps if keep_heads else maps.mean_of_heads()


def key_sums(
    q: Heads, k: Keys, lse: Lse, columns: Float[Tensor, "keys columns"]
) -> Float[Tensor, "heads tokens columns"]:
    """Of every query of one picture, the sums over keys of their probabilities times each of the columns.

    So many logits at a time that a CPU finds them in its cache for all three steps, in one buffer: several times faster
    than passes over all of them. The log-sum-exp is one more channel, q k s - lse = [q s, -lse] [k, 1].
    """
    heads, count = q.shape[1], q.shape[2]
    sums = torch.zeros(heads, count, columns.shape[1], device=q.device)
    if not k.shape[2]:
        return sums
    scaled = torch.cat([q[0].float() / math.sqrt(q.shape[-1]), -lse[0, :, :, None]], dim=-1)
    keys = F.pad(k[0].float(), (0, 1), value=1.0).mT
    rows = min(count, max(1, (_IN_CACHE if q.device.type == "cpu" else _LOGITS_AT_ONCE) // k.shape[2]))
    buffer = torch.empty(rows, k.shape[2], device=q.device)
    for head in range(heads):
        for first in range(0, count, rows):
            part = scaled[head, first : first + rows]
            shares = torch.mm(part, keys[head], out=buffer[: len(part)]).exp_()
            torch.mm(shares, columns, out=sums[head, first : first + rows])
    return sums


def _members(targets: MapTargets, chosen: Sequence[int], txt_tokens: int) -> Float[Tensor, "txt columns"]:
    """A column for each chosen token, 1 at its own place, and one for each of the text's groups, 1 at its tokens."""
    groups = [set(chosen), set(), set(targets.end) - set(chosen), set(targets.padding) - set(chosen)]
    groups[1] = set(range(txt_tokens)).difference(*groups)
    assert len(groups) == _TEXT_GROUPS
    members = torch.zeros(txt_tokens, len(chosen) + _TEXT_GROUPS)
    for number, column in enumerate([*([token] for token in chosen), *groups]):
        members[sorted(column), number] = 1
    return members


def _stacked(maps: Sequence[Tensor], none: Tensor) -> Tensor:
    """Maps of each word as one tensor, also where there is no word: `none` has the shape of one of them."""
    return torch.stack(list(maps), dim=-2) if maps else none[..., None, :][..., :0, :]


def _norms(p: Float[Tensor, "heads img tokens"], u: Float[Tensor, "heads tokens d"]) -> Float[Tensor, " img"]:
    """|| sum over heads and tokens j of p_j u_j || of each image token: the norm of what it is given (Kobayashi et al.,
    2020), with u_j = W_out v_j.

    The square is p' G p with G_ij = u_i u_j: no vector as wide as the network is made for an image token. In float64,
    since where the parts cancel a difference of squares is left.
    """
    p, u = rearrange(p.double(), "heads img n -> img (heads n)"), rearrange(u.double(), "heads n d -> (heads n) d")
    return ((p @ (u @ u.mT)) * p).sum(dim=-1).clamp(min=0).sqrt().float()


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


def attention_sites(blocks: Sequence[str]) -> list[Site]:
    """The sites inside of blocks that maps of these blocks listen at."""
    return [Site.parse(f"{block}.k") for block in blocks]


class AttentionMapper(StepHooks):
    """Makes maps of the attention of blocks in every forward while its `with` lasts, and hands them on at once.

        targets = MapTargets([Word("red", (2,))])
        with AttentionMapper(model, ["double.3", "single.0"], targets, take):
            ...

    `take(step, block, maps)` is called once for each block at each of `steps` (None: all), with maps on the CPU. The
    velocity keeps its bits. One picture at a time; one mapper at a time. Raises FluxIRError for a compiled model.
    """

    name = "attention mapper"

    def __init__(
        self,
        model: Transformer | Suite,
        blocks: Sequence[str],
        targets: MapTargets,
        take: Callable[[int, str, BlockMaps], None],
        *,
        steps: Collection[int] | None = None,
        first_step: int = 0,
        keep_heads: bool = False,
    ) -> None:
        flux = model.flux if isinstance(model, Suite) else model
        super().__init__(flux, attention_sites(blocks), steps, first_step)
        self.targets, self.take, self.keep_heads = targets, take, keep_heads
        self._registers: Tensor | None = None

    def _hang(self, hooks: ExitStack) -> None:
        super()._hang(hooks)
        for site in self.sites:
            block = self.model.get_submodule(f"{site.kind}_blocks.{site.block}")
            attention = block.get_submodule("attention")
            assert isinstance(attention, Attention)
            hooks.callback(block.register_forward_pre_hook(_Entry(self, site), with_kwargs=True).remove)
            hooks.callback(setattr, attention, "kernel", attention.kernel)
            attention.kernel = _WatchedKernel(self, site, attention.kernel.name)
            # It does nothing: a block that has been compiled runs as it is written while a hook hangs inside of it.
            hooks.callback(attention.register_forward_hook(lambda *_: None).remove)

    def _begin_step(self, given: dict[str, Any]) -> None:
        if given["img"].shape[0] != 1:
            raise FluxIRError(
                f"attention maps are made of one picture at a time: got {given['img'].shape[0]}",
                hint="sample prompts one by one",
            )

    def _check_end(self) -> None:
        super()._check_end()
        if self._to_come:
            raise self._incomplete()

    def _incomplete(self) -> FluxIRError:
        return FluxIRError(f"step {self._step} did not come to {named(self._to_come)}", hint=NOT_CALLED)

    def find_registers(self, site: Site, entering: Tensor) -> None:
        """Called with what a block is called with: which image tokens have come to a high norm."""
        if self._active:
            first = self._tokens.txt if site.kind == "single" else 0
            self._registers = high_norm(entering[0, first : first + self._tokens.img])

    def map_block(self, site: Site, q: Heads, k: Heads, v: Heads, kernel: AttentionWord = "auto") -> Heads:
        """Called in the kernel's place: the attention, and on the way its maps."""
        if not self._active:
            return attend(q, k, v, kernel)
        out, lse = attention_and_lse(q, k, v, kernel)
        block = self.model.get_submodule(f"{site.kind}_blocks.{site.block}")
        output = output_weight(block, heads=q.shape[1])
        maps = block_maps(
            q,
            k,
            v,
            lse,
            output,
            self.targets,
            self._tokens,
            registers=self._registers,
            keep_heads=self.keep_heads,
        )
        self.take(self._step, f"{site.kind}.{site.block}", BlockMaps(*(part.cpu() for part in maps)))
        self._to_come.discard(site)
        return out


def high_norm(tokens: Float[Tensor, "img d"]) -> Bool[Tensor, " img"]:
    """Which tokens are registers: more than `REGISTER_RATIO` times the median norm."""
    norms = tokens.float().norm(dim=-1)
    return norms > REGISTER_RATIO * norms.median()


def output_weight(block: nn.Module, *, heads: int) -> Output:
    """The weights that a block's attention of the image passes on its way out."""
    if isinstance(block, DoubleStreamBlock):
        weight = block.img_attn.proj.weight
    else:
        assert isinstance(block, SingleStreamBlock)
        weight = block.linear2.weight[:, : block.qkv_dim // 3]  # its other columns are the feed-forward's
    return rearrange(weight, "d (heads e) -> d heads e", heads=heads)


class _Entry:
    """The hook before one block."""

    def __init__(self, mapper: AttentionMapper, site: Site) -> None:
        self._mapper, self._site = mapper, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._mapper.find_registers(self._site, block_input(self._site, args, kwargs))


class _WatchedKernel(Kernel):
    """Stands where a block's kernel does. It holds its mapper in a cell, so that no network becomes a part of it."""

    def __init__(self, mapper: AttentionMapper, site: Site, name: AttentionWord) -> None:
        super().__init__(name)
        self._watcher = (mapper, site)

    def forward(self, q: Heads, k: Heads, v: Heads) -> Heads:
        mapper, site = self._watcher
        return mapper.map_block(site, q, k, v, self.name)
