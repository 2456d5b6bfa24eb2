"""All that the order of the tokens depends on: a place in the data means nothing where any of it is different."""

import json
from collections.abc import Sequence

from flux_ir.errors import FluxIRError
from flux_ir.sae.filters import Filters, SiteKey
from flux_ir.sae.pool import Pool
from flux_ir.sae.splits import Side, Split


def settings_text(
    *,
    sites: Sequence[SiteKey],
    seed: int,
    batch_tokens: int,
    pool_bytes: int,
    tokens: int | None,
    filters: Filters,
    split: Split,
    side: Side,
) -> str:
    """The settings as JSON: equal texts give equal batches. `tokens`: those of an epoch, as far as they are known."""
    settings = {
        "sites": [str(site) for site in sites],
        "seed": seed,
        "batch_tokens": batch_tokens,
        "pool_bytes": pool_bytes,
        "bytes_beside": Pool.BYTES_BESIDE,
        "tokens": tokens,
        "side": side,
        "split": [split.by, split.threshold, split.run_tokens],
        "stream": filters.stream,
        "steps": None if filters.steps is None else sorted(filters.steps),
        "padding": filters.padding,
        "limits": filters.outlier_factor and sorted((str(site), step, x) for (site, step), x in filters.limits.items()),
    }
    return json.dumps(settings)


def check_same_settings(saved: str, now: str) -> None:
    """Raises FluxIRError that names each setting in which a saved place differs from the present data."""
    if saved == now:
        return
    before, here = json.loads(saved), json.loads(now)
    different = [
        f"{name} was {before.get(name)} and is {here[name]}" for name in here if before.get(name) != here[name]
    ]
    raise FluxIRError(
        f"the place in the data was saved with other data or settings: {'; '.join(different)}",
        hint="resume with the settings and the captures of the first run",
    )
