"""What the rest of the program relies on in a transformer: the seam through which every architecture comes.

Sampling, recorders, interventions, lenses, maps and SAEs take a `Transformer`. Beside what is written here two things
hold: a site is the output of the module that `recording.hooks.module_of` names, and double blocks are called with
`(img, txt, ...)` and put out that pair, single blocks with text and image in one sequence. Which architecture a shape
belongs to is known here and nowhere else outside of `checkpoints`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flux_ir.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux_ir.models.flux1.blocks import ModulationOut
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.flux2.autoencoder import Flux2AutoEncoder, Flux2AutoEncoderParams
from flux_ir.models.flux2.transformer import Flux2, Flux2Params
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


@runtime_checkable
class TransformerParams(Protocol):
    """The shape of one transformer, as far as others read it."""

    @property
    def in_channels(self) -> int:
        """Numbers of an image token: a packed latent's."""

    @property
    def context_in_dim(self) -> int:
        """Width of a text token as it is given."""

    @property
    def vec_in_dim(self) -> int:
        """Width of the pooled text; 0: there is none, and `y` has no columns."""

    @property
    def hidden_size(self) -> int:
        """Width of a token in the blocks."""

    @property
    def mlp_ratio(self) -> float:
        """Feed-forward neurons of a token, in units of its width."""

    @property
    def num_heads(self) -> int:
        """Heads of every attention."""

    @property
    def head_dim(self) -> int:
        """Channels of one of them."""

    @property
    def depth(self) -> int:
        """Double blocks."""

    @property
    def depth_single_blocks(self) -> int:
        """Single blocks."""

    @property
    def axes_dim(self) -> Sequence[int]:
        """Rotary channels of each axis of a position."""

    @property
    def theta(self) -> int:
        """The base of the rotary angles."""

    @property
    def guidance_embed(self) -> bool:
        """Whether the network takes a guidance strength."""


@runtime_checkable
class Transformer(Protocol):
    """Predicts the velocity d(latent)/dt of packed image tokens, given text: a `torch.nn.Module`."""

    @property
    def params(self) -> TransformerParams:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which is also the dtype of every block's output."""

    @property
    def img_in(self) -> nn.Linear:
        """Brings image tokens to the width of the blocks. The sampler's state is on its device."""

    @property
    def txt_in(self) -> nn.Linear:
        """The same for text tokens."""

    @property
    def guidance_in(self) -> nn.Module | None:
        """Embeds a guidance strength; None: the model takes none."""

    def conditioning(self, timesteps: PerSample, y: Pooled, guidance: PerSample | None = None) -> Conditioning:
        """The vector that modulates every block. The forward pass must call it, so that a lens cannot drift from it."""

    def read_out(self, img: ImgTokens, vec: Conditioning) -> Velocity:
        """The velocity that image tokens stand for. The forward pass must call it, of the image tokens alone."""

    def modulation(self, site: Site, vec: Conditioning) -> Sequence[ModulationOut]:
        """What `vec` does to the branches of the site's block: to attention, then feed-forward, of one stream of a
        double block; to both together of a single block.
        """

    def twin(self) -> "Transformer":
        """Another network with the same weights in the same memory, and no hooks."""

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
        """The velocity of the image tokens. Hooks read its arguments by these names."""

    # What is used of `torch.nn.Module`.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `forward`, with every hook."""

    def get_submodule(self, target: str) -> nn.Module: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle: ...


AnyParams = FluxParams | Flux2Params
AnyTransformer = Flux | Flux2
_NETWORKS: Mapping[type, type[AnyTransformer]] = {FluxParams: Flux, Flux2Params: Flux2}


def transformer_of(params: AnyParams) -> AnyTransformer:
    """A network of this shape, with weights that mean nothing yet."""
    return _NETWORKS[type(params)](params)  # type: ignore[arg-type]


def autoencoder_of(params: AutoEncoderParams) -> AutoEncoder:
    """The same for an autoencoder."""
    return Flux2AutoEncoder(params) if isinstance(params, Flux2AutoEncoderParams) else AutoEncoder(params)


def block_names(params: TransformerParams) -> list[str]:
    """The names of the blocks in depth order."""
    double = [f"double_blocks.{number}" for number in range(params.depth)]
    return double + [f"single_blocks.{number}" for number in range(params.depth_single_blocks)]
