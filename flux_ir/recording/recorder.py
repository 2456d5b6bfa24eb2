"""Listens to a finished transformer and hands what passes its sites to a sink, without changing a bit of its output.

Every site is the output of some module, or what a block made of its input: `hooks.module_of` says of which. The text
encoders have a recorder of their own, as they run once per prompt. Next: `writer`, the sink that writes the capture
file, and `intervention`, which writes at sites.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import Suite, TextEncoders
from flux_ir.recording.hooks import (
    NOT_CALLED,
    Hooked,
    Listener,
    StepHooks,
    block_input,
    module_of,
    named,
    rows_of,
    stream_of,
    text_layers,
)
from flux_ir.sampling.denoise import Step
from flux_ir.shapes import PackedLatent, Pooled, Tokens
from flux_ir.sites import Site, SiteNames, as_site, nearest_names, sites_among, sites_of


class StepContext(NamedTuple):
    """What a step began with: the packed state before it, the pooled text, and how many tokens the text has.

    `cond_tokens` are those of a reference picture.
    """

    img: PackedLatent
    y: Pooled
    txt_tokens: int
    cond_tokens: int = 0


@runtime_checkable
class Sink(Protocol):
    """Where recorded tensors go. They are handed over as the network made them: on its device, not copied."""

    def begin_step(self, step: int, context: StepContext) -> None:
        """Called before the first site of a step."""

    def write(self, step: int, site: Site, value: Tensor) -> None:
        """Called once for each site of a step, as soon as it is computed: `value` is [batch, tokens, d]."""


@runtime_checkable
class TextSink(Protocol):
    """Where layers of the text encoders go. They are handed over as the network made them: not copied."""

    def write_text(self, site: Site, value: Tensor) -> None:
        """Called each time a layer is computed: `value` is [prompts, tokens, d]."""


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


class Recorder(StepHooks):
    """Records the sites of every forward of `model` while its `with` lasts: one forward is one step, counted from 0,
    or from `first_step` where the sampler begins with a picture.

    `sites` are given as `Site` or as text, which may hold patterns (`double.*.img`).

    What is recorded goes to `sink`; without one, to a `MemorySink` of the recorder's own, which is at `recorder.sink`.

    `steps` are the steps to record (None: all); the others pass untouched. No hook is left behind, whatever raises.

    With `stop_early` the forward of the last of `steps` ends by `RecordingComplete` as soon as its last site is
    recorded: nothing deeper is computed. The steps before it run whole, for the sampler goes on from their velocity.

    Every site must come once in every step that is recorded: one that did not is an error when the next step begins,
    or when the `with` ends.

    Raises FluxIRError for sites the model does not have, and for a compiled model, whose hooks may never be called.
    """

    name = "recorder"

    def __init__(
        self,
        model: Transformer | Suite,
        sites: SiteNames,
        sink: Sink | None = None,
        *,
        steps: Collection[int] | None = None,
        stop_early: bool = False,
        first_step: int = 0,
    ) -> None:
        flux = model.flux if isinstance(model, Suite) else model
        chosen = sites_of(sites, flux.params.depth, flux.params.depth_single_blocks)
        if stop_early and not steps:
            raise ValueError("stop_early needs the steps to record: it stops at the last of them")
        super().__init__(flux, chosen, steps, first_step)
        self.sink: Sink = MemorySink() if sink is None else sink
        self._last_step = max(steps) if stop_early and steps else None

    def _hang(self, hooks: ExitStack) -> None:
        super()._hang(hooks)
        for site in self.sites:
            module = self.model.get_submodule(module_of(site))
            hooks.callback(module.register_forward_hook(Listener(self._take, site), with_kwargs=True).remove)

    def _check_end(self) -> None:
        super()._check_end()
        if self._to_come:
            raise self._incomplete()

    def _incomplete(self) -> FluxIRError:
        return FluxIRError(
            f"step {self._step} was recorded in part: {len(self._to_come)} of {len(self.sites)} sites never came: "
            f"{named(self._to_come)}",
            hint=NOT_CALLED,
        )

    def _next_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._next_step(model, args, kwargs)
        self._stop_if_complete()  # without sites the last step has nothing to compute

    def _begin_step(self, given: dict[str, Any]) -> None:
        self.sink.begin_step(self._step, StepContext(given["img"], given["y"], self._tokens.txt, self._tokens.cond))

    def _stop_if_complete(self) -> None:
        if self._step == self._last_step and not self._to_come:
            raise RecordingComplete

    def _take(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._active:
            return
        value = stream_of(site, output)
        if site.part == "update":
            value = value - block_input(site, args, kwargs)
        rows = rows_of(site, self._tokens)
        self.sink.write(self._step, site, value if rows == slice(0, value.shape[1]) else value[:, rows])
        self._to_come.discard(site)
        self._stop_if_complete()


class TextRecorder(Hooked):
    """Records layers of both text encoders whenever they run while its `with` lasts, padding and all.

    `sites` are given as `Site` or as text, which may hold patterns (`t5.*`). A layer's output is what the next one is
    given: the norm behind the last one comes later. Without a `sink` they go to a `MemorySink`, which keeps the last.

        with model.text_encoders() as text, TextRecorder(text, "t5.*, clip.7") as recorder:
            encode(text.t5, text.clip, ["a red circle"])
        recorder.sink.read("t5.12")

    As `Recorder`, it changes no bit. Raises FluxIRError for layers that the encoders do not have, and at the end for
    one that never ran.
    """

    name = "text recorder"

    def __init__(self, encoders: TextEncoders, sites: SiteNames, sink: TextSink | None = None) -> None:
        self._layers = text_layers(encoders)
        self.sites = tuple(sites_among(sites, list(self._layers)))
        self.sink: TextSink = MemorySink() if sink is None else sink
        self._to_come: set[Site] = set()

    def _hang(self, hooks: ExitStack) -> None:
        self._to_come = set(self.sites)
        for site in self.sites:
            listener = Listener(self._take, site)
            hooks.callback(self._layers[site].register_forward_hook(listener, with_kwargs=True).remove)

    def _check_end(self) -> None:
        if self._to_come:
            raise FluxIRError(
                f"no prompt was encoded while these were to be recorded: {named(self._to_come)}", hint=NOT_CALLED
            )

    def _take(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.sink.write_text(site, output)
        self._to_come.discard(site)
