"""The tuned lens (Belrose et al., 2023) of a flow model: an affine map per block and step before the last layer.

A plain lens reads a middle block by the last layer, which was trained for what the last block puts out. The tuned lens
first adds to the image tokens h_l an affine function of themselves, fitted to h_L - h_l, L the last block. It is fitted
by ridge regression in closed form and judged by the velocity that is read from it. At the last block there is no map.
Next: `tuned_fit`, which fits one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.lens.readout import readable_sites
from flux_ir.lens.ridge import AffineMap
from flux_ir.recording.reader import Capture
from flux_ir.shapes import ImgTokens
from flux_ir.sites import Site, nearest_names

LENS_FILE = "lens.safetensors"
FORMAT = "flux_ir tuned lens 1"
TIME_TOLERANCE = 1e-4
"""Flow times that differ by less are the same: schedules of two versions may differ in the last bits."""


@dataclass(frozen=True)
class TunedLens:
    """The maps of a lens, and what they were fitted for."""

    maps: Mapping[tuple[Site, int], AffineMap | None]
    """By site (image tokens) and step; None where the block is best read as it is: at the last one always."""
    settings: Mapping[str, Any]
    """model, weights (a digest), timesteps, guidance, the collection and how it was split, ridge strengths."""

    def mapped(self, site: Site, step: int, img: ImgTokens) -> ImgTokens:
        """The image tokens of a block as the last layer should read them; the very same where there is no map."""
        found = self.maps[_img(site), step]
        if found is None:
            return img
        return AffineMap(*(part.to(img.device) for part in found)).applied_to(img)

    def check_weights(self, model: str, weights: str) -> None:
        """Raises FluxIRError for a model or weights that it was not fitted to."""
        made = self.settings
        if (model, weights) != (made["model"], made["weights"]):
            other = "other weights of it" if model == made["model"] else model
            raise FluxIRError(
                f"the tuned lens was fitted to {made['model']} (weights {made['weights']}): these are "
                f"{other} ({weights})",
                hint="fit one to these weights: flux-ir train-lens",
            )

    def check(self, capture: Capture, *, has_guidance: bool) -> None:
        """Raises FluxIRError for a capture with a site, step, time or guidance that it was not fitted at."""
        made = self.settings
        sites = {site for site, _ in self.maps}
        steps = {step for _, step in self.maps}
        for site in readable_sites(capture):
            if _img(site) not in sites:
                raise FluxIRError(
                    f"the tuned lens was not fitted at {_img(site)}",
                    hint=f"collect that site too: it has {nearest_names(str(_img(site)), map(str, sites))} and such",
                )
        for step in capture.steps:
            time = capture.context(step).t_curr
            there = made["timesteps"][step] if step in steps else None
            if there is None or abs(there - time) > TIME_TOLERANCE:
                at = "not fitted at this step" if there is None else f"fitted there at t {there:.4f}"
                raise FluxIRError(
                    f"step {step} of the run is at t {time:.4f}, and the tuned lens was {at}",
                    hint=f"it reads runs of {len(made['timesteps']) - 1} steps with the size of its collection",
                )
            strength = capture.context(step).guidance
            if has_guidance and strength != made["guidance"]:
                raise FluxIRError(
                    f"the run has guidance {strength:g}, and the tuned lens was fitted at {made['guidance']:g}",
                    hint="capture with that guidance, or collect with this one",
                )

    def save(self, path: Path) -> None:
        """Writes the lens: float32, complete or not at all."""
        tensors, without = {}, []
        for (site, step), found in self.maps.items():
            if found is None:
                without.append([str(site), step])
            else:
                tensors[f"{site}/step_{step}/weight"] = found.weight.float().cpu().contiguous()
                tensors[f"{site}/step_{step}/bias"] = found.bias.float().cpu().contiguous()
        described = json.dumps({**self.settings, "without_map": without})
        with complete_file(path) as beside:
            save_file(tensors, beside, metadata={"format": FORMAT, "settings": described})


def load_tuned_lens(path: str | Path) -> TunedLens:
    """The lens in a file or a folder of `flux-ir train-lens`. Raises FluxIRError for what is none."""
    file = Path(path)
    file = file / LENS_FILE if file.is_dir() else file
    if not file.is_file():
        raise FluxIRError(f"there is no tuned lens at {file}", hint="make one: flux-ir train-lens")
    maps: dict[tuple[Site, int], AffineMap | None] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise KeyError("format")
            settings = json.loads(metadata["settings"])
            for site, step in settings.pop("without_map"):
                maps[Site.parse(site), step] = None
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                name, step_word, part = key.split("/")
                if part == "weight":
                    step = int(step_word.removeprefix("step_"))
                    bias = opened.get_tensor(f"{name}/{step_word}/bias")
                    maps[Site.parse(name), step] = AffineMap(opened.get_tensor(key), bias)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FluxIRError(f"{file} is no tuned lens: {error!r}", hint="make one: flux-ir train-lens") from error
    order = sorted(maps, key=lambda at: at)
    return TunedLens({at: maps[at] for at in order}, settings)


def _img(site: Site) -> Site:
    """The image half of a single block; the site itself otherwise."""
    return site if site.stream is not None else Site(site.kind, site.block, "img")


def image_sites(sites: Sequence[Site]) -> list[Site]:
    """The same sites, single blocks by their image halves."""
    return [_img(site) for site in sites]
