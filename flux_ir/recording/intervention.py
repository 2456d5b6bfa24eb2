"""Changes what a finished transformer computes at its sites, while it runs: the writing counterpart of `recorder`.

    with Intervention(model, {"single.6.img": lambda value, step: 0 * value}):
        *_, last = sample(model, inputs, timesteps, guidance)

Interventions compose with each other in the order they were entered, and with recorders in any order: a recorder sees
what is computed with, which is the value the last intervention gave.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import Suite, TextEncoders
from flux_ir.recording.hooks import (
    NOT_CALLED,
    Hooked,
    StepHooks,
    block_input,
    listeners_last,
    module_of,
    named,
    put_back,
    rows_of,
    stream_of,
    text_layers,
)
from flux_ir.shapes import Tokens
from flux_ir.sites import Site, sites_among, sites_of

Change = Callable[[Tokens, int], Tokens]
"""Takes what a site computed at a step, [batch, tokens, d], and gives what shall stand in its place.

That is a tensor of the same shape and dtype on the same device, which is that of the sampler's state wherever the
block is. The value may also be changed in place and given back.
"""
TextChange = Callable[[Tokens], Tokens]
"""The same for a layer of a text encoder, [prompts, tokens, d], which knows no step."""


class Intervention(StepHooks):
    """Puts `edit(value, step)` where a site computed `value`, in every forward of `model` while its `with` lasts.

    One forward is one step, counted from `first_step`; `steps` are the steps to change (None: all). The keys of `edits`
    are sites, as `Site` or as text, which may be a pattern; a site that several keys name is edited by one after the
    other. All sites can be written: a part of a block before its gate (`attn`, `mlp`, `neurons`, `out`), queries and
    keys of its attention (`q`, `k`), what the block adds (`update`), what it puts out,
    and one half of these in single blocks.

    An edit that gives back what it got changes no bit. No hook is left behind, whatever raises.

    Raises FluxIRError for sites that the model does not have, for a compiled model, for a site that a step did not
    come to, when the next step begins, for an edit that does not take a value and a step, and within a forward for one
    that gives anything but a tensor of the same shape, dtype and device.
    """

    name = "intervention"

    def __init__(
        self,
        model: Transformer | Suite,
        edits: Mapping[str | Site, Change],
        *,
        steps: Collection[int] | None = None,
        first_step: int = 0,
    ) -> None:
        flux = model.flux if isinstance(model, Suite) else model
        params = flux.params
        pairs = [
            (site, edit)
            for names, edit in edits.items()
            for site in sites_of(names, params.depth, params.depth_single_blocks)
        ]
        for site, edit in pairs:
            check_edit(site, edit)
        # A block's update and its output are changed by one module's hooks: the update is a part of the output.
        self.edits = sorted(pairs, key=lambda pair: pair[0].part != "update")
        super().__init__(flux, [site for site, _ in self.edits], steps, first_step)

    def _hang(self, hooks: ExitStack) -> None:
        super()._hang(hooks)
        for site, edit in self.edits:
            module = self.model.get_submodule(module_of(site))
            hooks.callback(module.register_forward_hook(self._editor(site, edit), with_kwargs=True).remove)
            listeners_last(module)

    def _incomplete(self) -> FluxIRError:
        return FluxIRError(f"step {self._step} was not changed at {named(self._to_come)}", hint=NOT_CALLED)

    def _editor(self, site: Site, edit: Change) -> Callable[..., Any]:
        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._active:
                return output
            self._to_come.discard(site)
            current = stream_of(site, output)
            rows = rows_of(site, self._tokens)
            if site.part == "update":
                before = block_input(site, args, kwargs)[:, rows]
                part = self._edited_update(site, edit, before, current[:, rows])
            else:
                given = current[:, rows]
                part = self._edited(site, edit, given)
                if part is given:  # as it was, or changed in place
                    return put_back(site, current, output)
            if part.shape[1] < current.shape[1]:
                part = torch.cat([current[:, : rows.start], part, current[:, rows.stop :]], dim=1)
            return put_back(site, part, output)

        return change

    def _edited_update(self, site: Site, edit: Change, before: Tokens, after: Tokens) -> Tokens:
        """The block's output with another update. Where the edit changes nothing the output keeps its bits, which
        input + (output - input) would not: it is rounded twice.
        """
        update = after - before
        new = self._edited(site, edit, update.clone())
        kept = (new == update) | (new.isnan() & update.isnan())
        return torch.where(kept, after, before + new)

    def _edited(self, site: Site, edit: Change, value: Tokens) -> Tokens:
        # Where blocks are split over devices an edit computes where the state is: its own tensors are there.
        given = value.to(self.model.img_in.weight.device)
        return fitting(site, edit(given, self._step), given).to(value.device)


class TextIntervention(Hooked):
    """Puts `edit(value)` where a layer of a text encoder computed `value`, whenever it runs while its `with` lasts.

        with model.text_encoders() as text, TextIntervention(text, {"t5.12": lambda value: 2 * value}):
            encode(text.t5, text.clip, ["a red circle"])

    The padding of a prompt is among its tokens. An edit that gives back what it got changes no bit, and no hook is left
    behind. Raises FluxIRError for layers that the encoders do not have, at the end for one that never ran, and for an
    edit that gives anything but a tensor of the same shape, dtype and device.
    """

    name = "text intervention"

    def __init__(self, encoders: TextEncoders, edits: Mapping[str | Site, TextChange]) -> None:
        self._layers = text_layers(encoders)
        self.edits = [(site, edit) for names, edit in edits.items() for site in sites_among(names, list(self._layers))]
        self._to_come: set[Site] = set()

    def _hang(self, hooks: ExitStack) -> None:
        self._to_come = {site for site, _ in self.edits}
        for site, edit in self.edits:
            layer = self._layers[site]
            hooks.callback(layer.register_forward_hook(self._editor(site, edit)).remove)
            listeners_last(layer)

    def _editor(self, site: Site, edit: TextChange) -> Callable[..., Tensor]:
        def change(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            self._to_come.discard(site)
            return fitting(site, edit(output), output)

        return change

    def _check_end(self) -> None:
        if self._to_come:
            raise FluxIRError(
                f"no prompt was encoded while these were to be changed: {named(self._to_come)}", hint=NOT_CALLED
            )


def fitting(site: Site, new: object, value: Tokens) -> Tokens:
    """What an edit gave. Raises FluxIRError unless it can stand in the value's place."""
    if not isinstance(new, Tensor):
        raise FluxIRError(
            f"what stands in place of {site} must be a tensor: got {type(new).__name__}",
            hint="give the value back, also where it is left as it is",
        )
    for what in ("shape", "dtype", "device"):
        has, needs = getattr(new, what), getattr(value, what)
        if has != needs:
            got, wanted = (list(x) if what == "shape" else x for x in (has, needs))
            raise FluxIRError(
                f"what stands in place of {site} must have the {what} {wanted}: got {got}",
                hint="new.to(value) gives it the dtype and the device of the value" if what != "shape" else None,
            )
    return new


def check_edit(site: Site, edit: object) -> None:
    """Raises FluxIRError for what cannot be called with a value and a step, before anything is sampled."""
    try:
        if callable(edit):
            signature(edit).bind(None, 0)
            return
    except ValueError:  # written in C: it does not say what it takes
        return
    except TypeError:
        pass
    raise FluxIRError(
        f"what stands in place of {site} must be a function of a value and a step: got {edit!r}",
        hint="lambda value, step: 0 * value, for example, sets it to zero",
    )
