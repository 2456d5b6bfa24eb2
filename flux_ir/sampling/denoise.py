"""The Euler loop, as an iterator of steps. It saves nothing, draws nothing and knows of no one watching."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from flux_ir.models.transformer import Flux
from flux_ir.shapes import PackedLatent, PerSample, Pooled, PositionIds, TxtTokens, Velocity


class Step(NamedTuple):
    """One Euler step, numbered from 0: the state it began with, the velocity predicted there, the state it went to."""

    number: int
    t_curr: float
    t_prev: float
    before: PackedLatent
    velocity: Velocity
    after: PackedLatent


def euler_step(img: PackedLatent, velocity: Velocity, t_curr: float, t_prev: float) -> PackedLatent:
    """The state at `t_prev`, going straight along `velocity` from the state `img` at `t_curr`."""
    return img + (t_prev - t_curr) * velocity


def clean_estimate(img: PackedLatent, velocity: Velocity, t_curr: float) -> PackedLatent:
    """The image (t = 0) that `velocity` points to from the state `img` at `t_curr`."""
    return img - t_curr * velocity


def per_sample(value: float, img: PackedLatent) -> PerSample:
    """A flow time or guidance strength as the network takes it: once per picture, in the dtype of the state."""
    return torch.full((img.shape[0],), value, device=img.device, dtype=img.dtype)


@torch.no_grad()
def denoise(
    model: Flux,
    img: PackedLatent,
    img_ids: PositionIds,
    txt: TxtTokens,
    txt_ids: PositionIds,
    y: Pooled,
    timesteps: list[float],
    guidance: float,
) -> Iterator[Step]:
    """Walk `img` from `timesteps[0]` to the last of them, one model call and one yielded `Step` per pair of times.

    `guidance` is the distilled guidance strength; models without a guidance input never see it.
    """
    for number, (t_curr, t_prev) in enumerate(pairwise(timesteps)):
        velocity = model(img, img_ids, txt, txt_ids, per_sample(t_curr, img), y, per_sample(guidance, img))
        after = euler_step(img, velocity, t_curr, t_prev)
        yield Step(number, t_curr, t_prev, img, velocity, after)
        img = after
