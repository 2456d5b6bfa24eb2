"""The tuned lens (Belrose et al., 2023) of a flow model: an affine map per block and step before the last layer.

A plain lens reads a middle block by the last layer, which was trained for what the last block puts out. The tuned lens
first adds to the image tokens h_l an affine function of themselves, fitted to h_L - h_l, L the last block. It is fitted
by ridge regression in closed form and judged by the velocity that is read from it. At the last block there is no map.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_ir.lens.fitted import FittedLens, Place, image_half, read_lens_file
from flux_ir.lens.judge import LensData, Part, Read, squared_errors
from flux_ir.lens.ridge import AffineMap, RidgeSums
from flux_ir.models.architecture import Transformer
from flux_ir.shapes import Conditioning, ImgTokens, Velocity
from flux_ir.sites import Site

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Ridge strengths that are tried, in units of the variance of all rows in an average channel (`RidgeSums.solve`)."""


@dataclass(frozen=True)
class TunedLens(FittedLens):
    """The maps of a lens, and what they were fitted for."""

    kind: ClassVar[str] = "tuned"
    file_name: ClassVar[str] = "tuned.safetensors"
    format: ClassVar[str] = "flux_ir tuned lens 1"

    maps: Mapping[Place, AffineMap | None]
    """By site (image tokens) and step; None where the block is best read as it is: at the last one always."""

    @property
    def places(self) -> Collection[Place]:
        return self.maps.keys()

    @property
    def width(self) -> int | None:
        return next((found.bias.shape[0] for found in self.maps.values() if found is not None), None)

    def mapped(self, site: Site, step: int, img: ImgTokens) -> ImgTokens:
        """The image tokens of a block as the last layer should read them; the very same where there is no map."""
        found = self.maps[image_half(site), step]
        if found is None:
            return img
        return AffineMap(*(part.to(img.device) for part in found)).applied_to(img)

    def velocity(self, model: Transformer, site: Site, step: int, img: ImgTokens, vec: Conditioning) -> Velocity:
        """What the last layer reads from the mapped tokens."""
        return model.read_out(self.mapped(site, step, img), vec)

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weight and bias of every map; where there is none."""
        tensors: dict[str, Tensor] = {}
        without: list[list[Any]] = []
        for (site, step), found in self.maps.items():
            if found is None:
                without.append([str(site), step])
            else:
                tensors |= {f"{site}/step_{step}/{part}": tensor for part, tensor in found._asdict().items()}
        return tensors, {"without_map": without}


def load_tuned_lens(path: str | Path) -> TunedLens:
    """The lens in a file or a folder of `flux-ir train-lens`. Raises FluxIRError for what is none."""
    settings, parts = read_lens_file(path, TunedLens, AffineMap._fields)
    maps: dict[Place, AffineMap | None] = {place: AffineMap(**tensors) for place, tensors in parts.items()}
    for site, step in settings.pop("without_map", []):
        maps[Site.parse(site), step] = None
    return TunedLens(settings, {place: maps[place] for place in sorted(maps)})


# ---- How it is fitted


class FittedMap(NamedTuple):
    """The map of one block and step, and the strength it was fitted with; both None where no map did better."""

    added: AffineMap | None
    strength: float | None

    def through(self, model: Transformer) -> Read:
        """Reads by the last layer what the map makes of a block."""
        added = self.added
        return lambda rows: model.read_out(rows.block if added is None else added.applied_to(rows.block), rows.vec)

    def on_cpu(self) -> "FittedMap":
        """The same in host memory."""
        added = None if self.added is None else AffineMap(*(part.cpu() for part in self.added))
        return FittedMap(added, self.strength)


@torch.no_grad()
def fit_map(data: LensData, model: Transformer, site: Site | None, step: int) -> FittedMap:
    """The map of one block (None: the network's input) at one step.

    Fitted on one part of the training prompts with every strength; the one whose velocity is best on the other part is
    fitted again on both. No map at all is one of the choices, and the only one at the last block. One block and step
    is fitted at a time, so memory is flat in prompts: what grows with blocks is the lens itself.
    """
    if site == data.last:
        return FittedMap(None, None)
    training: tuple[Part, Part] = ("fit", "choose")
    sums = {part: RidgeSums(model.params.hidden_size, model.img_in.weight.device) for part in training}
    for part, of_part in sums.items():
        for rows in data.rows(model, site, step, part):
            x = rows.block.flatten(0, 1).double()
            of_part.add(x, rows.last.flatten(0, 1).double() - x)
    candidates = [FittedMap(None, None)]
    candidates += [FittedMap(_float32(sums["fit"].solve(strength)), strength) for strength in STRENGTHS]
    errors, _ = squared_errors(data.rows(model, site, step, "choose"), [one.through(model) for one in candidates])
    best = candidates[int(np.argmin(errors))]
    if best.strength is None:
        return best
    sums["fit"].add_sums(sums["choose"])
    return FittedMap(_float32(sums["fit"].solve(best.strength)), best.strength)


def _float32(added: AffineMap) -> AffineMap:
    return AffineMap(*(part.float() for part in added))
