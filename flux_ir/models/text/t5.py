"""T5's encoder (Raffel et al., 2020), which gives every text token a vector. Names are those of the checkpoints.

FLUX.1 uses version 1.1 with gated feed-forwards (Shazeer, 2020). Written here because importing T5 from transformers
takes three times as long as PyTorch; every operation is transformers', in its order, so the vectors are the same to the
bit (`tests/models/text/test_oracle.py`). Next: `clip`, and `encoders`, which loads both.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.shapes import Heads, PositionBias, TokenIds, Tokens

GATED, UNGATED = "gated-gelu", "relu"
_ACTIVATIONS = {GATED: "gelu_new", UNGATED: "relu"}


@dataclass(frozen=True)
class T5Params:
    """The shape of one T5 encoder, as `config.json` says it; the defaults hold for what a file leaves out."""

    MODEL_TYPES: ClassVar = ("t5", "mt5")
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    """Channels of one attention head: the heads together may be wider than the tokens."""
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = UNGATED
    """`gated-gelu` in version 1.1, `relu` in the first."""
    dense_act_fn: str | None = None
    """The activation by its own name; None: that of `feed_forward_proj`."""
    is_decoder: bool = False
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        activation = _ACTIVATIONS.get(self.feed_forward_proj)
        if activation is None or self.dense_act_fn not in (None, activation):
            raise FluxIRError(
                f"feed_forward_proj must be {GATED} (with gelu_new) or {UNGATED}: got {self.feed_forward_proj}"
                + (f" with {self.dense_act_fn}" if self.dense_act_fn else "")
            )
        object.__setattr__(self, "dense_act_fn", activation)
        if self.is_decoder:
            raise FluxIRError("is_decoder must be false: an encoder looks at the whole text")


class T5Encoder(nn.Module):
    """Token numbers to vectors. No mask: FLUX.1 was trained on text whose padding is attended to."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.params = params
        self.shared = blank_embedding(params.vocab_size, params.d_model)
        self.encoder = T5Stack(params)

    def forward(self, ids: TokenIds) -> Tokens:
        """The vectors of the last layer, normalised, of int64 token numbers."""
        return self.encoder(self.shared(ids))

    def embed(self, ids: TokenIds) -> Tokens:
        """What the first layer is given."""
        return self.shared(ids)

    def read_out(self, hidden: Tokens, ids: TokenIds) -> Tokens:
        """What the encoder would give if it stopped at the layer that puts out `hidden`: its last norm is applied."""
        return self.encoder.final_layer_norm(hidden)


class T5Stack(nn.Module):
    """The blocks. All add the first one's position bias to their attention scores."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(params, has_position_bias=i == 0) for i in range(params.num_layers))
        self.final_layer_norm = T5RMSNorm(params.d_model, params.layer_norm_epsilon)

    def forward(self, x: Tokens) -> Tokens:
        first: Any = self.block[0]
        bias = first.layer[0].SelfAttention.position_bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Block(nn.Module):
    """Self-attention, then the feed-forward, each added to what it was given."""

    def __init__(self, params: T5Params, *, has_position_bias: bool) -> None:
        super().__init__()
        attention = AttentionBranch(params, has_position_bias=has_position_bias)
        self.layer = nn.ModuleList([attention, FeedForwardBranch(params)])

    def forward(self, x: Tokens, bias: PositionBias) -> Tokens:
        attention, feed_forward = self.layer
        x = x + attention(x, bias)
        return x + feed_forward(x)


class AttentionBranch(nn.Module):
    """Norm and self-attention."""

    def __init__(self, params: T5Params, *, has_position_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5SelfAttention(params, has_position_bias=has_position_bias)
        self.layer_norm = T5RMSNorm(params.d_model, params.layer_norm_epsilon)

    def forward(self, x: Tokens, bias: PositionBias) -> Tokens:
        return self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardBranch(nn.Module):
    """Norm and feed-forward."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        gated = params.feed_forward_proj == GATED
        self.DenseReluDense = T5GatedFeedForward(params) if gated else T5FeedForward(params)
        self.layer_norm = T5RMSNorm(params.d_model, params.layer_norm_epsilon)

    def forward(self, x: Tokens) -> Tokens:
        return self.DenseReluDense(self.layer_norm(x))


class T5SelfAttention(nn.Module):
    """Attention whose scores are not divided by the root of the head's width: T5's weights have that factor in them."""

    def __init__(self, params: T5Params, *, has_position_bias: bool) -> None:
        super().__init__()
        inner = params.num_heads * params.d_kv
        self.num_heads, self.max_distance = params.num_heads, params.relative_attention_max_distance
        self.q = nn.Linear(params.d_model, inner, bias=False)
        self.k = nn.Linear(params.d_model, inner, bias=False)
        self.v = nn.Linear(params.d_model, inner, bias=False)
        self.o = nn.Linear(inner, params.d_model, bias=False)
        if has_position_bias:
            self.relative_attention_bias = blank_embedding(params.relative_attention_num_buckets, params.num_heads)

    def forward(self, x: Tokens, bias: PositionBias) -> Tokens:
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(out, "b heads n d -> b n (heads d)"))

    def position_bias(self, tokens: int) -> PositionBias:
        """What every head adds to the score of a query and a key, by how far the key is from the query."""
        table = self.relative_attention_bias
        position = torch.arange(tokens, device=table.weight.device)
        buckets = distance_buckets(position[None, :] - position[:, None], table.num_embeddings, self.max_distance)
        # Contiguous, because the attention kernels of some devices are slower on a transposed mask.
        return rearrange(table(buckets), "query key heads -> 1 heads query key").contiguous()

    def _heads(self, x: Tensor) -> Heads:
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads)


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """int64: the bucket of each signed distance from query to key [tokens]; half of the buckets lie on either side.

    On one side half are one distance each and the other half grow logarithmically; the last one takes `max_distance`
    and all beyond it (Raffel et al., 2020, section 2.1).
    """
    side = buckets // 2
    exact = side // 2
    size = distance.abs()
    growth = torch.log(size.float() / exact) / math.log(max_distance / exact)  # -inf at 0, which is not looked at
    logarithmic = (exact + (growth * (side - exact)).long()).clamp(max=side - 1)
    return (distance > 0) * side + torch.where(size < exact, size, logarithmic)


def blank_embedding(count: int, dim: int) -> nn.Embedding:
    """A vector of `dim` for each of `count` numbers, not drawn at random: they come from a file.

    `nn.Embedding` draws normal numbers, and doing so without memory (on the meta device) imports torch's compiler and
    sympy: three seconds, for nothing.
    """
    return nn.Embedding.from_pretrained(torch.empty(count, dim), freeze=False)  # type: ignore[no-untyped-call]


class T5FeedForward(nn.Module):
    """Linear, ReLU, linear: the first T5."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.wi = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wo = nn.Linear(params.d_ff, params.d_model, bias=False)

    def forward(self, x: Tokens) -> Tokens:
        return self.wo(F.relu(self.wi(x)))


class T5GatedFeedForward(nn.Module):
    """A linear layer gated by the GELU of another, and a linear layer: version 1.1 (Shazeer, 2020, "GEGLU")."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wi_1 = nn.Linear(params.d_model, params.d_ff, bias=False)
        self.wo = nn.Linear(params.d_ff, params.d_model, bias=False)

    def forward(self, x: Tokens) -> Tokens:
        return self.wo(gelu_new(self.wi_0(x)) * self.wi_1(x))


def gelu_new(x: Tensor) -> Tensor:
    """GELU by its tanh formula (Hendrycks & Gimpel, 2016), each operation rounded to the dtype of `x`.

    `F.gelu(x, approximate="tanh")` rounds once, at the end: in bfloat16 its bits are not those of transformers.
    """
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class T5RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), the mean taken in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tokens) -> Tokens:
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)
