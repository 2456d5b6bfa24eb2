"""FLUX.2's transformer. Names of modules are those of the published checkpoints.

The reference is Black Forest Labs' FLUX.2 (2025). It is called as `flux1.transformer.Flux` is, and what it computes
stands at the same sites. It has no pooled text: `y` has no columns. Depth and widths always come from `Flux2Params`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.attention import kernel_of, rotary_table, use_kernel
from flux_ir.models.flux1.blocks import (
    TIME_CHANNELS,
    LastLayer,
    MLPEmbedder,
    Modulation,
    ModulationOut,
    timestep_embedding,
)
from flux_ir.models.flux2.blocks import DoubleStreamBlock, SingleStreamBlock
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
class Flux2Params:
    """The shape of one transformer. `axes_dim` are the rotary channels per position axis: reference picture, row,
    column, place in the text.
    """

    in_channels: int
    context_in_dim: int
    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    guidance_embed: bool
    mlp_ratio: float = 3.0
    axes_dim: Sequence[int] = (32, 32, 32, 32)
    theta: int = 2000

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
                hint="for a head of 128 channels FLUX.2 uses (32, 32, 32, 32)",
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Values of a token's velocity: as many as the token has."""
        return self.in_channels

    @property
    def vec_in_dim(self) -> int:
        """Width of the pooled text: there is none."""
        return 0


class Flux2(nn.Module):
    """Predicts the velocity d(latent)/dt of image tokens, given text. Holds no device logic."""

    def __init__(self, params: Flux2Params) -> None:
        super().__init__()
        self.params = params
        dim = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, dim, bias=False)
        self.time_in = MLPEmbedder(TIME_CHANNELS, dim, bias=False)
        self.guidance_in = MLPEmbedder(TIME_CHANNELS, dim, bias=False) if params.guidance_embed else None
        self.txt_in = nn.Linear(params.context_in_dim, dim, bias=False)
        self.double_stream_modulation_img = Modulation(dim, double=True, bias=False)
        self.double_stream_modulation_txt = Modulation(dim, double=True, bias=False)
        self.single_stream_modulation = Modulation(dim, double=False, bias=False)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(dim, params.num_heads, params.mlp_ratio) for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, params.num_heads, params.mlp_ratio) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(dim, params.out_channels, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which is also the dtype of every block's output."""
        return self.img_in.weight.dtype

    def conditioning(self, timesteps: PerSample, y: Pooled, guidance: PerSample | None = None) -> Conditioning:
        """The vector that modulates every block: flow time and, for models that are distilled from guidance, guidance.

        `y` has no columns and says nothing. Raises FluxIRError if a guidance-distilled model gets no guidance.
        """
        vec = self.time_in(timestep_embedding(timesteps))
        if self.guidance_in is None:
            return vec
        if guidance is None:
            raise FluxIRError(
                "this model is guidance-distilled (guidance_embed) and needs a guidance strength: got None",
                hint="pass a value such as 4",
            )
        return vec + self.guidance_in(timestep_embedding(guidance))

    def read_out(self, img: ImgTokens, vec: Conditioning) -> Velocity:
        """The velocity [latent units per unit of flow time] that these image tokens stand for under `vec`."""
        return self.final_layer(img, vec)

    def modulation(self, site: Site, vec: Conditioning) -> Sequence[ModulationOut]:
        """What `vec` does to the branches of the site's block: to attention, then feed-forward, of one stream of a
        double block; to both together of a single block. It is the same in all blocks of a kind.
        """
        if site.kind == "single":
            return self.single_stream_modulation(vec)
        return (self.double_stream_modulation_txt if site.stream == "txt" else self.double_stream_modulation_img)(vec)

    def twin(self) -> "Flux2":
        """Another network with the same weights in the same memory, and no hooks."""
        with torch.device("meta"):
            twin = Flux2(self.params)
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
        """The velocity of the image tokens. `cond` are the tokens of reference pictures, one picture after the other:
        they stand behind the image's in every block, are never noised, and have no velocity.
        """
        img_tokens = img.shape[1]
        if cond is not None:
            if cond_ids is None:
                raise FluxIRError("the tokens of a reference picture need their positions", hint="pass cond_ids")
            img, img_ids = torch.cat([img, cond], dim=1), torch.cat([img_ids, cond_ids], dim=1)
        vec = self.conditioning(timesteps, y, guidance)
        # Once for all blocks, which are modulated alike and see the same positions.
        img_mod, txt_mod = self.double_stream_modulation_img(vec), self.double_stream_modulation_txt(vec)
        single_mod = self.single_stream_modulation(vec)
        rotation = rotary_table(torch.cat([txt_ids, img_ids], dim=1), self.params.axes_dim, self.params.theta)
        img = self.img_in(img)
        txt = self.txt_in(txt)
        for double_block in self.double_blocks:
            img, txt = double_block(img, txt, img_mod, txt_mod, rotation)
        x = torch.cat([txt, img], dim=1)
        for single_block in self.single_blocks:
            x = single_block(x, single_mod, rotation)
        # Of the image tokens alone, as a lens reads them: more rows could round in another way.
        first = txt.shape[1]
        return self.read_out(x[:, first : first + img_tokens], vec)
