"""Changes what a finished transformer computes at its sites, while it runs: the writing counterpart of `recorder`.

    with Intervention(model, {"single.6.img": lambda value, step: 0 * value}):
        *_, last = sample(model, inputs, timesteps, guidance)

Interventions compose with each other in the order they were entered, and with recorders in any order: a recorder sees
what is computed with, which is the value the last intervention gave.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from inspect import signature
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.suite import Suite
from flux_ir.recording.recorder import (
    NOT_CALLED,
    Listener,
    block_input,
    check_not_compiled,
    forward_arguments,
    module_of,
    no_forward,
    rows_of,
    stream_of,
)
from flux_ir.shapes import Tokens
from flux_ir.sites import Site, sites_of

Edit = Callable[[Tokens, int], Tokens]
"""Takes what a site computed at a step, [batch, tokens, d], and gives what shall stand in its place.

That is a tensor of the same shape and dtype on the same device. The value may also be changed in place and given back.
"""


class Intervention:
    """Puts `edit(value, step)` where a site computed `value`, in every forward of `model` while its `with` lasts.

    One forward is one step, counted from 0; `steps` are the steps to change (None: all). The keys of `edits` are sites,
    as `Site` or as text, which may be a pattern; a site that several keys name is edited by one after the other. All
    sites can be written: a part of a block before its gate (`attn`, `mlp`, `neurons`, `out`), what the block adds
    (`update`), what it puts out, and one half of these in single blocks.

    An edit that gives back what it got changes no bit. No hook is left behind, whatever raises.

    Raises FluxIRError for sites that the model does not have, for a compiled model, for a site that a step did not
    come to, when the next step begins, for an edit that does not take a value and a step, and within a forward for one
    that gives anything but a tensor of the same shape, dtype and device.
    """

    def __init__(
        self, model: Flux | Suite, edits: Mapping[str | Site, Edit], *, steps: Collection[int] | None = None
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
        self.model, self.steps = flux, None if steps is None else frozenset(steps)
        self._hooks: ExitStack | None = None
        self._step, self._txt_tokens, self._changing = -1, 0, False
        self._to_come: set[Site] = set()

    def __enter__(self) -> "Intervention":
        if self._hooks is not None:
            raise RuntimeError("this intervention is already entered")
        check_not_compiled(self.model, [site for site, _ in self.edits])
        self._step, self._changing = -1, False
        self._to_come.clear()
        with ExitStack() as hooks:  # undone at once if one of them cannot be set
            hooks.callback(self.model.register_forward_pre_hook(self._begin_step, with_kwargs=True).remove)
            for site, edit in self.edits:
                module = self.model.get_submodule(module_of(site))
                handle = module.register_forward_hook(self._editor(site, edit), with_kwargs=True)
                hooks.callback(handle.remove)
                _listeners_last(module)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()
        if kind is None and self._step < 0:
            raise no_forward("intervention")

    def _begin_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._to_come:
            missing = ", ".join(map(str, sorted(self._to_come)))
            raise FluxIRError(f"step {self._step} was not changed at {missing}", hint=NOT_CALLED)
        self._step += 1
        self._changing = self.steps is None or self._step in self.steps
        self._to_come = {site for site, _ in self.edits} if self._changing else set()
        self._txt_tokens = forward_arguments(model, args, kwargs)["txt"].shape[1]

    def _editor(self, site: Site, edit: Edit) -> Callable[..., Any]:
        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._changing:
                return output
            self._to_come.discard(site)
            current = stream_of(site, output)
            rows = rows_of(site, current.shape[1], self._txt_tokens)
            if site.part == "update":
                before = block_input(site, args, kwargs)[:, rows]
                part = self._edited_update(site, edit, before, current[:, rows])
            else:
                given = current[:, rows]
                part = self._edited(site, edit, given)
                if part is given:
                    return output
            if part.shape[1] < current.shape[1]:
                part = torch.cat([current[:, : rows.start], part, current[:, rows.stop :]], dim=1)
            if not isinstance(output, tuple):
                return part
            return (part, output[1]) if site.stream == "img" else (output[0], part)

        return change

    def _edited_update(self, site: Site, edit: Edit, before: Tokens, after: Tokens) -> Tokens:
        """The block's output with another update. Where the edit changes nothing the output keeps its bits, which
        input + (output - input) would not: it is rounded twice.
        """
        update = after - before
        new = self._edited(site, edit, update.clone())
        kept = (new == update) | (new.isnan() & update.isnan())
        return torch.where(kept, after, before + new)

    def _edited(self, site: Site, edit: Edit, value: Tokens) -> Tokens:
        new: object = edit(value, self._step)
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


def _listeners_last(module: nn.Module) -> None:
    """Moves what recorders have set behind everything else, in the order torch calls hooks of a module."""
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Listener)]:
        hooks[key] = hooks.pop(key)
