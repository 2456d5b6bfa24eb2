"""CLIP's two towers (Radford et al., 2021): one reads text, one looks at pictures, both are the same kind of layers.

Names are those of the published checkpoints, without the `text_model.` and `vision_model.` that stand before them
there. Written here for the reason that `t5` gives, and with the same promise: transformers' operations in their order,
the same bits. Next: `text` loads the text tower, `clip` the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.t5 import blank_embedding
from flux_ir.shapes import Heads, Image, Pooled, TokenIds, Tokens


def quick_gelu(x: Tensor) -> Tensor:
    """The cheap approximation of GELU that OpenAI's CLIP was trained with (Hendrycks & Gimpel, 2016)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
_WRONG_END = 2


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

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    """The end of a text. Configurations written before 2023 say 2, which it never was: see `ClipText`."""


@dataclass(frozen=True)
class ClipVisionParams(ClipParams):
    """The shape of one picture tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    """Of both sides, in pixels."""
    patch_size: int = 32

    @property
    def patches(self) -> int:
        """How many a picture is cut into."""
        return (self.image_size // self.patch_size) ** 2


class ClipText(nn.Module):
    """Token numbers to one vector: the state of the end of the text, which has seen all that stands before it."""

    def __init__(self, params: ClipTextParams) -> None:
        super().__init__()
        self.params = params
        self.embeddings = TextEmbeddings(params)
        self.encoder = ClipLayers(params, params.num_hidden_layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)

    def forward(self, ids: TokenIds) -> Pooled:
        """The pooled vector of int64 token numbers, whose first end of text counts."""
        x = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        # With the wrong number in the configuration the end is known as the last token of the vocabulary.
        wrong = self.params.eos_token_id == _WRONG_END
        end = ids.argmax(dim=-1) if wrong else (ids == self.params.eos_token_id).int().argmax(dim=-1)
        return x[torch.arange(len(x), device=x.device), end]


class ClipPhrase(ClipText):
    """The whole text tower: texts in the space that CLIP's pictures and texts share."""

    def __init__(self, params: ClipTextParams, projection_dim: int) -> None:
        super().__init__(params)
        self.text_projection = nn.Linear(params.hidden_size, projection_dim, bias=False)

    def forward(self, ids: TokenIds) -> Pooled:
        """One vector per text, of any length: see `ClipPicture`."""
        return self.text_projection(super().forward(ids))


class TextEmbeddings(nn.Module):
    """Tokens and their positions."""

    def __init__(self, params: ClipTextParams) -> None:
        super().__init__()
        self.token_embedding = blank_embedding(params.vocab_size, params.hidden_size)
        self.position_embedding = blank_embedding(params.max_position_embeddings, params.hidden_size)

    def forward(self, ids: TokenIds) -> Tokens:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipVision(nn.Module):
    """The picture tower up to its last layer but one, which tells most about the parts of a picture."""

    def __init__(self, params: ClipVisionParams) -> None:
        super().__init__()
        self.params = params
        self.embeddings = PatchEmbeddings(params)
        self.pre_layrnorm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)  # so the checkpoints spell it
        self.encoder = ClipLayers(params, params.num_hidden_layers - 1, causal=False)

    def forward(self, pixels: Image) -> Tokens:
        """What the last layer would be given (`hidden_states[-2]`): the class token, then one token per patch.

        Raises FluxIRError for pictures of another size than the tower was trained on.
        """
        side = self.params.image_size
        if pixels.shape[-2:] != (side, side):
            height, width = pixels.shape[-2:]
            raise FluxIRError(
                f"CLIP's pictures must be {side} x {side} px: got {width} x {height}",
                hint="crop_size in preprocessor_config.json must be the image_size of config.json",
            )
        weight = self.pre_layrnorm.weight
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels.to(weight.device, weight.dtype))))


class ClipPicture(nn.Module):
    """The whole picture tower: pictures in the space that CLIP's pictures and texts share."""

    def __init__(self, params: ClipVisionParams, projection_dim: int) -> None:
        super().__init__()
        self.params = params
        self.embeddings = PatchEmbeddings(params)
        self.pre_layrnorm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)
        self.encoder = ClipLayers(params, params.num_hidden_layers, causal=False)
        self.post_layernorm = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)
        self.visual_projection = nn.Linear(params.hidden_size, projection_dim, bias=False)

    def forward(self, pixels: Image) -> Pooled:
        """One vector per picture, of any length: their cosines are what CLIP was trained on."""
        weight = self.pre_layrnorm.weight
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels.to(weight.device, weight.dtype))))
        return self.visual_projection(self.post_layernorm(tokens[:, 0]))


class PatchEmbeddings(nn.Module):
    """Patches and their positions, behind a class token."""

    def __init__(self, params: ClipVisionParams) -> None:
        super().__init__()
        dim, side = params.hidden_size, params.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(params.num_channels, dim, side, stride=side, bias=False)
        self.position_embedding = blank_embedding(1 + params.patches, dim)

    def forward(self, pixels: Image) -> Tokens:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        first = repeat(self.class_embedding, "d -> b 1 d", b=len(patches))
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


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
        self.self_attn = SelfAttention(params.hidden_size, params.num_attention_heads, causal=causal)
        self.layer_norm1 = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)
        self.mlp = FeedForward(params)
        self.layer_norm2 = nn.LayerNorm(params.hidden_size, params.layer_norm_eps)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
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


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[params.hidden_act]
        self.fc1 = nn.Linear(params.hidden_size, params.intermediate_size)
        self.fc2 = nn.Linear(params.intermediate_size, params.hidden_size)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(self.activation(self.fc1(x)))
