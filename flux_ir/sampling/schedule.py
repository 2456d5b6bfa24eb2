"""The flow times between which the sampler steps, from 1 (noise) down to 0 (image)."""

import math

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.registry import ModelSpec

SHIFT_TOKENS = (256, 4096)  # image tokens between which the shift is interpolated


def get_schedule(
    num_steps: int,
    image_seq_len: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    shift: bool = True,  # noqa: FBT001, FBT002
) -> list[float]:
    """`num_steps + 1` flow times from 1 to 0, evenly spaced or, with `shift`, spending more steps near the noise.

    The shift mu grows linearly from `base_shift` at 256 image tokens to `max_shift` at 4096: larger pictures keep their
    layout visible at higher noise (Esser et al., 2024, section 5.3.2). Computed in float32, so the times have the bits
    of the published sampler's.

    Raises FluxIRError if there is no step.
    """
    if num_steps < 1:
        raise FluxIRError(f"num_steps must be at least 1: got {num_steps}", hint="try --num_steps 4")
    times = torch.linspace(1, 0, num_steps + 1)
    if shift:
        low, high = SHIFT_TOKENS
        slope = (max_shift - base_shift) / (high - low)
        times = shift_times(times, slope * image_seq_len + (base_shift - slope * low))
    return times.tolist()


def schedule_of(spec: ModelSpec, num_steps: int, img_tokens: int) -> list[float]:
    """The `num_steps + 1` flow times, from 1 to 0, that this model is sampled at for pictures of so many tokens.

    Raises FluxIRError if there is no step.
    """
    if spec.schedule_shift == "empirical":
        even = get_schedule(num_steps, img_tokens, shift=False)
        return shift_times(torch.tensor(even), empirical_mu(num_steps, img_tokens)).tolist()
    return get_schedule(num_steps, img_tokens, shift=spec.schedule_shift == "linear")


def empirical_mu(num_steps: int, img_tokens: int) -> float:
    """FLUX.2's shift: a line in the image tokens for 10 steps, one for 200, and in between a line in the steps.

    Both lines are fits of the published sampler. Above 4300 tokens the second one holds for any number of steps.
    """
    of_200 = 0.00016927 * img_tokens + 0.45666666
    if img_tokens > 4300:
        return of_200
    of_10 = 8.73809524e-05 * img_tokens + 1.89833333
    slope = (of_200 - of_10) / 190
    return slope * num_steps + (of_200 - 200 * slope)


def first_step(num_steps: int, strength: float, flag: str = "strength") -> int:
    """The step that a run begins with which is given a picture: of `num_steps`, the last `strength` are run, rounded
    up. Steps keep the numbers they have without a picture, so that a number stands for one flow time.

    Raises FluxIRError unless 0 < strength <= 1; `flag` is its name in messages.
    """
    if not 0 < strength <= 1:
        raise FluxIRError(
            f"--{flag} must be above 0 and at most 1: got {strength:g}",
            hint="1 keeps nothing of the picture; 0 would be the picture itself, decoded from its own latent",
        )
    return math.floor(round(num_steps * (1 - strength), 6))  # 10 (1 - 0.9) is 1, and not a little less


def shift_times(times: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1/t - 1): 1 stays 1, 0 stays 0, and times between move towards the noise for positive mu."""
    return math.exp(mu) / (math.exp(mu) + (1 / times - 1))
