"""Listens to a finished transformer and hands what passes its sites to a sink, without changing a bit of its output.

Every site is the output of some module, or what a block made of its input; `_tap` says which. Next: `store`, the sink
that writes the capture file.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from inspect import signature
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.transformer import Flux
from flux_ir.sampling.denoise import Step
from flux_ir.shapes import PackedLatent, Pooled
from flux_ir.sites import Site, all_sites, nearest_names


class StepContext(NamedTuple):
    """What a step began with: the packed state before it, the pooled text, and how many tokens the text has."""

    img: PackedLatent
    y: Pooled
    txt_tokens: int


@runtime_checkable
class Sink(Protocol):
    """Where recorded tensors go. They are handed over as the network made them: on its device, not copied."""

    def begin_step(self, step: int, context: StepContext) -> None:
        """Called before the first site of a step."""

    def write(self, step: int, site: Site, value: Tensor) -> None:
        """Called once for each site of a step, as soon as it is computed: `value` is [batch, tokens, d]."""


class MemorySink:
    """Keeps everything in two dictionaries, for notebooks and tests. Tensors stay on the device they were made on."""

    def __init__(self) -> None:
        self.contexts: dict[int, StepContext] = {}
        self.values: dict[tuple[int, Site], Tensor] = {}

    def begin_step(self, step: int, context: StepContext) -> None:
        self.contexts[step] = context

    def write(self, step: int, site: Site, value: Tensor) -> None:
        self.values[step, site] = value.detach()


class RecordingComplete(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward that was to be recorded only as far as it has come: `until_recorded` takes it for the end."""


def until_recorded(steps: Iterator[Step]) -> Iterator[Step]:
    """The sampler's steps, up to the one that a recorder with `stop_early` cut short: that one has no velocity."""
    try:
        yield from steps
    except RecordingComplete:
        return


class Recorder:
    """Records the sites of every forward of `model` while its `with` lasts: one forward is one step, counted from 0.

    `steps` are the steps to record (None: all); the others pass untouched. No hook is left behind, whatever raises.

    With `stop_early` the forward of the last of `steps` ends by `RecordingComplete` as soon as its last site is
    recorded: nothing deeper is computed. The steps before it run whole, for the sampler goes on from their velocity.

    Raises FluxIRError for sites the model does not have.
    """

    def __init__(
        self,
        model: Flux,
        sites: Sequence[Site],
        sink: Sink,
        *,
        steps: Collection[int] | None = None,
        stop_early: bool = False,
    ) -> None:
        check_sites(sites, model.params.depth, model.params.depth_single_blocks)
        if stop_early and not steps:
            raise ValueError("stop_early needs the steps to record: it stops at the last of them")
        self.model, self.sites, self.sink = model, tuple(dict.fromkeys(sites)), sink
        self.steps = None if steps is None else frozenset(steps)
        self._last_step = max(steps) if stop_early and steps else None
        self._signature = signature(model.forward)
        self._hooks: ExitStack | None = None
        self._step, self._txt_tokens, self._recording, self._to_come = -1, 0, False, 0

    def __enter__(self) -> "Recorder":
        if self._hooks is not None:
            raise RuntimeError("this recorder is already listening")
        self._step, self._recording = -1, False
        with ExitStack() as hooks:  # undone at once if one of them cannot be set
            before = self.model.register_forward_pre_hook(self._begin_step, with_kwargs=True)
            hooks.callback(before.remove)
            for site in self.sites:
                module, take = _tap(site)
                listener = self._listener(site, take)
                handle = self.model.get_submodule(module).register_forward_hook(listener, with_kwargs=True)
                hooks.callback(handle.remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()

    def _begin_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step += 1
        self._recording = self.steps is None or self._step in self.steps
        if self._recording:
            given = self._signature.bind(*args, **kwargs).arguments
            self._txt_tokens = given["txt"].shape[1]
            self.sink.begin_step(self._step, StepContext(given["img"], given["y"], self._txt_tokens))
            self._to_come = len(self.sites)
            self._stop_if_complete()

    def _stop_if_complete(self) -> None:
        if self._step == self._last_step and self._to_come == 0:
            raise RecordingComplete

    def _listener(self, site: Site, take: "_Take") -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._recording:
                value = take(args, kwargs, output)
                self.sink.write(self._step, site, _half(value, site, self._txt_tokens))
                self._to_come -= 1
                self._stop_if_complete()

        return listen


def check_sites(sites: Sequence[Site], depth: int, depth_single_blocks: int) -> None:
    """Raises FluxIRError for the first site a transformer of this depth does not have, naming the nearest."""
    available = all_sites(depth, depth_single_blocks)
    unknown = next(iter(sorted(set(sites) - set(available))), None)
    if unknown is not None:
        raise FluxIRError(
            f"this model has {depth} double and {depth_single_blocks} single blocks, and no site {unknown}",
            hint=f"the nearest are {nearest_names(str(unknown), map(str, available))}",
        )


def _half(value: Tensor, site: Site, txt_tokens: int) -> Tensor:
    if site.kind == "double" or site.stream is None:
        return value
    return value[:, :txt_tokens] if site.stream == "txt" else value[:, txt_tokens:]


# Picks a site's value out of one call of its module: (args, kwargs, output) -> value.
_Take = Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]


def _tap(site: Site) -> tuple[str, _Take]:
    """The name of the module whose call shows this site, and what to take of it (both halves, for a single block)."""
    block, stream = f"{site.kind}_blocks.{site.block}", site.stream
    match site.kind, site.part:
        case "double", None:
            return block, lambda args, kwargs, output: _stream_of(site, output)
        case "double", "update":
            return block, lambda args, kwargs, output: _stream_of(site, output) - _block_input(site, args, kwargs)
        case "double", "attn":
            return f"{block}.{stream}_attn.proj", _output
        case "double", "mlp":
            return f"{block}.{stream}_mlp", _output
        case "double", "neurons":
            return f"{block}.{stream}_mlp.1", _output  # 0 and 2 are the linears: their names are the checkpoint's
        case "single", "update":
            return block, lambda args, kwargs, output: output - _block_input(site, args, kwargs)
        case "single", "neurons":
            return f"{block}.mlp_act", _output
        case "single", "out":
            return f"{block}.linear2", _output
        case _:
            return block, _output


def _output(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    return output


def _stream_of(site: Site, pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] if site.stream == "img" else pair[1]  # image first


def _block_input(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    names = ("img", "txt") if site.kind == "double" else ("x",)
    position = 1 if site.kind == "double" and site.stream == "txt" else 0
    return args[position] if position < len(args) else kwargs[names[position]]
