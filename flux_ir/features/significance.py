"""Which of many numbers are more than chance: wherever a list of "significant" features is shown, it is made here."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def q_values(p: ArrayLike, *, tests: int | None = None) -> NDArray[np.float64]:
    """Adjusted p-values of Benjamini and Hochberg (1995): what is at most q makes a list of which a share q is chance.

    NaN stands for what was not tested and stays so. `tests` is how many were made, if the others' p-values, all larger
    than these, are not given.
    """
    p = np.asarray(p, np.float64)
    found = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p.flat[tested], kind="stable")]
    scaled = p.flat[order] * (tests or len(order)) / np.arange(1, len(order) + 1)
    found.flat[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return found


def permutation_p(observed: ArrayLike, null: ArrayLike) -> NDArray[np.float64]:
    """The share of draws of the null that are at least as large, the observed one counted among them.

    `null` [draws] is one null for all of `observed`. Never 0: with 999 draws the least is .001.
    """
    draws = np.sort(np.asarray(null, np.float64).ravel())
    reached = len(draws) - np.searchsorted(draws, np.asarray(observed, np.float64), side="left")
    return (1 + reached) / (1 + len(draws))
