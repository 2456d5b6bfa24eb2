"""FLUX's transformer with its blocks streamed: a `Flux` to all who call it, hook it or read it.

The modulation layers are 27 % of FLUX.1's weights and need nothing but the times of the steps and the pooled text. So
they come once, before the first step, and put out what they will for all steps (`StreamedFlux.modulate_ahead`).
"""

from collections.abc import Collection, MutableMapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flux_ir.models.architecture import block_names
from flux_ir.models.flux1.attention import kernel_of, use_kernel
from flux_ir.models.flux1.blocks import Modulation, ModulationOut
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.streaming import SLOTS, BlockStream, Fetch, Turns, Watch, fill_the_rest, unit_of
from flux_ir.shapes import (
    CondIds,
    Conditioning,
    CondLatent,
    Context,
    ImgIds,
    PackedLatent,
    PerSample,
    Pooled,
    TxtIds,
    Velocity,
)


class StreamedFlux(Flux):
    """FLUX's transformer with its blocks streamed. It is called, hooked and read as any `Flux`.

    `fetch` gives the weights by their names. `resident` are the numbers of blocks, counted over double and single
    ones, that stay on the device; at least one does not. One forward runs at a time.
    """

    def __init__(
        self,
        params: FluxParams,
        fetch: Fetch,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        resident: Collection[int] = (),
        slots: int = SLOTS,
        watch: Watch | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(params)
        self.requires_grad_(requires_grad=False).eval()
        streamed = [name for number, name in enumerate(block_names(params)) if number not in frozenset(resident)]
        modulations = [
            path
            for name in streamed
            for path, module in self.get_submodule(name).named_modules(prefix=name)
            if isinstance(module, Modulation)
        ]
        units = [unit_of(self, name) for name in modulations]
        units += [unit_of(self, name, without=Modulation) for name in streamed]
        fill_the_rest(self, units, fetch, device, dtype)
        # After the modulations come the blocks, and after the last block the first one: of the next step.
        successor = [*range(1, len(units)), len(modulations)]
        self.stream = BlockStream(units, successor, fetch, device, dtype, slots=slots, watch=watch)
        self._modulations = [_Modulations(self.stream, n, self.get_submodule(m)) for n, m in enumerate(modulations)]
        for number, name in enumerate(streamed, start=len(modulations)):
            Turns(self.stream, number).hang(self.get_submodule(name))
        self._vec: Conditioning | None = None
        self._again = partial(StreamedFlux, params, fetch, device, dtype, resident=resident, slots=slots)

    def modulate_ahead(
        self, timesteps: Sequence[PerSample], y: Pooled, guidance: PerSample | None = None
    ) -> list[Conditioning]:
        """The conditioning of each step, with the modulations of every block computed now, each by its own call.

        `forward` takes one of these tensors as `vec` and finds its modulations, for as long as the tensor lives.
        """
        conditioning = super().conditioning
        vecs = [conditioning(time, y, guidance) for time in timesteps]
        with self.stream.turn:
            for modulations in self._modulations:
                modulations.compute(vecs)
        return vecs

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
        vec: Conditioning | None = None,
    ) -> Velocity:
        """As `Flux.forward`. `vec`: what `modulate_ahead` gave for this step; None: it is called for this step alone.

        Raises FluxIRError if gradients are asked for: a block's weights are gone when they would be needed.
        """
        with self.stream.turn:
            self._vec = self.modulate_ahead([timesteps], y, guidance)[0] if vec is None else vec
            try:
                return super().forward(img, img_ids, txt, txt_ids, timesteps, y, guidance, cond, cond_ids)
            finally:
                self._vec = None

    def conditioning(self, timesteps: PerSample, y: Pooled, guidance: PerSample | None = None) -> Conditioning:
        """As `Flux.conditioning`; inside `forward` it is the one whose modulations are known."""
        return super().conditioning(timesteps, y, guidance) if self._vec is None else self._vec

    def twin(self) -> "StreamedFlux":
        """Another network with the same weights, slots of its own, and no hooks of others."""
        return use_kernel(self._again(), kernel_of(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a streamed network cannot be copied: its weights come and go")


class _Modulations:
    """One streamed modulation layer and what it put out for the vectors that still live.

    It takes the place of the layer's own `forward`: its weights are not there when the block is.
    """

    def __init__(self, stream: BlockStream, number: int, layer: nn.Module) -> None:
        assert isinstance(layer, Modulation)
        self._stream, self._number, self._layer = stream, number, layer
        self._known: MutableMapping[Tensor, list[ModulationOut]] = WeakTensorKeyDictionary()
        layer.forward = self.of  # type: ignore[method-assign]

    def compute(self, vecs: Sequence[Conditioning]) -> None:
        """Have the layer's weights once, and its output for each of the vectors."""
        with self._stream.present(self._number):
            for vec in vecs:
                self._known[vec] = Modulation.forward(self._layer, vec)

    def of(self, vec: Conditioning) -> list[ModulationOut]:
        """The layer's output for a vector: by its identity, else computed now, which costs the weights' way."""
        if vec not in self._known:
            self.compute([vec])
        return self._known[vec]
