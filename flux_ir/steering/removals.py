"""Removals one by one and at once: which features, what each of them did, and what they say together.

`attribution` estimates every feature; here are those that are really removed, each in a picture of its own. Next:
`attribution_folder`, which keeps them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.steering.attribution import Estimates, Inside
from flux_ir.steering.dose import Made, price
from flux_ir.steering.regions import Grid

UNSTEERED = "unsteered"
FeatureKey = tuple[int, int]
"""Which of the autoencoders, from 0, and which of its features."""

# ---- Which


class Chosen(NamedTuple):
    """The features to remove one by one."""

    candidates: list[FeatureKey]
    """Those with the largest estimates."""
    controls: list[FeatureKey]
    """Drawn among the others that are active."""
    active: int
    """How many features are active at all."""


def choose(estimates: Sequence[Estimates], candidates: int, controls: int) -> Chosen:
    """So many of each kind, or as many as are active; the draw is the same for the same picture.

    Raises FluxIRError where no feature is active.
    """
    active = [(i, int(f)) for i, one in enumerate(estimates) for f in one.fires.nonzero().flatten()]
    if not active:
        raise FluxIRError(
            "no feature is active in this picture at these steps: there is nothing to remove",
            hint="leave --steps out, or check that the autoencoder is one of this model and site",
        )
    change = [one.change.tolist() for one in estimates]
    ordered = sorted(active, key=lambda key: (-change[key[0]][key[1]], key))
    # All active features are put in one order, so that more of them contain fewer of them.
    order = torch.randperm(len(active), generator=torch.Generator().manual_seed(0)).tolist()
    best = set(ordered[:candidates])
    drawn = [active[i] for i in order if active[i] not in best]
    return Chosen(ordered[:candidates], drawn[:controls], len(active))


# ---- One by one


class Removal(NamedTuple):
    """One feature, what its removal was estimated to do, and what it did."""

    sae: int
    """Which of the autoencoders, from 0."""
    site: str
    feature: int
    chosen: bool
    """Whether the estimate chose it; if not, it was drawn among the active features."""
    estimate: float
    """|change| of the region's finished latent / |latent| of the region, to first order."""
    latent_inside: float
    """The same, measured."""
    latent_outside: float | None
    """Measured on the rest of the picture. None: the region is the whole picture."""
    psnr_inside_db: float | None
    """Of the picture against the unsteered one. None: nothing differs there."""
    psnr_outside_db: float | None
    active: float | None
    """The share of image tokens, over all steps, that it is active on. None: its site has none."""
    active_inside: float | None
    """The share of these that are in the region. None: it is active on no image token."""
    by_step: tuple[float, ...]
    """The estimate of a removal at each step alone."""


class Asked(NamedTuple):
    """What removals of one picture are compared with."""

    unsteered: Made
    inside: Inside
    grid: Grid
    estimates: Sequence[Estimates]
    sites: Sequence[str]
    """Of each autoencoder."""
    steps: int
    """How many steps features are removed at."""

    @property
    def size(self) -> float:
        """|latent| of the region."""
        return float(self.unsteered.latent[self.inside].norm())

    def change(self, made: Made) -> Float[Tensor, "values"]:
        """What became of the region's latent."""
        return (made.latent[self.inside] - self.unsteered.latent[self.inside]).flatten()

    def removal(self, key: FeatureKey, made: Made, *, chosen: bool) -> Removal:
        """What one removal was estimated to do, and what it did."""
        number, feature = key
        found, paid = self.estimates[number], price(made, self.unsteered, self.inside, self.grid)
        active, has_image = int(found.active[feature]), not self.sites[number].endswith(".txt")
        return Removal(
            number,
            self.sites[number],
            feature,
            chosen,
            estimate=float(found.change[feature]) / self.size,
            latent_inside=paid.latent_inside,
            latent_outside=paid.latent_outside,
            psnr_inside_db=paid.psnr_inside_db,
            psnr_outside_db=paid.psnr_outside_db,
            active=active / (self.grid.tokens * self.steps) if has_image else None,
            active_inside=int(found.active_inside[feature]) / active if active else None,
            by_step=tuple((found.by_step[:, feature] / self.size).tolist()),
        )

    def together(self, alone: Sequence[tuple[FeatureKey, Made]], at_once: Made) -> "Together":
        """Features that were removed one by one, against all of them at once."""
        dots = torch.stack([self.estimates[sae].dots[:, feature] for (sae, feature), _ in alone]).sum(dim=0)
        return compare_changes(
            [key for key, _ in alone],
            [self.change(made) for _, made in alone],
            self.change(at_once),
            self.size,
            float(dots.square().mean().sqrt()),
        )


# ---- What they say together


class Together(NamedTuple):
    """Some features removed at once, against each of them removed alone; all as shares of the region's latent."""

    features: tuple[FeatureKey, ...]
    estimate: float
    """|change| of removing all of them, to first order."""
    effect_of_sum: float
    """|change| of the region when all are removed at once."""
    sum_of_effects: float
    """|sum of the changes| that each makes alone."""
    sum_of_sizes: float
    """The sum of the single |changes|: what the sum of effects would be if all pushed the same way."""
    ratio: float | None
    """effect of the sum / sum of effects; above 1 they stand in for each other, below 1 they say the same. None: 0."""
    cosine: float | None
    """Between the two changes. None: one of them is 0."""


def compare_changes(
    features: Sequence[FeatureKey],
    changes: Sequence[Float[Tensor, "values"]],
    at_once: Float[Tensor, "values"],
    size: float,
    estimate: float,
) -> Together:
    """`changes` of the region's latent by each feature alone, `at_once` by all; `size` is that of the latent itself."""
    total = torch.stack(list(changes)).double().sum(dim=0)
    effect, summed = float(at_once.double().norm()), float(total.norm())
    return Together(
        tuple(features),
        estimate=estimate / size,
        effect_of_sum=effect / size,
        sum_of_effects=summed / size,
        sum_of_sizes=sum(float(change.double().norm()) for change in changes) / size,
        ratio=effect / summed if summed > 0 else None,
        cosine=float(total @ at_once.double()) / (summed * effect) if summed > 0 and effect > 0 else None,
    )


class Agreement(NamedTuple):
    """How well the estimate orders what the exact removals say. None: there are too few, or all are equal."""

    spearman: float | None
    """Of all features that were removed."""
    spearman_candidates: float | None
    """Of those that the estimate chose."""
    spearman_controls: float | None
    """Of those that were drawn."""
    recall: float
    """Of the features with the largest exact changes, the share that has the largest estimates."""
    median_ratio: float | None
    """exact / estimate, the median."""


def agreement(removals: Sequence[Removal], best: int) -> Agreement:
    """How the estimates and the changes of these removals go together; `best` is how many `recall` is about."""
    guessed, true = (np.array([getattr(one, name) for one in removals]) for name in ("estimate", "latent_inside"))
    by_estimate = np.array([one.chosen for one in removals])
    first, top = (set(np.argsort(-values, kind="stable")[:best].tolist()) for values in (guessed, true))
    ratios = true[guessed > 0] / guessed[guessed > 0]
    return Agreement(
        _spearman(guessed, true),
        _spearman(guessed[by_estimate], true[by_estimate]),
        _spearman(guessed[~by_estimate], true[~by_estimate]),
        recall=len(first & top) / len(top),
        median_ratio=float(np.median(ratios)) if len(ratios) else None,
    )


def _spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return float(spearmanr(left, right).statistic)
