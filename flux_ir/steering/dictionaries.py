"""The autoencoders that a transfer reads both runs with: one for each site, each trained on the model at hand."""

from collections.abc import Sequence
from pathlib import Path

from flux_ir.errors import FluxIRError
from flux_ir.models.registry import ModelSpec
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.folder import load_sae
from flux_ir.sites import Site, sites_among


def saes_by_site(
    given: Sequence[str | Path | SparseAutoencoder], spec: ModelSpec, device: str
) -> dict[Site, SparseAutoencoder]:
    """The autoencoders by their sites. Raises FluxIRError for those of another model, or of one site twice."""
    found: dict[Site, SparseAutoencoder] = {}
    for one in given:
        sae = one if isinstance(one, SparseAutoencoder) else load_sae(one, device=device)
        if sae.config.model is not None and sae.config.model != spec.name:
            raise FluxIRError(
                f"this autoencoder was trained on {sae.config.model}: it is no dictionary of {spec.name}",
                hint=f"--model {sae.config.model}, or an autoencoder of {spec.name}",
            )
        if sae.config.site is None:
            raise FluxIRError("this autoencoder does not say of which site it is", hint="train it with a site")
        (site,) = sites_among(sae.config.site, spec.sites)
        if site.per_prompt:
            raise FluxIRError(
                f"what is transferred is computed while a picture is sampled: {site} is computed once per prompt",
                hint="use an autoencoder of a block of the transformer",
            )
        if site in found:
            raise FluxIRError(f"one autoencoder for each site: got two of {site}", hint="leave one of them out")
        hidden = spec.flux.hidden_size
        width = int(hidden * spec.flux.mlp_ratio) if site.part == "neurons" else hidden
        if sae.config.d_in != width:
            raise FluxIRError(
                f"the tokens of {site} of {spec.name} are {width} wide: this autoencoder is of {sae.config.d_in}",
                hint=f"use an autoencoder that was trained on {site} of {spec.name}",
            )
        found[site] = sae
    return {site: found[site] for site in sorted(found)}
