"""Listens to the layers of the text encoders: once per prompt, so what they put out has no step.

    with model.text_encoders() as text, TextRecorder(text, "t5.*, clip.7") as recorder:
        encode(text.t5, text.clip, ["a red circle"])
    recorder.sink.read("t5.12")

The text encoders' counterpart of `recorder`, and as that one it changes no bit.
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.suite import TextEncoders
from flux_ir.recording.recorder import NOT_CALLED, MemorySink
from flux_ir.sites import Site, SiteNames, sites_among, text_sites


@runtime_checkable
class TextSink(Protocol):
    """Where layers of the text encoders go. They are handed over as the network made them: not copied."""

    def write_text(self, site: Site, value: Tensor) -> None:
        """Called each time a layer is computed: `value` is [prompts, tokens, d]."""


class TextRecorder:
    """Records layers of both text encoders whenever they run while its `with` lasts, padding and all.

    `sites` are given as `Site` or as text, which may hold patterns (`t5.*`). A layer's output is what the next one is
    given: the norm behind the last one comes later. Without a `sink` they go to a `MemorySink`, which keeps the last.

    Raises FluxIRError for layers that the encoders do not have, and at the end for one that never ran.
    """

    def __init__(self, encoders: TextEncoders, sites: SiteNames, sink: TextSink | None = None) -> None:
        self._layers = _layers(encoders)
        self.sites = tuple(sites_among(sites, list(self._layers)))
        self.sink: TextSink = MemorySink() if sink is None else sink
        self._hooks: ExitStack | None = None
        self._to_come: set[Site] = set()

    def __enter__(self) -> "TextRecorder":
        if self._hooks is not None:
            raise RuntimeError("this recorder is already listening")
        self._to_come = set(self.sites)
        with ExitStack() as hooks:  # undone at once if one of them cannot be set
            for site in self.sites:
                hooks.callback(self._layers[site].register_forward_hook(_Listener(self, site)).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()
        if kind is None and self._to_come:
            missing = ", ".join(map(str, sorted(self._to_come)))
            raise FluxIRError(f"no prompt was encoded while these were to be recorded: {missing}", hint=NOT_CALLED)

    def take(self, site: Site, output: Tensor) -> None:
        """What a layer's hook hands over."""
        self.sink.write_text(site, output)
        self._to_come.discard(site)


class _Listener:
    """The hook of one layer."""

    def __init__(self, recorder: TextRecorder, site: Site) -> None:
        self.recorder, self.site = recorder, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.recorder.take(self.site, output)


def _layers(encoders: TextEncoders) -> dict[Site, nn.Module]:
    """The module whose output each site is, in depth order."""
    t5: Any = encoders.t5.model.get_submodule("encoder.block")
    clip: Any = encoders.clip.model.get_submodule("text_model.encoder.layers")
    return dict(zip(text_sites(len(t5), len(clip)), [*t5, *clip], strict=True))
