"""What lenses that are fitted to a model have in common: what they were fitted for, and their file.

A fitted lens gives the velocity that it reads from a block's image tokens at one step. It is bound to weights, to flow
times and to a guidance strength. `tuned` maps tokens to those of the last block, `jacobian` linearises the network.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.lens.readout import readable_sites
from flux_ir.models.architecture import Transformer
from flux_ir.recording.reader import Capture
from flux_ir.shapes import Conditioning, ImgTokens, Velocity
from flux_ir.sites import Site, nearest_names

TIME_TOLERANCE = 1e-4
"""Flow times that differ by less are the same: schedules of two versions may differ in the last bits."""

Place = tuple[Site, int]
"""A block, by its image tokens, and a step."""


@dataclass(frozen=True)
class FittedLens(ABC):
    """A lens with what it was fitted for."""

    settings: Mapping[str, Any]
    """model, weights (a digest), timesteps, guidance, the collection and how it was split."""

    kind: ClassVar[str]
    """What messages call it."""
    file_name: ClassVar[str]
    """In its folder."""
    format: ClassVar[str]
    """What its file says it is."""

    @property
    @abstractmethod
    def places(self) -> Collection[Place]:
        """The blocks and steps that it was fitted at."""

    @property
    @abstractmethod
    def width(self) -> int | None:
        """Channels of the tokens that it reads; None if it takes any."""

    @abstractmethod
    def velocity(self, model: Transformer, site: Site, step: int, img: ImgTokens, vec: Conditioning) -> Velocity:
        """The velocity that it reads from the image tokens of a block; `vec` is what the last layer is modulated by."""

    @abstractmethod
    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors by name, `{site}/step_{s}/{part}`, and what is written beside the settings."""

    def check_weights(self, model: str, weights: str, hidden_size: int) -> None:
        """Raises FluxIRError for a model or weights that it was not fitted to."""
        made = self.settings
        if (model, weights) != (made["model"], made["weights"]):
            other = "other weights of it" if model == made["model"] else model
            raise FluxIRError(
                f"the {self.kind} lens was fitted to {made['model']} (weights {made['weights']}): these are "
                f"{other} ({weights})",
                hint="fit one to these weights: flux-ir train-lens",
            )
        if self.width not in (None, hidden_size):
            raise FluxIRError(
                f"the {self.kind} lens reads tokens of {self.width} channels: those of {model} have {hidden_size}",
                hint="the file was changed since it was fitted: fit it again with flux-ir train-lens",
            )

    def check(self, capture: Capture, *, has_guidance: bool) -> None:
        """Raises FluxIRError for a capture with a site, step, time or guidance that it was not fitted at."""
        made = self.settings
        sites = {site for site, _ in self.places}
        steps = {step for _, step in self.places}
        for site in readable_sites(capture):
            if image_half(site) not in sites:
                raise FluxIRError(
                    f"the {self.kind} lens was not fitted at {image_half(site)}",
                    hint=f"collect that site too: it has {nearest_names(str(image_half(site)), map(str, sites))} and "
                    "such",
                )
        for step in capture.steps:
            time = capture.context(step).t_curr
            there = made["timesteps"][step] if step in steps else None
            if there is None or abs(there - time) > TIME_TOLERANCE:
                at = "not fitted at this step" if there is None else f"fitted there at t {there:.4f}"
                raise FluxIRError(
                    f"step {step} of the run is at t {time:.4f}, and the {self.kind} lens was {at}",
                    hint=f"it reads runs of {len(made['timesteps']) - 1} steps with the size of its collection",
                )
            strength = capture.context(step).guidance
            if has_guidance and strength != made["guidance"]:
                raise FluxIRError(
                    f"the run has guidance {strength:g}, and the {self.kind} lens was fitted at {made['guidance']:g}",
                    hint="capture with that guidance, or collect with this one",
                )

    def save(self, folder: Path) -> Path:
        """Writes its file into a folder: float32, complete or not at all."""
        tensors, beside_settings = self.contents()
        whole = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        described = json.dumps({**self.settings, **beside_settings})
        path = folder / self.file_name
        with complete_file(path) as beside:
            save_file(whole, beside, metadata={"format": self.format, "settings": described})
        return path


class LensFile(NamedTuple):
    """What lies in the file of a lens."""

    settings: dict[str, Any]
    parts: Mapping[Place, Mapping[str, Tensor]]
    """By site and step, in their order: tensors by the last word of their name."""


def read_lens_file(path: str | Path, lens: type[FittedLens], parts: Sequence[str]) -> LensFile:
    """The file of a lens, or that in a folder of `flux-ir train-lens`, with the `parts` that every place must have.

    Raises FluxIRError for what is none.
    """
    kind = lens.kind.lower()
    file = Path(path)
    file = file / lens.file_name if file.is_dir() else file
    if not file.is_file():
        raise FluxIRError(f"there is no {kind} lens at {file}", hint=f"make one: flux-ir train-lens --kind {kind}")
    found: dict[Place, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != lens.format:
                raise KeyError("format")
            settings = json.loads(metadata["settings"])
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                site, step_word, part = key.split("/")
                place = Site.parse(site), int(step_word.removeprefix("step_"))
                found.setdefault(place, {})[part] = opened.get_tensor(key)
        for place, tensors in found.items():
            if sorted(tensors) != sorted(parts):
                raise KeyError(f"{place[0]}/step_{place[1]}")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FluxIRError(
            f"{file} is no {kind} lens: {error!r}", hint=f"make one: flux-ir train-lens --kind {kind}"
        ) from error
    return LensFile(settings, {place: found[place] for place in sorted(found)})


def image_half(site: Site) -> Site:
    """The image half of a single block; the site itself otherwise."""
    return site if site.stream is not None else Site(site.kind, site.block, "img")


def image_sites(sites: Sequence[Site]) -> list[Site]:
    """The same sites, single blocks by their image halves."""
    return [image_half(site) for site in sites]
