"""Weights into networks: strictly, tensor by tensor, from memory-mapped files straight to their device and dtype.

`locate` has found the files and `inspect` has checked that they fit; loading a network of 24 GB needs no second copy of
it.
"""

from collections.abc import Callable, Collection
from typing import TypeVar, cast

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.headers import TensorEntry, read_tensor
from flux_ir.models.checkpoints.inspect import Part, WeightSource, blank_network, layout_parts
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import ModelSpec
from flux_ir.models.streaming import HostMemory, StreamedFlux

Network = TypeVar("Network", Flux, AutoEncoder)
Advance = Callable[[int], None]


def load_flux(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    advance: Advance | None = None,
) -> Flux:
    """The transformer, ready to run. `advance` is told the bytes read after each tensor (`source.nbytes` in all)."""
    return _filled(cast(Flux, _blank(spec, source, "transformer")), source, device, dtype, advance)


def stream_flux(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    resident: Collection[int] = (),
    in_memory: bool = False,
) -> StreamedFlux:
    """The transformer with its blocks streamed from the file; those that are `resident` stay.

    `in_memory`: what is streamed is read once and waits in host memory, for a GPU in pinned pages.
    """
    fetch = Weights(_blank(spec, source, "transformer"), source).read_into
    if in_memory:
        fetch = HostMemory(fetch, pinned=torch.device(device).type == "cuda").fetch
    return StreamedFlux(spec.flux, fetch, device, dtype, resident=resident)


def load_autoencoder(
    spec: ModelSpec,
    source: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    advance: Advance | None = None,
) -> AutoEncoder:
    """The autoencoder, ready to run; float32 as it is published."""
    return _filled(cast(AutoEncoder, _blank(spec, source, "autoencoder")), source, device, dtype, advance)


def _blank(spec: ModelSpec, source: WeightSource, part: Part) -> Flux | AutoEncoder:
    if source.part != part:
        raise FluxIRError(f"a source of the {part} is needed: got the {source.part} in {source.path}")
    return blank_network(spec, part)


class Weights:
    """The weights of one network, by their names in it; each is read when it is asked for."""

    def __init__(self, network: Flux | AutoEncoder, source: WeightSource) -> None:
        self._source = source
        self._layout = layout_parts(source.layout, network)

    def nbytes(self, name: str) -> int:
        """Bytes that the files hold of a weight."""
        return sum(entry.nbytes for entry in self._entries(name))

    def read_into(self, target: Tensor, name: str) -> None:
        """Fill `target`, which has the shape of the weight, on its device and in its dtype."""
        self._layout[name].fill(target, map(read_tensor, self._entries(name)))

    def _entries(self, name: str) -> list[TensorEntry]:
        return [self._source.entries[part] for part in self._layout[name].names]


def _filled(
    network: Network, source: WeightSource, device: torch.device | str, dtype: torch.dtype, advance: Advance | None
) -> Network:
    """The network with its weights in place of the meta tensors it was built of."""
    weights = Weights(network, source)
    state: dict[str, Tensor] = {}
    for name, blank in network.state_dict().items():
        state[name] = torch.empty(blank.shape, device=device, dtype=dtype)
        weights.read_into(state[name], name)
        if advance is not None:
            advance(weights.nbytes(name))
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)
