"""Which of many numbers are more than chance: every list of "significant" features is made by these two functions."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def q_values(p: ArrayLike, *, tests: int | None = None) -> NDArray[np.float64]:
    """Adjusted p-values of Benjamini and Hochberg (1995): what is at most q makes a list of which a share q is chance.

    q of the i-th smallest of m p-values is the least of p_j m / j over j >= i. NaN was not tested, and stays NaN.
    `tests` is m where only the smallest p-values are given.
    """
    p = np.asarray(p, np.float64)
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p.flat[tested], kind="stable")]
    scaled = p.flat[order] * (tests or len(order)) / np.arange(1, len(order) + 1)
    q.flat[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q


def permutation_p(observed: ArrayLike, null: ArrayLike) -> NDArray[np.float64]:
    """(1 + draws of the null at least as large) / (1 + draws), the observed one being a draw (Phipson & Smyth, 2010).

    `null` [draws] is one null for all of `observed`. Never 0: with 999 draws the least is .001.
    """
    draws = np.sort(np.asarray(null, np.float64).ravel())
    reached = len(draws) - np.searchsorted(draws, np.asarray(observed, np.float64), side="left")
    return (1 + reached) / (1 + len(draws))
