"""The generations of a collection, split by prompt, and how well readings tell the velocity of prompts they never saw.

Every number is an error of the velocity relative to its variance: sum |v_hat - v|^2 / sum |v - mean v|^2 over the image
tokens of held-out prompts, mean v being that of each channel: 0 is the sampler's answer, 1 no better than a constant.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.shard_source import ShardSource
from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.sampling.denoise import per_sample
from flux_ir.shapes import ImgTokens, Pooled, Velocity
from flux_ir.sites import Site

IMAGES_AT_ONCE = 16
CHOOSING = 0.2
"""The share of the training prompts on which the strength of a ridge is chosen."""

Part = Literal["fit", "choose", "held_out"]


class Rows(NamedTuple):
    """Some generations at one block and step, float32: what is mapped, what it should become, and what is read."""

    block: ImgTokens
    """The image tokens of the block; of the network's input, img_in of the noisy latent."""
    last: ImgTokens
    """Those of the last block."""
    vec: Tensor
    """[batch, d]: what the last layer is modulated with."""
    velocity: Velocity
    """The sampler's: read from the last block."""


Read = Callable[[Rows], Velocity]
"""A way to read a velocity from a block."""


@dataclass(frozen=True)
class LensData:
    """The generations of a collection, each in one part: all those of a prompt in the same."""

    source: ShardSource
    parts: Sequence[Part]
    """By generation."""
    pooled: Pooled
    """By generation."""
    timesteps: Sequence[float]
    guidance: float
    last: Site

    @torch.no_grad()
    def rows(self, model: Transformer, site: Site | None, step: int, *parts: Part) -> Iterator[Rows]:
        """The generations of these parts, some at a time; `site` None is the network's input."""
        device = model.img_in.weight.device
        for run in self.source.runs:
            for first in range(run.start, run.stop, IMAGES_AT_ONCE):
                images = range(first, min(first + IMAGES_AT_ONCE, run.stop))
                chosen = [row for row, image in enumerate(images) if self.parts[image] in parts]
                if not chosen:
                    continue
                last = self.source.read_run(images, self.last, step).floats()[chosen].to(device, torch.float32)
                if site is None:
                    block = model.img_in(self.source.noisy(images, step)[chosen].to(device, torch.float32))
                elif site == self.last:
                    block = last
                else:
                    block = self.source.read_run(images, site, step).floats()[chosen].to(device, torch.float32)
                y = self.pooled[[images[row] for row in chosen]].to(device, torch.float32)
                guidance = None if model.guidance_in is None else per_sample(self.guidance, last)
                vec = model.conditioning(per_sample(self.timesteps[step], last), y, guidance)
                yield Rows(block, last, vec, model.read_out(last, vec))


def split_prompts(prompts: Sequence[str], held_out: float) -> list[Part]:
    """Which part each generation belongs to: whole prompts, drawn at random, always with the same seed.

    Raises FluxIRError for fewer than three prompts: each part needs one.
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 3:
        raise FluxIRError(
            f"a lens is fitted, chosen and judged on different prompts, so it takes 3 or more: got {len(different)}",
            hint="collect more prompts: a few hundred",
        )
    order = np.random.default_rng(0).permutation(len(different))
    judged = min(len(different) - 2, max(1, round(held_out * len(different))))
    choosing = min(len(different) - judged - 1, max(1, round(CHOOSING * (len(different) - judged))))
    part_of: dict[str, Part] = {}
    for place, number in enumerate(order):
        part_of[different[number]] = "held_out" if place < judged else "choose" if place < judged + choosing else "fit"
    return [part_of[prompt] for prompt in prompts]


# ---- Errors


def plain(model: Transformer) -> Read:
    """The plain lens: the last layer, applied to the block as it is."""
    return lambda rows: model.read_out(rows.block, rows.vec)


class Spread:
    """Mean and sum of squared deviations of some values [rows, channels], which may come in batches; float64."""

    def __init__(self) -> None:
        self.rows, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """More of them: [..., channels]."""
        values = values.flatten(0, -2).double().cpu()
        self.rows += len(values)
        self.sums, self.squares = self.sums + values.sum(0), self.squares + values.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Of each channel."""
        return self.sums / self.rows

    @property
    def total(self) -> float:
        """The sum of squared deviations from the mean of each channel."""
        return (self.squares - self.rows * self.mean.square()).sum().item()


@torch.no_grad()
def squared_errors(batches: Iterable[Rows], readings: Sequence[Read]) -> tuple[list[float], Spread]:
    """The sum of squared errors of each reading's velocity, and how the velocity itself is spread."""
    errors, spread = [0.0] * len(readings), Spread()
    for rows in batches:
        spread.add(rows.velocity)
        for number, read in enumerate(readings):
            errors[number] += (read(rows) - rows.velocity).double().square().sum().item()
    return errors, spread


def relative_errors(
    data: LensData, model: Transformer, site: Site | None, step: int, readings: Sequence[Read]
) -> list[float]:
    """The error of each reading of one block (None: the network's input) at one step, on held-out prompts."""
    errors, spread = squared_errors(data.rows(model, site, step, "held_out"), readings)
    return [squares / spread.total for squares in errors]


def judge_mean(data: LensData, model: Transformer, steps: Sequence[int]) -> list[float]:
    """The error of the mean velocity of the training prompts (a number per channel), by step."""
    errors = []
    for step in steps:
        trained, spread = Spread(), Spread()
        for rows in data.rows(model, data.last, step, "fit", "choose"):
            trained.add(rows.velocity)
        for rows in data.rows(model, data.last, step, "held_out"):
            spread.add(rows.velocity)
        off = trained.mean - spread.mean
        errors.append(1 + (spread.rows * off.square().sum() / spread.total).item())
    return errors
