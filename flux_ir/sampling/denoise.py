"""The Euler loop, as an iterator of steps. It saves nothing, draws nothing and knows of no one watching."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.sharded import ShardedFlux
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.shapes import Conditioning, CondLatent, Context, PackedLatent, PerSample, Pooled, PositionIds, Velocity


class Step(NamedTuple):
    """One Euler step, numbered from 0: the state it began with, the velocity predicted there, the state it went to."""

    number: int
    t_curr: float
    """Flow time the step began at: 1 is noise, 0 the image."""
    t_prev: float
    """Flow time it went to."""
    before: PackedLatent
    """[batch, tokens, 4 x channels]: one token for 2 x 2 places of the latent, as in what follows."""
    velocity: Velocity
    """[latent units per unit of flow time]"""
    after: PackedLatent
    """before + (t_prev - t_curr) velocity; that of the last step is the finished latent."""


class StateNotFiniteError(FluxIRError):
    """A state of the sampler that holds NaN or infinity. `row` is the first picture of the batch that it is so for."""

    def __init__(self, message: str, *, hint: str, row: int) -> None:
        super().__init__(message, hint=hint)
        self.row = row


def euler_step(img: PackedLatent, velocity: Velocity, t_curr: float, t_prev: float) -> PackedLatent:
    """The state at `t_prev`, going straight along `velocity` from the state `img` at `t_curr`."""
    # Times are Python numbers: the product and the sum are rounded to the state's dtype, as in the published sampler.
    return img + (t_prev - t_curr) * velocity


def clean_estimate(img: PackedLatent, velocity: Velocity, t_curr: float) -> PackedLatent:
    """The image (t = 0) that `velocity` points to from the state `img` at `t_curr`."""
    return img - t_curr * velocity


def per_sample(value: float, img: PackedLatent) -> PerSample:
    """A flow time or guidance strength as the network takes it: once per picture, in the dtype of the state."""
    return torch.full((img.shape[0],), value, device=img.device, dtype=img.dtype)


@torch.no_grad()
def denoise(
    model: Transformer,
    img: PackedLatent,
    img_ids: PositionIds,
    txt: Context,
    txt_ids: PositionIds,
    y: Pooled,
    timesteps: list[float],
    guidance: float,
    *,
    cond: CondLatent | None = None,
    cond_ids: PositionIds | None = None,
    first_step: int = 0,
) -> Iterator[Step]:
    """Walk `img` from `timesteps[first_step]` to the last, one model call and one yielded `Step` per pair of times.

    `guidance` is the distilled guidance strength; models without a guidance input never see it. `cond` are the tokens
    of a reference picture, the same at every step.

    Raises StateNotFiniteError for a state that is not finite, naming the first step and block that made it so. On a GPU
    that may be one step late, so that nothing waits for it; the last step is not yielded before its state is known.
    """
    times = list(pairwise(timesteps))[first_step:]
    checks: list[_FinitenessCheck] = []  # of states that are not known to be finite yet: two at most
    strength = per_sample(guidance, img)
    # Weights that are streamed come once for what needs nothing but the times.
    ahead: list[Conditioning] = []
    if isinstance(model, StreamedFlux):
        ahead = model.modulate_ahead([per_sample(time, img) for time, _ in times], y, strength)
    for number, (t_curr, t_prev) in enumerate(times, start=first_step):
        known = {"vec": ahead[number - first_step]} if ahead else {}
        velocity = model(img, img_ids, txt, txt_ids, per_sample(t_curr, img), y, strength, cond, cond_ids, **known)
        after = euler_step(img, velocity, t_curr, t_prev)
        step = Step(number, t_curr, t_prev, img, velocity, after)
        checks.append(_FinitenessCheck(step))
        # On a GPU the newest check waits for the next turn, but for the last step's: asking now would stall the device.
        while checks and (len(checks) > 1 or not checks[0].is_late or number == len(timesteps) - 2):
            if not (check := checks.pop(0)).is_finite():
                raise _not_finite(model, check.step, img_ids, txt, txt_ids, y, guidance, cond, cond_ids)
        yield step
        img = after


class _FinitenessCheck:
    """Whether the state after a step is finite: asked at once, answered when the device has come to it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._answer = step.after.isfinite().all()
        self._arrived: torch.cuda.Event | None = None
        if self._answer.device.type == "cuda":
            # Into pinned memory, with an event of its own: asking would else wait for all that was queued since.
            answer = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._answer = answer.copy_(self._answer, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(step.after.device))

    @property
    def is_late(self) -> bool:
        """Whether asking at once would wait for the device."""
        return self._arrived is not None

    def is_finite(self) -> bool:
        """The answer; waits until this step is computed, and for nothing that comes after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._answer)


class _FirstNotFinite(Exception):  # noqa: N818 (a signal, not an error)
    """Ends the search at the first values that are not finite; its argument says whose they are."""


def _not_finite(
    model: Transformer,
    step: Step,
    img_ids: PositionIds,
    txt: Context,
    txt_ids: PositionIds,
    y: Pooled,
    guidance: float,
    cond: CondLatent | None,
    cond_ids: PositionIds | None,
) -> StateNotFiniteError:
    """What to say of a step whose state is not finite: it is computed once more, every block watched.

    In a network of its own that shares the weights, so that nobody who listens to `model` hears the step twice.
    """
    own: Transformer = getattr(model, "_orig_mod", model)  # a compiled model's own
    sound = step.after.flatten(1).isfinite().all(dim=1).tolist()
    if isinstance(own, ShardedFlux):
        return StateNotFiniteError(
            f"the sampler's state is not finite after step {step.number}, and the other ranks do not compute it again",
            hint="one process without --fsdp names the block that made it so",
            row=sound.index(False),
        )
    twin = own.twin()
    for name, module in twin.named_modules():
        if re.fullmatch(r"(img_in|txt_in|time_in|guidance_in|vector_in|final_layer|(double|single)_blocks\.\d+)", name):
            module.register_forward_hook(_watch(name.replace("_blocks", "")))
    img = step.before
    inputs = {"the state before it": img, "the text's embedding from T5": txt, "the text's embedding from CLIP": y}
    if cond is not None:
        inputs["the latent of the reference picture"] = cond
    try:
        for name, value in inputs.items():
            if not value.isfinite().all():
                raise _FirstNotFinite(name)
        at = per_sample(step.t_curr, img), y, per_sample(guidance, img)
        twin(img, img_ids, txt, txt_ids, *at, cond, cond_ids)
        whose = "nothing of the network by itself: something that changes it while it runs did this"
    except _FirstNotFinite as found:
        whose = str(found)
    return StateNotFiniteError(
        f"the sampler's state is not finite after step {step.number}: the first values that are not come from {whose}",
        hint="check the weights for infinity and NaN (a conversion to float16 makes such), or try --dtype float32",
        row=sound.index(False),
    )


def _watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        pair = output if isinstance(output, tuple) else (output,)
        for stream, value in zip(("img", "txt"), pair, strict=False):
            if not value.isfinite().all():
                raise _FirstNotFinite(f"{name}.{stream}" if len(pair) > 1 else name)

    return look
