"""FLUX.1's transformer. Names of modules and of params fields are those of the published checkpoints.

The reference is Black Forest Labs' FLUX.1 (2024). Depth, widths and names always come from `FluxParams`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.attention import kernel_of, rotary_table, use_kernel
from flux_ir.models.flux1.blocks import (
    TIME_CHANNELS,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    ModulationOut,
    SingleStreamBlock,
    timestep_embedding,
)
from flux_ir.shapes import (
    CondIds,
    Conditioning,
    CondLatent,
    Context,
    ImgIds,
    ImgTokens,
    PackedLatent,
    PerSample,
    Pooled,
    TxtIds,
    Velocity,
)
from flux_ir.sites import Site


@dataclass(frozen=True)
class FluxParams:
    """The shape of one transformer. `axes_dim` are the rotary channels per position axis (index, row, column)."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: Sequence[int]
    theta: int
    qkv_bias: bool
    guidance_embed: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))  # JSON gives lists; a tuple can be hashed
        if self.hidden_size % self.num_heads:
            raise FluxIRError(
                f"hidden_size must be a multiple of num_heads: got {self.hidden_size} and {self.num_heads}",
                hint="change one of the two",
            )
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise FluxIRError(
                f"axes_dim must be even and add up to the head width {self.head_dim}: got {self.axes_dim}",
                hint="for a head of 128 channels FLUX.1 uses (16, 56, 56)",
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


class Flux(nn.Module):
    """Predicts the velocity d(latent)/dt of packed image tokens, given text. Holds no device logic."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        dim = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, dim)
        self.time_in = MLPEmbedder(TIME_CHANNELS, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(TIME_CHANNELS, dim) if params.guidance_embed else None
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(dim, params.num_heads, params.mlp_ratio, qkv_bias=params.qkv_bias)
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, params.num_heads, params.mlp_ratio) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(dim, params.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which is also the dtype of every block's output."""
        return self.img_in.weight.dtype

    def conditioning(self, timesteps: PerSample, y: Pooled, guidance: PerSample | None = None) -> Conditioning:
        """The vector that modulates every block: flow time, pooled text and, for distilled models, guidance.

        Raises FluxIRError if a guidance-distilled model gets no guidance.
        """
        vec = self.time_in(timestep_embedding(timesteps))
        if self.guidance_in is not None:
            if guidance is None:
                raise FluxIRError(
                    "this model is guidance-distilled (guidance_embed) and needs a guidance strength: got None",
                    hint="pass a value such as 2.5",
                )
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        return vec + self.vector_in(y)

    def read_out(self, img: ImgTokens, vec: Conditioning) -> Velocity:
        """The velocity [latent units per unit of flow time] that these image tokens stand for under `vec`."""
        return self.final_layer(img, vec)

    def modulation(self, site: Site, vec: Conditioning) -> Sequence[ModulationOut]:
        """What `vec` does to the branches of the site's block: to attention, then feed-forward, of one stream of a
        double block; to both together of a single block.
        """
        layer = "modulation" if site.kind == "single" else "txt_mod" if site.stream == "txt" else "img_mod"
        return self.get_submodule(f"{site.kind}_blocks.{site.block}.{layer}")(vec)

    def twin(self) -> "Flux":
        """Another network with the same weights in the same memory, and no hooks."""
        with torch.device("meta"):
            twin = Flux(self.params)
        twin.load_state_dict(self.state_dict(), assign=True)
        return use_kernel(twin, kernel_of(self))

    def forward(
        self,
        img: PackedLatent,
        img_ids: ImgIds,
        txt: Context,
        txt_ids: TxtIds,
        timesteps: PerSample,
        y: Pooled,
        guidance: PerSample | None = None,
        cond: CondLatent | None = None,
        cond_ids: CondIds | None = None,
    ) -> Velocity:
        """The velocity of the image tokens. `cond` are the tokens of a reference picture (Kontext): they stand behind
        the image's in every block, are never noised, and have no velocity.
        """
        img_tokens = img.shape[1]
        if cond is not None:
            if cond_ids is None:
                raise FluxIRError("the tokens of a reference picture need their positions", hint="pass cond_ids")
            img, img_ids = torch.cat([img, cond], dim=1), torch.cat([img_ids, cond_ids], dim=1)
        vec = self.conditioning(timesteps, y, guidance)
        # Once for all blocks, which see the same positions: text, then image, as they stand in every joint attention.
        rotation = rotary_table(torch.cat([txt_ids, img_ids], dim=1), self.params.axes_dim, self.params.theta)
        img = self.img_in(img)
        txt = self.txt_in(txt)
        for double_block in self.double_blocks:
            img, txt = double_block(img, txt, vec, rotation)
        x = torch.cat([txt, img], dim=1)
        for single_block in self.single_blocks:
            x = single_block(x, vec, rotation)
        # Of the image tokens alone, as a lens reads them: more rows could round in another way.
        first = txt.shape[1]
        return self.read_out(x[:, first : first + img_tokens], vec)
