"""CLIP's text encoder (Radford et al., 2021), whose pooled vector tells the transformer of the whole prompt.

Names are those of the checkpoints. Written here for the reason that `t5` gives, and with the same promise: the
operations of transformers in their order, the same bits. The layers serve CLIP's picture half as well
(`flux_ir.models.clip`). Next: `encoders`, which loads both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.text.t5 import blank_embedding
from flux_ir.shapes import Heads, Pooled, TokenIds, Tokens


def quick_gelu(x: Tensor) -> Tensor:
    """The cheap approximation of GELU that OpenAI's CLIP was trained with (Hendrycks & Gimpel, 2016)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
_WRONG_END = 2  # what `ClipTextParams.eos_token_id` says in old configurations


@dataclass(frozen=True)
class ClipParams:
    """The shape of the layers of one tower, as `config.json` says it; the defaults hold for what a file leaves out."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise FluxIRError(
                "hidden_size must be a multiple of num_attention_heads: "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise FluxIRError(f"hidden_act must be {' or '.join(_ACTIVATIONS)}: got {self.hidden_act}")


@dataclass(frozen=True)
class ClipTextParams(ClipParams):
    """The shape of one text tower."""

    MODEL_TYPES: ClassVar = ("clip_text_model", "clip")
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    """The end of a text. Configurations written before 2023 say 2, which it never was: see `ClipText`."""


class ClipText(nn.Module):
    """Token numbers to one vector: the state of the end of the text, which has seen all that stands before it."""

    def __init__(self, params: ClipTextParams) -> None:
        super().__init__()
        self.params = params
        self.text_model = TextTower(params)

    def forward(self, ids: TokenIds) -> Pooled:
        """The pooled vector of int64 token numbers, whose first end of text counts."""
        return self._pool(self.text_model(ids), ids)

    def embed(self, ids: TokenIds) -> Tokens:
        """What the first layer is given."""
        return self.text_model.embeddings(ids)

    def read_out(self, hidden: Tokens, ids: TokenIds) -> Pooled:
        """What the encoder would give if it stopped at the layer that puts out `hidden`: its last norm is applied."""
        return self._pool(self.text_model.final_layer_norm(hidden), ids)

    def _pool(self, x: Tokens, ids: TokenIds) -> Pooled:
        # With the wrong number in the configuration the end is known as the last token of the vocabulary.
        wrong = self.params.eos_token_id == _WRONG_END
        end = ids.argmax(dim=-1) if wrong else (ids == self.params.eos_token_id).int().argmax(dim=-1)
        return x[torch.arange(len(x), device=x.device), end]


class ClipPhrase(ClipText):
    """CLIP's text half with its projection: texts as vectors of the space that pictures and texts share.

    transformers calls it CLIPTextModelWithProjection. FLUX.1 does not use it: labels of features do.
    """

    def __init__(self, params: ClipTextParams, projection_dim: int) -> None:
        super().__init__(params)
        self.text_projection = nn.Linear(params.hidden_size, projection_dim, bias=False)

    def forward(self, ids: TokenIds) -> Pooled:
        """One vector per text, not normalised: see `flux_ir.models.clip.ClipPicture`."""
        return self.text_projection(super().forward(ids))


class TextTower(nn.Module):
    """Token numbers to a vector per token, which knows of the tokens before it alone."""

    def __init__(self, params: ClipTextParams) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(params)
        self.encoder = ClipLayers(params, params.num_hidden_layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)

    def forward(self, ids: TokenIds) -> Tokens:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class TextEmbeddings(nn.Module):
    """Tokens and their positions."""

    def __init__(self, params: ClipTextParams) -> None:
        super().__init__()
        self.token_embedding = blank_embedding(params.vocab_size, params.hidden_size)
        self.position_embedding = blank_embedding(params.max_position_embeddings, params.hidden_size)

    def forward(self, ids: TokenIds) -> Tokens:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipLayers(nn.Module):
    """Transformer layers one after the other. `causal`: no token sees a later one."""

    def __init__(self, params: ClipParams, count: int, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(params, causal=causal) for _ in range(count))

    def forward(self, x: Tokens) -> Tokens:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipLayer(nn.Module):
    """Self-attention, then the feed-forward, each behind a norm and added to what it was given."""

    def __init__(self, params: ClipParams, *, causal: bool) -> None:
        super().__init__()
        self.self_attn = ClipSelfAttention(params.hidden_size, params.num_attention_heads, causal=causal)
        self.layer_norm1 = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)
        self.mlp = ClipFeedForward(params)
        self.layer_norm2 = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipSelfAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al., 2017)."""

    def __init__(self, dim: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(out, "b heads n d -> b n (heads d)"))

    def _heads(self, x: Tensor) -> Heads:
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads)


class ClipFeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[params.hidden_act]
        self.fc1 = nn.Linear(params.hidden_size, params.intermediate_size)
        self.fc2 = nn.Linear(params.intermediate_size, params.hidden_size)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(self.activation(self.fc1(x)))
