"""Weights into networks: strictly, tensor by tensor, from memory-mapped files straight to their device and dtype.

`locate` has found the files and `inspect` has checked that they fit; loading a network of 24 GB needs no second copy of
it. LoRAs are merged here, into each weight before it is rounded to its dtype: whoever reads weights has merged ones.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import AnyTransformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.headers import TensorEntry, read_tensor
from flux_ir.models.checkpoints.inspect import Part, WeightSource, blank_network, layout_parts
from flux_ir.models.checkpoints.lora.read import LoRA, merged_into
from flux_ir.models.flux1.transformer import FluxParams
from flux_ir.models.registry import ModelSpec
from flux_ir.models.sharded import ShardedFlux, current_device, own_part
from flux_ir.models.split import SplitFlux
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.streaming import HostMemory

Network = TypeVar("Network", bound=nn.Module)
Advance = Callable[[int], None]


def load_flux(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    loras: Sequence[LoRA] = (),
    blocks_on: Sequence[str] = (),
    advance: Advance | None = None,
) -> AnyTransformer:
    """The transformer with its LoRAs merged, ready to run.

    `blocks_on` are devices that its blocks are split over in place of `device`. `advance` is told the bytes read after
    each tensor (`source.nbytes` in all).
    """
    network = cast(AnyTransformer, _blank(spec, source, "transformer"))
    weights = Weights(network, source, loras)
    if blocks_on:
        parted = SplitFlux(flux1_params(spec, "--multi_gpu blocks"), blocks_on)
        return _filled(parted, weights, parted.device_of, dtype, advance)
    return _filled(network, weights, lambda name: device, dtype, advance)


def stream_flux(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    loras: Sequence[LoRA] = (),
    resident: Collection[int] = (),
    in_memory: bool = False,
) -> StreamedFlux:
    """The transformer with its blocks streamed from the file; those that are `resident` stay.

    LoRAs are merged whenever a block is read from the file: at every step, unless it is `resident` or `in_memory`.

    `in_memory`: what is streamed is read once and waits in host memory, for a GPU in pinned pages.
    """
    params = flux1_params(spec, "--offload blocks")
    fetch = Weights(_blank(spec, source, "transformer"), source, loras).read_into
    if in_memory:
        fetch = HostMemory(fetch, pinned=torch.device(device).type == "cuda").fetch
    return StreamedFlux(params, fetch, device, dtype, resident=resident)


def load_sharded_flux(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    ranks: int,
    loras: Sequence[LoRA] = (),
) -> ShardedFlux:
    """The transformer with its LoRAs merged and its blocks sharded over so many ranks, all of which call this.

    Every rank reads every weight, one after the other, and keeps its own part: none ever has the whole network.
    """
    device, params = torch.device(device), flux1_params(spec, "--fsdp")
    weights = Weights(_blank(spec, source, "transformer"), source, loras)
    with current_device(device):
        network = ShardedFlux(params, device, dtype, ranks)
        state: dict[str, Tensor] = {}
        for name, blank in network.state_dict().items():
            weight = torch.empty(blank.shape, dtype=dtype)
            weights.read_into(weight, name)
            state[name] = own_part(weight, blank, device)
    network.load_state_dict(state, strict=True, assign=True)
    network.requires_grad_(requires_grad=False)
    return network


def load_autoencoder(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    advance: Advance | None = None,
) -> AutoEncoder:
    """The autoencoder, ready to run; float32 as it is published."""
    network = cast(AutoEncoder, _blank(spec, source, "autoencoder"))
    return _filled(network, Weights(network, source), lambda name: device, dtype, advance)


def flux1_params(spec: ModelSpec, flag: str) -> FluxParams:
    """The shape of a transformer whose blocks can come and go. Raises FluxIRError for those of FLUX.2."""
    if not isinstance(spec.flux, FluxParams):
        raise FluxIRError(f"{flag} is for the blocks of FLUX.1, not for {spec.name}", hint=f"leave out {flag}")
    return spec.flux


def _blank(spec: ModelSpec, source: WeightSource, part: Part) -> AnyTransformer | AutoEncoder:
    if source.part != part:
        raise FluxIRError(f"a source of the {part} is needed: got the {source.part} in {source.path}")
    return blank_network(spec, part)


class Weights:
    """The weights of one network, by their names in it, with LoRAs merged; each is read when it is asked for."""

    def __init__(self, network: AnyTransformer | AutoEncoder, source: WeightSource, loras: Sequence[LoRA] = ()) -> None:
        self._source, self._loras = source, loras
        self._layout = layout_parts(source.layout, network)

    def nbytes(self, name: str) -> int:
        """Bytes that the files hold of a weight."""
        return sum(entry.nbytes for entry in self._entries(name))

    def read_into(self, target: Tensor, name: str) -> None:
        """Fill `target`, which has the shape of the weight, on its device and in its dtype."""

        def fill(weight: Tensor) -> None:
            self._layout[name].fill(weight, map(read_tensor, self._entries(name)))

        merged_into(target, name, self._loras, fill)

    def _entries(self, name: str) -> list[TensorEntry]:
        return [self._source.entries[part] for part in self._layout[name].names]


def _filled(
    network: Network,
    weights: Weights,
    device_of: Callable[[str], torch.device | str],
    dtype: torch.dtype,
    advance: Advance | None,
) -> Network:
    """The network with its weights in place of the meta tensors it was built of."""
    state: dict[str, Tensor] = {}
    for name, blank in network.state_dict().items():
        own = dtype if blank.is_floating_point() else blank.dtype  # a counter stays one
        state[name] = torch.empty(blank.shape, device=device_of(name), dtype=own)
        weights.read_into(state[name], name)
        if advance is not None:
            advance(weights.nbytes(name))
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)
