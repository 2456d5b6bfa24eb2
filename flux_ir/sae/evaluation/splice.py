"""What the network makes of a reconstruction: x_hat put back into the forward pass, with the same noise and text.

Two numbers come of it. Velocities are compared step by step from the states of the untouched run, so that each step is
judged by itself: recovered = 1 - (L_splice - L_clean) / (L_ablate - L_clean), L the mean squared difference to the
untouched velocity (so L_clean = 0). Pictures are compared after whole runs, in which the differences add up.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import Suite
from flux_ir.recording.intervention import Intervention
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.evaluation.metrics import DENSE_VALUES, Reconstructor
from flux_ir.sampling.denoise import Step, per_sample
from flux_ir.sampling.generate import Inputs, sample
from flux_ir.shapes import PackedLatent, Pixels, Tokens
from flux_ir.sites import Site, as_site, check_sites

Replace = Callable[[Tokens], Tokens]
"""Makes the value that replaces a site's output, in its shape and dtype and on its device."""

CLEAN = "clean"


def spliced(
    model: Transformer | Suite,
    site: str | Site,
    replace: Replace | SparseAutoencoder,
    *,
    steps: Collection[int] | None = None,
    keep_error: bool = False,
) -> Intervention:
    """While the `with` lasts, `replace(x)` stands where `site` computed `x`: one forward is one step, counted from 0.

    An autoencoder stands for its reconstruction, with `keep_error` as in `reconstruction`. `steps` are the steps to
    replace at (None: all). A `replace` that gives back what it was given changes no bit.

    Raises FluxIRError for a site that the model does not have.
    """
    replacement = replace
    if isinstance(replace, SparseAutoencoder):
        replacement = reconstruction(replace, replace.config.d_sae, keep_error=keep_error)
    elif keep_error:
        raise ValueError("keep_error is for the reconstruction of an autoencoder")
    return Intervention(model, {as_site(site): lambda value, step: replacement(value)}, steps=steps)


def reconstruction(reconstructor: Reconstructor, d_sae: int, *, keep_error: bool = False) -> Replace:
    """Replaces tokens by x_hat, computed in float32 for as many tokens at a time as `d_sae` features allow.

    With `keep_error` the error x - x_hat is added, once: the result is x again, up to rounding.
    """
    at_once = max(1, DENSE_VALUES // d_sae)

    @torch.no_grad()
    def replace(value: Tokens) -> Tokens:
        rows = value.flatten(0, 1).float()
        parts = [reconstructor.decode(reconstructor.encode(part)) for part in torch.split(rows, at_once)]
        x_hat = torch.cat(parts).float()
        new = x_hat + (rows - x_hat) if keep_error else x_hat
        return new.to(value.dtype).reshape(value.shape)

    return replace


def zero_ablation(value: Tokens) -> Tokens:
    """Replaces every token by zeros."""
    return torch.zeros_like(value)


def mean_ablation(mean: Tensor) -> Replace:
    """Replaces every token by the same vector."""

    def replace(value: Tokens) -> Tokens:
        return mean.to(value).expand_as(value)

    return replace


def recovered(spliced: float, ablated: float, clean: float = 0.0) -> float:
    """1 - (L_splice - L_clean) / (L_ablate - L_clean): 1 as good as untouched, 0 as bad as ablated; NaN if both are."""
    return 1 - (spliced - clean) / (ablated - clean) if ablated != clean else math.nan


class SpliceNumbers(NamedTuple):
    """What became of one replacement, over all runs."""

    velocity_mse: float
    """Mean squared difference to the untouched velocity [(latent units per unit of flow time)^2], over all steps."""
    velocity_mse_per_step: dict[int, float]
    image_mse: float | None
    """Mean squared difference to the untouched pictures [levels of 255, squared]; None where none were drawn."""
    image_psnr_db: float | None
    """Peak signal-to-noise ratio [dB] of the pictures; None also for equal pictures, whose ratio is infinite."""


class _SpliceSums:
    def __init__(self) -> None:
        self.squares: dict[int, float] = {}
        self.values: dict[int, int] = {}
        self.pixel_squares, self.pixels = 0.0, 0

    def numbers(self) -> SpliceNumbers:
        image_mse = self.pixel_squares / self.pixels if self.pixels else None
        return SpliceNumbers(
            velocity_mse=sum(self.squares.values()) / max(1, sum(self.values.values())),
            velocity_mse_per_step={step: self.squares[step] / self.values[step] for step in sorted(self.squares)},
            image_mse=image_mse,
            image_psnr_db=10 * math.log10(255**2 / image_mse) if image_mse else None,
        )


class SpliceMeter:
    """Runs prompts untouched and with each replacement at one site, and adds up how far apart they come out.

    `steps` are the steps to replace at (None: all). Raises FluxIRError for a site that the model does not have.
    """

    def __init__(
        self,
        model: Transformer,
        site: Site,
        replacements: Mapping[str, Replace],
        *,
        steps: Collection[int] | None = None,
    ) -> None:
        check_sites([site], model.params.depth, model.params.depth_single_blocks)
        self.model, self.site, self.replacements = model, site, dict(replacements)
        self.steps = None if steps is None else frozenset(steps)
        self._sums = {name: _SpliceSums() for name in self.replacements}

    @torch.no_grad()
    def add(self, inputs: Inputs, timesteps: list[float], guidance: float) -> dict[str, PackedLatent]:
        """Add the runs from these noises and texts. The finished latents by replacement, and those untouched.

        Raises FluxIRError if none of the steps to replace at is in the schedule.
        """
        untouched = list(sample(self.model, inputs, timesteps, guidance))
        touched = [step for step in untouched if self.steps is None or step.number in self.steps]
        if not touched:
            raise FluxIRError(
                f"a splice needs at least one of the schedule's {len(untouched)} steps: got {sorted(self.steps or ())}",
                hint="choose steps of this schedule, counted from 0",
            )
        latents = {CLEAN: untouched[-1].after}
        for name, replace in self.replacements.items():
            for step in touched:
                self._compare_velocities(self._sums[name], step, inputs, guidance, replace)
            with spliced(self.model, self.site, replace, steps=self.steps):
                for step in sample(self.model, inputs, timesteps, guidance):
                    latents[name] = step.after
        return latents

    def add_pictures(self, pictures: Mapping[str, Pixels]) -> None:
        """Add the decoded latents of `add`, by the same names."""
        clean = pictures[CLEAN].double()
        for name, sums in self._sums.items():
            sums.pixel_squares += (pictures[name].double() - clean).square().sum().item()
            sums.pixels += clean.numel()

    def result(self) -> dict[str, SpliceNumbers]:
        """The numbers of every replacement, over all runs added so far."""
        return {name: sums.numbers() for name, sums in self._sums.items()}

    def _compare_velocities(
        self, sums: _SpliceSums, step: Step, inputs: Inputs, guidance: float, replace: Replace
    ) -> None:
        """One step from the untouched run's own state."""
        of_time, of_guidance = per_sample(step.t_curr, step.before), per_sample(guidance, step.before)
        with spliced(self.model, self.site, replace):
            velocity = self.model(
                step.before, inputs.img_ids, inputs.txt, inputs.txt_ids, of_time, inputs.y, of_guidance
            )
        squares = (velocity.double() - step.velocity.double()).square().sum().item()
        sums.squares[step.number] = sums.squares.get(step.number, 0.0) + squares
        sums.values[step.number] = sums.values.get(step.number, 0) + velocity.numel()
