"""What the stages left in a folder of features, as the pages take it; what is not there yet is None."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flux_ir.explorer.feature_records import Group, Panels
from flux_ir.features.folder import FeatureFolder
from flux_ir.sites import Stream

LATER = ("selection.safetensors", "decoder.safetensors")
"""Files of numbers that there may be beside the table."""


def read_groups(folder: FeatureFolder, stream: Stream) -> list[Group]:
    """The examples of every feature, a group per kind, and of quantiles one for each."""
    known = folder.examples(stream)
    nowhere = np.zeros_like(known.silent)
    edges = known.quantile_edges.astype(np.float64)  # the largest first
    unbounded = np.full((len(edges), 1), np.nan)
    bounds = np.concatenate([unbounded, edges, unbounded], axis=1)
    shares = [
        Group(
            "quantile",
            known.quantile[:, share],
            known.quantile_value[:, share],
            known.quantile_token[:, share],
            known.quantile_step[:, share],
            low=bounds[:, share + 1],
            high=bounds[:, share],
        )
        for share in range(known.quantile.shape[1])
    ]
    return [
        Group("top", known.top, known.top_value, known.top_token, known.top_step),
        *shares,
        Group("random", known.random, known.random_value, known.random_token, known.random_step),
        Group("silent", known.silent, known.silent_value, nowhere, nowhere),
    ]


def read_later(folder: FeatureFolder, stream: Stream) -> dict[str, NDArray[Any]]:
    """Numbers per feature that later stages found, [d_sae] each, by name; what is known of no feature is left out."""
    found: dict[str, NDArray[Any]] = {}
    for file in LATER:
        if (folder.path / file).is_file():
            found |= folder.columns(file, stream)
    return {
        name: array
        for name, array in found.items()
        if array.ndim == 1
        and len(array) == folder.settings.d_sae
        and array.dtype.kind == "f"
        and np.isfinite(array).any()
    }


def read_panels(folder: FeatureFolder, stream: Stream) -> Panels:
    """What the page of a feature shows beside its pictures."""
    table = folder.table(stream)
    return Panels(table.max_active, table.histogram, table.step_frequency, table.step_mean)
