"""FLUX.1's variants that are given other inputs (Fill, Canny, Depth, Redux): recognised, and refused by their names.

Their files lie beside those of flux-dev, and people try them. What each is for, the models at hand can do in part.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.paths import NamedPath, model_folder
from flux_ir.models.registry import MODELS, ModelSpec

_REFERENCE = "flux-dev-kontext with --reference_image"
_BEGUN = "flux-dev with --init_image, which begins with a picture"


class Variant(NamedTuple):
    """One of them."""

    name: str
    instead: str
    """What does something like it here."""


FILL = Variant("FLUX.1 Fill, which is given a masked picture", f"{_BEGUN}, or {_REFERENCE}")
CONTROL = Variant("FLUX.1 Canny or Depth, which is given a control picture", f"{_REFERENCE}, or {_BEGUN}")
REDUX = Variant("FLUX.1 Redux, which makes text tokens of a picture", _REFERENCE)

_BY_CHANNELS = {128: CONTROL, 384: FILL}
_REDUX_NAMES = ("redux_up.", "redux_down.")
_SIGLIP = "vision_model.embeddings.patch_embedding."
# What diffusers writes into a folder's model_index.json.
_BY_PIPELINE = {
    "FluxFillPipeline": FILL,
    "FluxControlPipeline": CONTROL,
    "FluxControlImg2ImgPipeline": CONTROL,
    "FluxControlInpaintPipeline": CONTROL,
    "FluxPriorReduxPipeline": REDUX,
}
_WITH_REFERENCE = {"FluxKontextPipeline": True, "FluxKontextInpaintPipeline": True, "FluxPipeline": False}


def of_channels(channels: int) -> Variant | None:
    """The variant whose network takes so many latent channels."""
    return _BY_CHANNELS.get(channels)


def beside_networks(names: Iterable[str]) -> str | None:
    """What a file holds that is a part of Redux and no transformer, by the names of its tensors."""
    names = list(names)
    if any(name.startswith(_REDUX_NAMES) for name in names):
        return f"{REDUX.name}, and no transformer (use {REDUX.instead})"
    if any(name.startswith(_SIGLIP) for name in names):
        return "an image encoder, such as the SigLIP of FLUX.1 Redux"
    return None


def check_folder(spec: ModelSpec, named: NamedPath) -> None:
    """Raises FluxIRError for a diffusers folder of a variant, or one of a model that takes a reference picture where
    the spec takes none, or the other way round: their files have the same names and shapes.
    """
    pipeline = _pipeline(model_folder(named.path) / "model_index.json")
    variant = _BY_PIPELINE.get(pipeline or "")
    if variant is not None:
        raise FluxIRError(
            f"{named.path} (from {named.origin}) is not {spec.name}: it is {variant.name} ({pipeline})",
            hint=f"use {variant.instead}",
        )
    takes = _WITH_REFERENCE.get(pipeline or "", spec.takes_reference)
    if takes == spec.takes_reference:
        return
    others = [other for other in MODELS.values() if other.takes_reference == takes and other.flux == spec.flux]
    raise FluxIRError(
        f"{named.path} (from {named.origin}) is not {spec.name}: it is of diffusers' {pipeline}, and "
        f"{spec.name} takes {'a' if spec.takes_reference else 'no'} reference picture",
        hint=" or ".join(f"--model {other.name}" for other in others) or "name another folder",
    )


def _pipeline(index: Path) -> str | None:
    try:
        said = json.loads(index.read_bytes())
    except (OSError, ValueError):
        return None  # no folder of diffusers: its files speak for themselves
    name = said.get("_class_name") if isinstance(said, dict) else None
    return name if isinstance(name, str) else None
