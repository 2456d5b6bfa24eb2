"""A transformer whose blocks are on several devices of one process: a contiguous run of them on each.

The runs are settled by arithmetic alone, so that the largest share of the weights is as small as can be. Only one of
the devices works on a picture at a time; `collecting.batches` keeps as many batches under way as there are devices.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flux_ir.models.architecture import AnyParams, block_names, transformer_of
from flux_ir.models.flux1.attention import kernel_of, use_kernel
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.memory import elements
from flux_ir.models.placement import Placement
from flux_ir.shapes import Velocity


class Run(NamedTuple):
    """Consecutive blocks on one device, numbered over double and single ones."""

    device: str
    blocks: range
    elements: int
    """Numbers in the weights that the device holds: the layers before and after the blocks count where they are."""


def runs_of(params: AnyParams, devices: Sequence[str]) -> tuple[Run, ...]:
    """One run of blocks for each device, in depth order, with the largest share of the weights as small as can be.

    The first device also has the layers before the blocks, and the last one the final layer. With more devices than
    blocks those at the end have nothing.
    """
    before, after = _outside(params)
    loads = list(elements(params).blocks)
    loads[0] += before
    loads[-1] += after
    ends = _even_ends(loads, min(len(devices), len(loads)))
    blocks = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    return tuple(Run(device, run, sum(loads[i] for i in run)) for device, run in zip(devices, blocks, strict=False))


@cache
def _outside(params: AnyParams) -> tuple[int, int]:
    """Numbers in the layers before the blocks, and in the final layer."""
    with torch.device("meta"):
        final_layer = transformer_of(params).final_layer
    after = sum(parameter.numel() for parameter in final_layer.parameters())
    return elements(params).outside - after, after


def _even_ends(loads: Sequence[int], count: int) -> list[int]:
    """Where each of `count` contiguous runs ends. The largest sum is the least possible; then they are even."""
    upto = [0, *accumulate(loads)]
    # best[end]: of the ways to cut the first `end` loads into so many runs, the best one's costs and ends.
    best = {end: ((load, load**2), [end]) for end, load in enumerate(upto) if end}
    for runs in range(2, count + 1):
        longer = {}
        for end in range(runs, len(upto)):
            ways = []
            for cut in range(runs - 1, end):
                (largest, squares), ends = best[cut]
                last = upto[end] - upto[cut]
                ways.append(((max(largest, last), squares + last**2), [*ends, end]))
            longer[end] = min(ways)
        best = longer
    return best[len(loads)][1]


def with_parts_beside(placement: Placement, params: AnyParams) -> Placement:
    """The placement with text encoders and autoencoder on the device that has the smallest share of the blocks."""
    if not placement.blocks:
        return placement
    shares = dict.fromkeys(placement.blocks, 0) | {
        run.device: run.elements for run in runs_of(params, placement.blocks)
    }
    device = min(shares, key=lambda each: shares[each])
    return replace(placement, t5=device, clip=device, ae_encoder=device, ae_decoder=device)


class SplitFlux(Flux):
    """FLUX's transformer with runs of its blocks on several devices. It is called, hooked and read as any `Flux`.

    It is made without weights, on the meta device: `device_of` says where each belongs. Inputs are given, and the
    velocity comes, where `img_in` is; a block's output is on the block's device.
    """

    def __init__(self, params: FluxParams, devices: Sequence[str]) -> None:
        with torch.device("meta"):
            super().__init__(params)
        self.requires_grad_(requires_grad=False).eval()
        self.devices = tuple(devices)
        self.runs = runs_of(params, devices)
        names, copies = block_names(params), _Copies()
        self._device_of = {names[number]: run.device for run in self.runs for number in run.blocks}
        self._device_of["final_layer"] = self.runs[-1].device
        for name, device in self._device_of.items():
            streams = 2 if name.startswith("double") else 1
            self.get_submodule(name).register_forward_pre_hook(_Arrival(device, streams, copies), with_kwargs=True)
        self.final_layer.register_forward_hook(_Return(self.runs[0].device))

    def device_of(self, name: str) -> str:
        """Where the weight of this name belongs."""
        module = ".".join(name.split(".")[: 2 if "_blocks." in name else 1])
        return self._device_of.get(module, self.runs[0].device)

    def twin(self) -> "SplitFlux":
        """Another network with the same weights in the same memory, and no hooks of others."""
        twin = SplitFlux(self.params, self.devices)
        twin.load_state_dict(self.state_dict(), assign=True)
        return use_kernel(twin, kernel_of(self))


def split(flux: Flux, devices: Sequence[str]) -> SplitFlux:
    """A network with the weights of another one on these devices; weights that are there already are shared."""
    network = SplitFlux(flux.params, devices)
    state = {name: weight.detach().to(network.device_of(name)) for name, weight in flux.state_dict().items()}
    network.load_state_dict(state, assign=True)
    network.requires_grad_(requires_grad=False)
    return use_kernel(network, kernel_of(flux))


class _Copies:
    """What every block is given alike, once on each device: the conditioning and the rotations of a step."""

    def __init__(self) -> None:
        # By identity, and weak: a copy lives as long as what it is a copy of, and no forward finds that of another.
        self._known: MutableMapping[Tensor, dict[str, Tensor]] = WeakTensorKeyDictionary()

    def on(self, device: str, tensor: Tensor) -> Tensor:
        """The tensor on this device."""
        if tensor.device == torch.device(device):
            return tensor
        known = self._known.setdefault(tensor, {})
        if device not in known:
            known[device] = tensor.to(device)
        return known[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Copies":
        return _Copies()  # a replica runs by itself, maybe beside this one


class _Arrival:
    """The hook before a block or the final layer: what it is called with comes to its device.

    CUDA orders a copy behind what was queued on the current streams of both devices. Threads keep to the default
    stream of each device, so batches take turns on a device in the order in which they were queued, and no memory is
    used again too early. Streams of their own might overlap more of the copies: this was not measured.
    """

    def __init__(self, device: str, streams: int, copies: _Copies) -> None:
        self._device, self._streams, self._copies = device, streams, copies

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = tuple(self._moved(value, is_stream=number < self._streams) for number, value in enumerate(args))
        named = {name: self._moved(value, is_stream=name not in ("vec", "rotation")) for name, value in kwargs.items()}
        return moved, named

    def _moved(self, value: Tensor, *, is_stream: bool) -> Tensor:
        # Tokens have been on this device since the block before, but for the first of a run: no copy is kept of them.
        return value.to(self._device) if is_stream else self._copies.on(self._device, value)


class _Return:
    """The hook behind the final layer: the velocity goes to where the sampler's state is."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, module: nn.Module, args: Any, velocity: Velocity) -> Velocity:
        return velocity.to(self._device)
