"""What features of an autoencoder know, where the answer is known: the best one of each concept, and how good it is.

A feature is picked on one set of pictures and reported on another that shares no prompt with it.
Next: `rows`, which says what else is compared with it.
"""

from typing import NamedTuple

import numpy as np

from flux_ir.sae.sparse_autoencoder import SparseAutoencoder
from flux_ir.studies.auroc import auroc
from flux_ir.studies.labels import Comparison, check_apart
from flux_ir.studies.part import FeatureBoard, Part

LEAST_POSITIVES = 200
"""Below so many positives (or negatives) to report on there is no number; to pick with, half of them are enough."""


class BestFeature(NamedTuple):
    """The feature that tells a concept best, with its sign: -1 where the concept is there when the feature is not."""

    comparison: Comparison
    feature: int
    sign: int
    picked_on: float
    """Its AUROC where it was picked: the best of many, so too good."""
    auroc: float
    """Its AUROC on the pictures that did not pick it."""
    positives: tuple[int, int]
    """How many there were to pick with, and to report on."""


def best_features(
    sae: SparseAutoencoder, pick: Part, report: Part, least_positives: int = LEAST_POSITIVES
) -> list[BestFeature]:
    """For every comparison with enough positives the feature that is best on `pick`, and how good it is on `report`.

    Raises FluxIRError if the two share a prompt.
    """
    check_apart({"the set that picks": pick.labels.prompts, "the set that reports": report.labels.prompts})
    there, here = FeatureBoard(pick, sae), FeatureBoard(report, sae)
    found = []
    for comparison in askable(pick, report, least_positives):
        feature, sign, picked_on = best_of(there.aurocs(comparison))
        scores = sign * here.scores(comparison, feature)
        positives = pick.counts(comparison)[0], report.counts(comparison)[0]
        found.append(
            BestFeature(comparison, feature, sign, picked_on, auroc(scores, *report.flags(comparison)), positives)
        )
    return found


def askable(pick: Part, report: Part, least_positives: int = LEAST_POSITIVES) -> list[Comparison]:
    """The comparisons with so many positives and so many negatives to report on, and half of them to pick with."""
    there = {one for one in report.comparisons() if min(report.counts(one)) >= least_positives}
    return [one for one in pick.comparisons() if one in there and 2 * min(pick.counts(one)) >= least_positives]


def best_of(aurocs: np.ndarray) -> tuple[int, int, float]:
    """The one furthest from chance, the sign that puts it above, and its AUROC with that sign."""
    apart = np.abs(np.nan_to_num(aurocs, nan=0.5) - 0.5)
    feature = int(apart.argmax())
    return feature, 1 if aurocs[feature] >= 0.5 else -1, 0.5 + float(apart[feature])
