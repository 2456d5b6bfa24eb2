"""The Jacobian lens of a flow model: the network above a block, replaced by its mean linearisation.

A block's image tokens h are read as v_mean + J (h - h_mean), J being the mean over tokens and prompts of the derivative
of the velocity v by h through all later blocks (for language models: Anthropic, 2026). Nothing is trained. v has few
channels per token, 64 in FLUX.1, so J is [64, d] and takes 64 gradients of one forward.

Both means are needed. LayerNorm ignores the length of a token, so that J h itself vanishes: of the last block exactly,
but for LayerNorm's epsilon. There are two versions of J:

    same      d v(p) / d h(p): what a token does to the velocity of its own patch
    summed    sum over p of d v(p) / d h(q): what a token does to all velocities, its own and those of others

At the last block no token sees another one: the two are equal, and for each token they are the last layer's Jacobian.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.lens.fitted import FittedLens, Place, image_half, read_lens_file
from flux_ir.lens.judge import LensData, Read, Spread
from flux_ir.models.architecture import Transformer
from flux_ir.recording.intervention import Change, Intervention
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import Inputs
from flux_ir.shapes import Conditioning, ImgTokens, Tokens, Velocity
from flux_ir.sites import Site

Version = Literal["same", "summed"]
PullBack = Float[Tensor, "pulls batch img d"]
PerImage = Float[Tensor, "batch packed d"]
Field = Float[Tensor, "batch img"]


class JacobianMap(NamedTuple):
    """The linearisation of one block and step. Its fields are the last words of the names in the file."""

    same: Tensor
    """[packed, d]: the mean over tokens p of d v(p) / d h(p)."""
    summed: Tensor
    """[packed, d]: the mean over tokens q of the sum over p of d v(p) / d h(q)."""
    mean_img: Tensor
    """[d]: the mean token of the block."""
    mean_velocity: Tensor
    """[packed]: the mean velocity."""

    def on(self, device: torch.device) -> "JacobianMap":
        """The same on a device."""
        return JacobianMap(*(part.to(device) for part in self))

    def through(self, version: Version) -> Read:
        """Reads a block by one of the two versions."""
        return lambda rows: self.read(rows.block, version)

    def read(self, img: ImgTokens, version: Version) -> Velocity:
        """v_mean + J (h - h_mean), computed in float32, in the dtype of the tokens."""
        jacobian = self.same if version == "same" else self.summed
        away = img.to(self.mean_img.dtype) - self.mean_img
        return (self.mean_velocity + away @ jacobian.T).to(img.dtype)


@dataclass(frozen=True)
class JacobianLens(FittedLens):
    """The linearisations of a lens, and what they were computed for."""

    kind: ClassVar[str] = "Jacobian"
    file_name: ClassVar[str] = "jacobian.safetensors"
    format: ClassVar[str] = "flux_ir Jacobian lens 1"

    maps: Mapping[Place, JacobianMap]
    version: Version = "same"

    @property
    def places(self) -> Collection[Place]:
        return self.maps.keys()

    @property
    def width(self) -> int | None:
        return next((found.mean_img.shape[0] for found in self.maps.values()), None)

    def velocity(self, model: Transformer, site: Site, step: int, img: ImgTokens, vec: Conditioning) -> Velocity:
        """The linearisation at the mean; the last layer is part of it."""
        return self.maps[image_half(site), step].on(img.device).read(img, self.version)

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Both versions, and the means."""
        return {
            f"{site}/step_{step}/{part}": tensor
            for (site, step), found in self.maps.items()
            for part, tensor in found._asdict().items()
        }, {}


def load_jacobian_lens(path: str | Path, version: Version = "same") -> JacobianLens:
    """The lens in a file or a folder of `flux-ir train-lens`. Raises FluxIRError for what is none."""
    settings, parts = read_lens_file(path, JacobianLens, JacobianMap._fields)
    return JacobianLens(settings, {place: JacobianMap(**tensors) for place, tensors in parts.items()}, version)


# ---- Derivatives of the velocity by what blocks put out


class Linearised(NamedTuple):
    """One forward that kept its graph."""

    velocity: Velocity
    leaves: Mapping[Site, Tokens]
    """Zeros that were added to what each block put out: a gradient by them is one by the block's image tokens."""

    def pull_back(self, pulls: Tensor, at_once: int | None = None) -> Iterator[dict[Site, PullBack]]:
        """The gradients of u . v for vectors u, [pulls, batch, img, packed], by the tokens of every site: some at a
        time.

        `at_once` of them are pulled back together (None: 1 on a CPU, where this is fastest, 8 on a GPU, where weights
        are then read once for all). The pictures of a batch do not see each other, so each has its own gradient.
        """
        at_once = at_once or (1 if self.velocity.device.type == "cpu" else 8)
        for some in torch.split(pulls, at_once):
            together = len(some) > 1
            found = torch.autograd.grad(
                self.velocity,
                list(self.leaves.values()),
                some if together else some[0],
                retain_graph=True,
                is_grads_batched=together,
            )
            yield {site: one if together else one[None] for site, one in zip(self.leaves, found, strict=True)}


def linearise(model: Transformer, sites: Sequence[Site], inputs: Inputs, t_curr: float, guidance: float) -> Linearised:
    """Runs one forward from the state `inputs.img` at `t_curr` with gradients by the image tokens of these sites.

    Every derivative is a total one, through all later blocks, with the text tokens of the same block held.
    """
    leaves: dict[Site, Tokens] = {}

    def add_zeros(site: Site, value: Tokens, step: int) -> Tokens:
        leaves[site] = torch.zeros_like(value, requires_grad=True)
        return value + leaves[site]

    changes: dict[str | Site, Change] = {site: partial(add_zeros, site) for site in sites}
    img = inputs.img
    with torch.enable_grad(), Intervention(model, changes):
        velocity = model(
            img,
            inputs.img_ids,
            inputs.txt,
            inputs.txt_ids,
            per_sample(t_curr, img),
            inputs.y,
            None if model.guidance_in is None else per_sample(guidance, img),
        )
    return Linearised(velocity, {site: leaves[site] for site in sites})


def jacobians_of(
    forward: Linearised, generator: torch.Generator, at_once: int | None = None
) -> dict[Site, dict[Version, PerImage]]:
    """Both versions at every site, as means over the tokens of each picture: [batch, packed, d].

    `summed` is exact: u is one channel of all tokens. `same` is an estimate without bias (Hutchinson, 1990): u has a
    random sign at each token, and the gradient is multiplied by the sign of its own, so that what other tokens did has
    mean zero. Where no token sees another one it is exact too.
    """
    batch, img, packed = forward.velocity.shape
    channels = torch.eye(packed).to(forward.velocity)[:, None, None, :].expand(packed, batch, img, packed)
    signs = (torch.randint(0, 2, (batch, img, 1), generator=generator) * 2 - 1).to(forward.velocity)
    found: dict[Site, dict[Version, PerImage]] = {site: {} for site in forward.leaves}
    for version, sign in (("same", signs), ("summed", torch.ones_like(signs))):
        rows: dict[Site, list[Tensor]] = {site: [] for site in forward.leaves}
        for part in forward.pull_back(channels * sign, at_once):
            for site, gradients in part.items():
                # What a summed gradient is multiplied with is one: it belongs to all tokens, and not to its own.
                rows[site].append((gradients * sign).mean(dim=2))
        for site, parts in rows.items():
            found[site][version] = torch.cat(parts).transpose(0, 1)  # type: ignore[index]
    return found


def receptive_fields(forward: Linearised, token: int, at_once: int | None = None) -> dict[Site, Field]:
    """How much every token of a block does to the velocity of one: |d v(token) / d h(q)| for all q, [batch, img].

    The norm is Frobenius's, over the channels of both. Raises FluxIRError for a token that there is not.
    """
    batch, img, packed = forward.velocity.shape
    if not 0 <= token < img:
        raise FluxIRError(f"the picture has the tokens 0 to {img - 1}: got {token}", hint="choose one of them")
    pulls = torch.zeros(packed, batch, img, packed).to(forward.velocity)
    pulls[:, :, token] = torch.eye(packed).to(pulls)[:, None]
    squares = {site: torch.zeros(batch, img, dtype=torch.float64) for site in forward.leaves}
    for part in forward.pull_back(pulls, at_once):
        for site, gradients in part.items():
            squares[site] += gradients.double().square().sum(dim=(0, 3)).cpu()
    return {site: total.sqrt() for site, total in squares.items()}


# ---- How it is computed over prompts


class MeanJacobian:
    """The mean over pictures of [packed, d], and how far it may be off; float64 on the host."""

    def __init__(self) -> None:
        self.pictures, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: PerImage) -> None:
        """More pictures."""
        values = values.double().cpu()
        self.pictures += len(values)
        self.sums, self.squares = self.sums + values.sum(0), self.squares + values.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """[packed, d]."""
        return self.sums / self.pictures

    @property
    def relative_error(self) -> float | None:
        """The standard error of the mean over pictures, as a share of its own norm; None for a single picture."""
        if self.pictures < 2:
            return None
        variance = (self.squares / self.pictures - self.mean.square()) / (self.pictures - 1)
        return (variance.clamp_min(0).sum().sqrt() / self.mean.norm()).item()


class Computed(NamedTuple):
    """What was found at one step."""

    maps: Mapping[Site, JacobianMap]
    relative_errors: Mapping[Site, Mapping[Version, float | None]]
    fields: Mapping[Site, Tensor]
    """[img]: the receptive field of the token that was asked for, a mean over pictures."""


def compute_jacobians(
    data: LensData,
    model: Transformer,
    sites: Sequence[Site],
    step: int,
    batches: Iterable[Inputs],
    token: int,
    generator: torch.Generator,
) -> Computed:
    """The lens of one step, from the states of some training generations: one forward for each batch of them.

    The means of tokens and velocities are those of all training generations.
    """
    means: dict[Site, dict[Version, MeanJacobian]] = {
        site: {"same": MeanJacobian(), "summed": MeanJacobian()} for site in sites
    }
    fields: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for inputs in batches:
        forward = linearise(model, sites, inputs, data.timesteps[step], data.guidance)
        for site, versions in jacobians_of(forward, generator).items():
            for version, values in versions.items():
                means[site][version].add(values)
        for site, field in receptive_fields(forward, token).items():
            fields[site].append(field)
        del forward  # its graph goes before the next one comes
    maps = {}
    for site in sites:
        tokens, velocities = Spread(), Spread()
        for rows in data.rows(model, site, step, "fit", "choose"):
            tokens.add(rows.block)
            velocities.add(rows.velocity)
        jacobian = JacobianMap(means[site]["same"].mean, means[site]["summed"].mean, tokens.mean, velocities.mean)
        maps[site] = JacobianMap(*(part.float() for part in jacobian))
    errors = {site: {version: mean.relative_error for version, mean in means[site].items()} for site in sites}
    return Computed(maps, errors, {site: torch.cat(parts).mean(0) for site, parts in fields.items()})
