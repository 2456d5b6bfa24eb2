"""Fits a tuned lens to a collection, and says how well it and simpler readings tell the velocity of other prompts.

Every number is an error of the velocity relative to its variance: sum |v_hat - v|^2 / sum |v - mean v|^2 over the image
tokens of held-out prompts, mean v being that of each channel: 0 is the sampler's answer, 1 no better than a constant.
One block and step is fitted at a time, so memory is flat in prompts: what grows with blocks is the lens itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_ir.activations.shard_source import ShardSource
from flux_ir.errors import FluxIRError
from flux_ir.lens.ridge import AffineMap, RidgeSums
from flux_ir.models.architecture import Transformer
from flux_ir.sampling.denoise import per_sample
from flux_ir.shapes import ImgTokens, Pooled, Velocity
from flux_ir.sites import Site

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Ridge strengths that are tried, in units of the variance of all rows in an average channel (`RidgeSums.solve`)."""
IMAGES_AT_ONCE = 16
CHOOSING = 0.2
"""The share of the training prompts on which the strength is chosen."""

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


@dataclass(frozen=True)
class FitData:
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


class Fitted(NamedTuple):
    """The map of one block and step, and the strength it was fitted with; both None where no map did better."""

    added: AffineMap | None
    strength: float | None

    def on_cpu(self) -> "Fitted":
        """The same in host memory."""
        added = None if self.added is None else AffineMap(*(part.cpu() for part in self.added))
        return Fitted(added, self.strength)


@torch.no_grad()
def fit_map(data: FitData, model: Transformer, site: Site | None, step: int) -> Fitted:
    """The map of one block (None: the network's input) at one step.

    Fitted on one part of the training prompts with every strength; the one whose velocity is best on the other part is
    fitted again on both. No map at all is one of the choices, and the only one at the last block.
    """
    if site == data.last:
        return Fitted(None, None)
    sums = {part: RidgeSums(model.params.hidden_size, model.img_in.weight.device) for part in ("fit", "choose")}
    for part, of_part in sums.items():
        for rows in data.rows(model, site, step, part):  # type: ignore[arg-type]
            x = rows.block.flatten(0, 1).double()
            of_part.add(x, rows.last.flatten(0, 1).double() - x)
    candidates: list[tuple[float | None, AffineMap | None]] = [(None, None)]
    candidates += [(strength, _float32(sums["fit"].solve(strength))) for strength in STRENGTHS]
    errors = [0.0] * len(candidates)
    for rows in data.rows(model, site, step, "choose"):
        for number, (_, candidate) in enumerate(candidates):
            errors[number] += _squares(_read(model, rows, candidate) - rows.velocity)
    strength, best = candidates[int(np.argmin(errors))]
    if best is None or strength is None:
        return Fitted(None, None)
    sums["fit"].add_sums(sums["choose"])
    return Fitted(_float32(sums["fit"].solve(strength)), strength)


class SiteErrors(NamedTuple):
    """Relative errors of the velocity at one block, on held-out prompts: [step]."""

    plain: Sequence[float]
    tuned: Sequence[float]
    transfer: Sequence[Sequence[float]]
    """[step the map was fitted at][step it is judged at]."""


@torch.no_grad()
def judge_site(
    data: FitData, model: Transformer, site: Site | None, steps: Sequence[int], maps: Mapping[int, AffineMap | None]
) -> SiteErrors:
    """One block (None: the network's input) at all steps, read as it is and through the map of every step."""
    plain: list[float] = []
    columns: list[list[float]] = []
    for step in steps:
        spread, of_plain, of_maps = _Spread(), 0.0, [0.0] * len(steps)
        for rows in data.rows(model, site, step, "held_out"):
            spread.add(rows.velocity)
            of_plain += _squares(_read(model, rows, None) - rows.velocity)
            for number, at in enumerate(steps):
                of_maps[number] += _squares(_read(model, rows, maps[at]) - rows.velocity)
        plain.append(of_plain / spread.total)
        columns.append([squares / spread.total for squares in of_maps])
    transfer = [[columns[judged][fitted] for judged in range(len(steps))] for fitted in range(len(steps))]
    return SiteErrors(plain, [transfer[number][number] for number in range(len(steps))], transfer)


@torch.no_grad()
def judge_mean(data: FitData, model: Transformer, steps: Sequence[int]) -> list[float]:
    """The error of the mean velocity of the training prompts (a number per channel), by step."""
    errors = []
    for step in steps:
        trained, spread = _Spread(), _Spread()
        for rows in data.rows(model, data.last, step, "fit", "choose"):
            trained.add(rows.velocity)
        for rows in data.rows(model, data.last, step, "held_out"):
            spread.add(rows.velocity)
        off = trained.mean - spread.mean
        errors.append(1 + (spread.rows * off.square().sum() / spread.total).item())
    return errors


class _Spread:
    """Mean and sum of squared deviations of velocities, over all tokens; float64."""

    def __init__(self) -> None:
        self.rows, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, velocity: Velocity) -> None:
        values = velocity.flatten(0, 1).double().cpu()
        self.rows += len(values)
        self.sums, self.squares = self.sums + values.sum(0), self.squares + values.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sums / self.rows

    @property
    def total(self) -> float:
        return (self.squares - self.rows * self.mean.square()).sum().item()


def _read(model: Transformer, rows: Rows, added: AffineMap | None) -> Velocity:
    return model.read_out(rows.block if added is None else added.applied_to(rows.block), rows.vec)


def _squares(difference: Tensor) -> float:
    return difference.double().square().sum().item()


def _float32(added: AffineMap) -> AffineMap:
    return AffineMap(*(part.float() for part in added))
