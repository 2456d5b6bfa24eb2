"""Listens to a finished transformer and hands what passes its sites to a sink, without changing a bit of its output.

Every site is the output of some module, or what a block made of its input; `module_of` says of which. Next: `store`,
the sink that writes the capture file, and `intervention`, which writes at sites.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from inspect import signature
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.suite import Suite
from flux_ir.sampling.denoise import Step
from flux_ir.shapes import PackedLatent, Pooled, Tokens
from flux_ir.sites import Site, SiteNames, as_site, nearest_names, sites_of


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
        """What each step began with."""
        self.values: dict[tuple[int, Site], Tensor] = {}
        """By step and site, [batch, tokens, d] each."""
        self.text: dict[Site, Tensor] = {}
        """By layer of a text encoder, [prompts, tokens, d] each: they have no step."""

    def __repr__(self) -> str:
        layers = f", {len(self.text)} layers of text encoders" if self.text else ""
        sites = len({site for _, site in self.values})
        return f"<MemorySink: {sites} sites, {len(self.contexts)} steps{layers}>"

    def begin_step(self, step: int, context: StepContext) -> None:
        self.contexts[step] = context

    def write(self, step: int, site: Site, value: Tensor) -> None:
        self.values[step, site] = value.detach()

    def write_text(self, site: Site, value: Tensor) -> None:
        self.text[site] = value.detach()

    def read(self, site: str | Site, step: int | None = None) -> Tokens:
        """One site at one step, [batch, tokens, d]; a layer of a text encoder without one.

        Raises FluxIRError for one that was not recorded.
        """
        site = as_site(site)
        check_step(site, step)
        if site.per_prompt:
            if site not in self.text:
                raise FluxIRError(
                    f"{site} was not recorded",
                    hint=f"the nearest of the sites recorded are {nearest_names(str(site), map(str, self.text))}",
                )
            return self.text[site]
        assert step is not None
        if (step, site) not in self.values:
            steps = sorted(recorded for recorded, other in self.values if other == site)
            names = {str(other) for _, other in self.values}
            raise FluxIRError(
                f"{site} was not recorded at step {step}",
                hint=f"its steps are {', '.join(map(str, steps))}"
                if steps
                else f"the nearest of the sites recorded are {nearest_names(str(site), names)}",
            )
        return self.values[step, site]


def check_step(site: Site, step: int | None) -> None:
    """Raises FluxIRError for a site of the transformer without a step, and for a layer of a text encoder with one."""
    if site.per_prompt and step is not None:
        raise FluxIRError(f"{site} is recorded once per prompt and has no step: got {step}", hint="leave the step out")
    if not site.per_prompt and step is None:
        raise FluxIRError(f"{site} is recorded at every step: got none", hint="say which, such as step=0")


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

    `sites` are given as `Site` or as text, which may hold patterns (`double.*.img`).

    What is recorded goes to `sink`; without one, to a `MemorySink` of the recorder's own, which is at `recorder.sink`.

    `steps` are the steps to record (None: all); the others pass untouched. No hook is left behind, whatever raises.

    With `stop_early` the forward of the last of `steps` ends by `RecordingComplete` as soon as its last site is
    recorded: nothing deeper is computed. The steps before it run whole, for the sampler goes on from their velocity.

    Every site must come once in every step that is recorded: one that did not is an error when the next step begins,
    or when the `with` ends.

    Raises FluxIRError for sites the model does not have, and for a compiled model, whose hooks may never be called.
    """

    def __init__(
        self,
        model: Flux | Suite,
        sites: SiteNames,
        sink: Sink | None = None,
        *,
        steps: Collection[int] | None = None,
        stop_early: bool = False,
    ) -> None:
        flux = model.flux if isinstance(model, Suite) else model
        chosen = sites_of(sites, flux.params.depth, flux.params.depth_single_blocks)
        if stop_early and not steps:
            raise ValueError("stop_early needs the steps to record: it stops at the last of them")
        self.model, self.sites = flux, tuple(chosen)
        self.sink: Sink = MemorySink() if sink is None else sink
        self.steps = None if steps is None else frozenset(steps)
        self._last_step = max(steps) if stop_early and steps else None
        self._hooks: ExitStack | None = None
        self._step, self._txt_tokens, self._recording = -1, 0, False
        self._to_come: set[Site] = set()

    def __enter__(self) -> "Recorder":
        if self._hooks is not None:
            raise RuntimeError("this recorder is already listening")
        check_not_compiled(self.model, self.sites)
        self._step, self._recording = -1, False
        self._to_come.clear()
        with ExitStack() as hooks:  # undone at once if one of them cannot be set
            before = self.model.register_forward_pre_hook(self._begin_step, with_kwargs=True)
            hooks.callback(before.remove)
            for site in self.sites:
                module = self.model.get_submodule(module_of(site))
                handle = module.register_forward_hook(Listener(self, site), with_kwargs=True)
                hooks.callback(handle.remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()
        if kind is None:
            if self._step < 0:
                raise no_forward("recorder")
            self._check_complete()

    def _check_complete(self) -> None:
        if self._to_come:
            missing = ", ".join(map(str, sorted(self._to_come)))
            raise FluxIRError(
                f"step {self._step} was recorded in part: {len(self._to_come)} of {len(self.sites)} sites never came: "
                f"{missing}",
                hint=NOT_CALLED,
            )

    def _begin_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_complete()
        self._step += 1
        self._recording = self.steps is None or self._step in self.steps
        if self._recording:
            given = forward_arguments(model, args, kwargs)
            self._txt_tokens = given["txt"].shape[1]
            self.sink.begin_step(self._step, StepContext(given["img"], given["y"], self._txt_tokens))
            self._to_come = set(self.sites)
            self._stop_if_complete()

    def _stop_if_complete(self) -> None:
        if self._step == self._last_step and not self._to_come:
            raise RecordingComplete

    def take(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What a site's `Listener` hands over: one call of its module."""
        if not self._recording:
            return
        value = stream_of(site, output)
        if site.part == "update":
            value = value - block_input(site, args, kwargs)
        rows = rows_of(site, value.shape[1], self._txt_tokens)
        self.sink.write(self._step, site, value if site.whole == site else value[:, rows])
        self._to_come.discard(site)
        self._stop_if_complete()


class Listener:
    """The hook of one site. Of a type of its own, so that interventions which come later can stand before it."""

    def __init__(self, recorder: Recorder, site: Site) -> None:
        self.recorder, self.site = recorder, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.recorder.take(self.site, args, kwargs, output)


# Why a hook that was set is not called.
NOT_CALLED = (
    "a compiled model calls no hooks that came later, and block.forward(...) calls none: "
    "run the model as it was loaded, by model(...)"
)


def check_not_compiled(model: Flux, sites: Iterable[Site]) -> None:
    """Raises FluxIRError if the model is compiled, or a module around one of the sites is."""
    for site in (None, *sites):
        names = module_of(site).split(".") if site else []
        for depth in range(len(names) + 1):
            name = ".".join(names[:depth])
            module = model.get_submodule(name)
            # `torch.compile(module)` wraps the module, `module.compile()` marks it.
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise FluxIRError(
                    f"a recorder or an intervention needs a model that is not compiled: {name or 'the model'} is",
                    hint="pass the model as it was before torch.compile, and run that one",
                )


def no_forward(who: str) -> FluxIRError:
    """What to say of a recorder or an intervention whose model was never called."""
    return FluxIRError(f"the {who} saw no forward of its model while it was entered", hint=NOT_CALLED)


def forward_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward was called with, by name. From the class: others wrap the `forward` of an instance."""
    return signature(type(model).forward).bind(model, *args, **kwargs).arguments


def module_of(site: Site) -> str:
    """The name of the module whose call shows this site: its output, or output - input for an update."""
    block, stream = f"{site.kind}_blocks.{site.block}", site.stream
    match site.kind, site.part:
        case _, None | "update":
            return block
        case "double", "attn":
            return f"{block}.{stream}_attn.proj"
        case "double", "mlp":
            return f"{block}.{stream}_mlp"
        case "double", _:
            return f"{block}.{stream}_mlp.1"  # 0 and 2 are the linears: their names are the checkpoint's
        case "single", "neurons":
            return f"{block}.mlp_act"
        case _:
            return f"{block}.linear2"


def stream_of(site: Site, output: Any) -> Tensor:
    """The tensor of a module's output that the site is in: double blocks put out a pair, image first."""
    if not isinstance(output, tuple):
        return output
    return output[0] if site.stream == "img" else output[1]


def rows_of(site: Site, tokens: int, txt_tokens: int) -> slice:
    """Which of the rows of `stream_of` are the site's: the half of one stream, in a single block."""
    if site.whole == site:
        return slice(0, tokens)
    return slice(0, txt_tokens) if site.stream == "txt" else slice(txt_tokens, tokens)


def block_input(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the site's block was called with, of the site's stream; both streams for a single block."""
    names = ("img", "txt") if site.kind == "double" else ("x",)
    position = 1 if site.kind == "double" and site.stream == "txt" else 0
    return args[position] if position < len(args) else kwargs[names[position]]
