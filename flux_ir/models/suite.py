"""A whole model - text encoders, transformer, autoencoder - loaded onto the devices of a `Placement`.

With offload each part is on the GPU only inside the `with` block that needs it. This is the only place that moves
parts. Below it: `checkpoints`, where weights come from; `text`, `flux1` and `autoencoder`, what they become.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import AnyTransformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.hub import Announce
from flux_ir.models.checkpoints.load import (
    flux1_params,
    load_autoencoder,
    load_flux,
    load_sharded_flux,
    stream_flux,
)
from flux_ir.models.checkpoints.locate import ModelSource
from flux_ir.models.checkpoints.locate_text import TextSource
from flux_ir.models.checkpoints.quantised import stream_quantised
from flux_ir.models.flux1.attention import AttentionWord, use_kernel
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.footprint import LARGEST_USUAL_TOKENS, autoencoder_bytes
from flux_ir.models.memory import resident_blocks, waits_in_memory, weights_budget, where_codes_wait
from flux_ir.models.placement import Placement
from flux_ir.models.registry import ModelSpec
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.text import TextEncoder, load_clip, load_t5
from flux_ir.sites import Site

TOKEN_PX = 16  # pixels along each side of an image token
ModelPart = Literal["text", "transformer", "autoencoder"]


class TextEncoders(NamedTuple):
    """Both text encoders, ready to `encode`."""

    t5: TextEncoder
    clip: TextEncoder


class Suite:
    """The parts of one model. Each is loaded when it is first asked for; `load` brings all of them, one by one.

    `dtype` is that of the transformer and the text encoders. A part that `source` does not have cannot be asked for:
    ValueError. `tokens`, of text and image together, are those that memory is kept free for where blocks are streamed.
    `announce` is told of what takes long and happens once. With `sharded_over` more than one, all ranks of a job load
    and run the transformer together: see `sharded`.
    With `compiled` the blocks of the transformer are compiled when they are first called: blocks that are there as they
    are, neither streamed nor sharded nor kept as codes. `attention` is the kernel of the transformer's attention.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: ModelSource,
        placement: Placement,
        dtype: torch.dtype,
        *,
        tokens: int = LARGEST_USUAL_TOKENS,
        announce: Announce | None = None,
        sharded_over: int = 1,
        compiled: bool = False,
        attention: AttentionWord = "auto",
    ) -> None:
        other = "--multi_gpu blocks" if placement.blocks else "--fsdp" if sharded_over > 1 else None
        if source.quantize is not None and other is not None:
            raise FluxIRError(
                f"quantised blocks come from their codes on one device: got {other} as well",
                hint=f"leave out --quantize or {other}",
            )
        self.spec, self.source, self.placement, self.dtype = spec, source, placement, dtype
        self.tokens, self._announce, self.sharded_over = tokens, announce, sharded_over
        self.compiled, self.attention = compiled, attention
        if compiled and (placement.offload == "blocks" or source.quantize is not None or sharded_over > 1):
            raise FluxIRError(
                "--compile needs blocks whose weights are there as they are: these come one block after the other",
                hint="leave out --compile; or leave out --offload, --quantize and --fsdp",
            )
        if compiled:
            flux1_params(spec, "--compile")
        self._t5: TextEncoder | None = None
        self._clip: TextEncoder | None = None
        self._transformer: AnyTransformer | None = None
        self._autoencoder: AutoEncoder | None = None

    @property
    def parts(self) -> list[ModelPart]:
        """The parts that were located."""
        located: dict[ModelPart, object] = {
            "text": self.source.text,
            "transformer": self.source.transformer,
            "autoencoder": self.source.autoencoder,
        }
        return [part for part, source in located.items() if source is not None]

    def __repr__(self) -> str:
        flux, dtype = self.spec.flux, str(self.dtype).removeprefix("torch.")
        compiled = ", compiled" if self.compiled else ""
        return (
            f"<{self.spec.name}: {flux.depth} double and {flux.depth_single_blocks} single blocks of width "
            f"{flux.hidden_size}, {dtype} on {', '.join(self.placement.devices)}{compiled}>"
        )

    @property
    def sites(self) -> list[Site]:
        """Every site, in depth order. Those of the text encoders are recorded once per prompt and cannot be changed."""
        return self.spec.sites

    def load(self) -> Iterator[ModelPart]:
        """Load every part, yielding its name once it is there. Raises FluxIRError for weights that cannot be read.

        Where blocks are streamed only the transformer is: the others come when they are used.
        """
        for part in self.parts:
            if part == "transformer" or self.placement.offload != "blocks":
                self.load_part(part)
                yield part

    def load_part(self, part: ModelPart) -> None:
        """Load one part, unless it is there already."""
        match part:
            case "text":
                self._load_t5()
                self._load_clip()
            case "transformer":
                self._load_transformer()
            case "autoencoder":
                self._load_autoencoder()

    @property
    def flux(self) -> AnyTransformer:
        """The transformer, wherever it is at the moment: what hooks are hung on. To run it, enter `transformer()`."""
        return self._load_transformer()

    @contextmanager
    def text_encoders(self) -> Iterator[TextEncoders]:
        """Both text encoders, on their devices."""
        t5, clip = self._load_t5(), self._load_clip()
        # A T5 whose blocks are streamed is where it runs.
        t5_moves = nullcontext() if self.placement.offload == "blocks" else self._on(t5, self.placement.t5)
        with t5_moves, self._on(clip, self.placement.clip):
            yield TextEncoders(t5, clip)
        if self.placement.offload == "blocks":  # where memory is short, what has done its work goes
            self.free_text_encoders()

    def free_text_encoders(self) -> None:
        """Lets go of both text encoders, and of the GPU memory they took. They are loaded again if asked for."""
        self._t5, self._clip = None, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def transformer(self) -> Iterator[AnyTransformer]:
        """The transformer, on its device."""
        model = self._load_transformer()
        with self._on(model, self.placement.transformer):
            yield model

    @contextmanager
    def autoencoder(self) -> Iterator[AutoEncoder]:
        """The autoencoder, its encoder and its decoder on their devices."""
        model = self._load_autoencoder()
        with (
            self._on(model.encoder, self.placement.ae_encoder),
            self._on(model.decoder, self.placement.ae_decoder),
        ):
            yield model

    @contextmanager
    def _on(self, part: nn.Module, device: str) -> Iterator[None]:
        if self.placement.offload == "none" or isinstance(part, StreamedFlux):
            yield
            return
        try:
            part.to(device)
            yield
        finally:
            part.to("cpu")

    def _home(self, device: str) -> str:
        """Where a part is loaded to, and waits until it is needed."""
        return device if self.placement.offload == "none" else "cpu"

    def _text_source(self) -> TextSource:
        if self.source.text is None:
            raise ValueError("this model was located without its text encoders")
        return self.source.text

    def _load_t5(self) -> TextEncoder:
        if self._t5 is None:
            source = self._text_source().t5
            streamed = self.placement.offload == "blocks"
            device = self.placement.t5 if streamed else self._home(self.placement.t5)
            self._t5 = load_t5(
                source.path,
                source.tokenizer_dir,
                self.spec.text_tokens,
                device,
                self.dtype,
                config=source.config,
                prefix=source.prefix,
                streamed=streamed,
                loras=self.source.loras,
            )
        return self._t5

    def _load_clip(self) -> TextEncoder:
        if self._clip is None:
            source = self._text_source().clip
            self._clip = load_clip(
                source.path,
                source.tokenizer_dir,
                self._home(self.placement.clip),
                self.dtype,
                config=source.config,
                prefix=source.prefix,
                beside_streamed=self.placement.offload == "blocks" and self.placement.clip == "cpu",
                loras=self.source.loras,
            )
        return self._clip

    def _load_transformer(self) -> AnyTransformer:
        if self._transformer is None:
            if self.placement.offload == "blocks" or self.source.quantize is not None:
                self._transformer = self._streamed()
            elif self.sharded_over > 1:
                self._transformer = load_sharded_flux(
                    self.spec,
                    self.source.transformer,
                    self.placement.transformer,
                    self.dtype,
                    ranks=self.sharded_over,
                    loras=self.source.loras,
                )
            else:
                flux = load_flux(
                    self.spec,
                    self.source.transformer,
                    self._home(self.placement.transformer),
                    self.dtype,
                    loras=self.source.loras,
                    blocks_on=self.placement.blocks,
                )
                if self.compiled:
                    assert isinstance(flux, Flux)  # no other is compiled: see `__init__`
                    from flux_ir.models.compiled import compile_blocks  # the compiler takes seconds to import

                    compile_blocks(flux)
                self._transformer = flux
            use_kernel(self._transformer, self.attention)
        return self._transformer

    def _streamed(self) -> StreamedFlux:
        """The transformer with its blocks streamed, but for those that its device has room for.

        If they are quantised, all come from their codes, which a GPU has room for where it has none for the blocks.
        """
        source, placement, params = self.source, self.placement, self.spec.flux
        if (method := source.quantize) is not None:
            return stream_quantised(
                self.spec,
                source.transformer,
                method,
                placement.transformer,
                self.dtype,
                loras=source.loras,
                waits=where_codes_wait(params, placement, self.dtype, method, tokens=self.tokens),
                announce=self._announce,
            )
        beside = autoencoder_bytes(self.spec, self.tokens * TOKEN_PX**2, self.dtype)
        free = weights_budget(params, placement, self.dtype, tokens=self.tokens, beside=beside)
        resident = resident_blocks(params, self.dtype, free)
        return stream_flux(
            self.spec,
            source.transformer,
            placement.transformer,
            self.dtype,
            loras=source.loras,
            resident=resident,
            in_memory=waits_in_memory(params, placement, self.dtype, len(resident)),
        )

    def _load_autoencoder(self) -> AutoEncoder:
        if self._autoencoder is None:
            if self.source.autoencoder is None:
                raise ValueError("this model was located without its autoencoder")
            # Its weights stay float32, whatever `dtype` is: `sampling.generate.decode` lets autocast round them.
            model = load_autoencoder(self.spec, self.source.autoencoder, self._home(self.placement.ae_decoder))
            model.encoder.to(self._home(self.placement.ae_encoder))
            self._autoencoder = model
        return self._autoencoder
