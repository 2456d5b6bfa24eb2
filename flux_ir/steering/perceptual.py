"""LPIPS: how different two pictures look, by what a network for photographs sees in them (Zhang et al., 2018).

It is a number more where the user has it: `pip install lpips`, and the weights of AlexNet, which torchvision keeps in
torch's folder of downloads. Nothing is downloaded from here. It is measured on the finished pictures, after all of them
are made, so that a folder that was begun without it gets it too.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch
from jaxtyping import Bool
from torch import Tensor

from flux_ir.steering.dose import Picture, Price, pixels_of
from flux_ir.steering.regions import Grid

NET = "alex"
"""The net of which the authors say that it is nearest to what people see."""
BACKBONE = "alexnet-owt-7be5be79.pth"
"""torchvision's file of its weights. Asked for by name, for to import torchvision takes seconds."""
FETCH = "python -c \"import lpips; lpips.LPIPS(net='alex')\""
LEAST_PX = 32
"""The net halves a picture five times: it has nothing to say of smaller ones."""

_CANNOT_BE_MADE = (ImportError, OSError, RuntimeError, TypeError, ValueError, EOFError, UnpicklingError)


class Lpips:
    """LPIPS of pairs of pictures. `network` is what the package calls `LPIPS`."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], device: torch.device | str = "cpu") -> None:
        self.network, self.device = network, torch.device(device)

    @torch.no_grad()
    def distance(self, picture: Picture, other: Picture) -> float:
        """0 for equal pictures."""
        return float(self.network(self._input(picture), self._input(other)))

    def added_to(
        self, price: Price, picture: Picture, unsteered: Picture, inside: Bool[Tensor, "tokens"] | None, grid: Grid
    ) -> Price:
        """The price with LPIPS: of the whole picture, and with the pixels of the region `inside` made equal."""
        outside = None
        if inside is not None and not inside.all():
            restored = torch.where(pixels_of(inside, grid)[..., None], unsteered, picture)
            outside = self.distance(restored, unsteered)
        return price._replace(lpips=self.distance(picture, unsteered), lpips_outside=outside)

    def _input(self, picture: Picture) -> Tensor:
        """[1, 3, height, width] in [-1, 1], as the network takes it."""
        return picture.to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1


def find_lpips(device: torch.device | str, grid: Grid) -> Lpips | str | None:
    """LPIPS where the user has it; None: the package is not installed; text: why it is left out all the same."""
    if find_spec("lpips") is None:
        return None
    if min(grid.width, grid.height) < LEAST_PX:
        return f"note: LPIPS is left out: its network needs {LEAST_PX} px, the picture has {grid.width} x {grid.height}"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if not weights.is_file():
        return f"note: LPIPS is left out: there is no {weights}; this fetches it once: {FETCH}"
    try:
        return Lpips(_network(random_backbone=False).to(device), device)
    except _CANNOT_BE_MADE as error:
        return f"note: LPIPS is left out: {str(error).splitlines()[0] if str(error) else repr(error)}"


def _network(*, random_backbone: bool) -> torch.nn.Module:
    """The package's network, silent. A random backbone is for tests: it needs no file."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a way of 2021
        network: torch.nn.Module = lpips.LPIPS(net=NET, pnet_rand=random_backbone, verbose=False)
    return network.requires_grad_(False)
