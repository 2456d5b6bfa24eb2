"""Which sites are trained on, and which of them can share a pass over the data."""

from collections.abc import Sequence
from dataclasses import replace

from flux_ir.activations.token_blocks import TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sae.filters import Filters, SiteKey
from flux_ir.sites import Stream, match_sites, nearest_names


def choose_sites(source: TokenSource, patterns: Sequence[str]) -> list[SiteKey]:
    """The sites of the source that match any of the patterns (`double.*.img`), in depth order; [None] for an array.

    Raises FluxIRError for a pattern that matches nothing, naming the nearest sites.
    """
    if not source.sites:
        return [None]
    streams: tuple[Stream, ...] = ("img", "txt")
    whole = [site for site in source.sites if site.kind == "single" and site.stream is None]
    available = sorted({*source.sites, *(replace(site, stream=stream) for site in whole for stream in streams)})
    for pattern in patterns:
        try:
            match_sites([pattern], available)
        except FluxIRError as error:
            raise FluxIRError(
                f"no site of these captures matches {pattern!r}: sites there are: {len(source.sites)}",
                hint=f"the nearest are {nearest_names(pattern, map(str, available))}",
            ) from error
    return list(match_sites(patterns, available))


def sites_in_lockstep(sites: Sequence[SiteKey], filters: Filters) -> list[list[SiteKey]]:
    """The sites in groups that have the same tokens, and so can share batches: image, text, and both."""
    groups: dict[Stream | None, list[SiteKey]] = {}
    for site in sites:
        groups.setdefault((site.stream if site else None) or filters.stream, []).append(site)
    return list(groups.values())
