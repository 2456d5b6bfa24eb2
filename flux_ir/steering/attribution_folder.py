"""Where an attribution keeps what it made: the estimates, a picture and its latent per removal, a table, a sheet.

A picture's latent is written after it, so a picture that has one is complete. Next: `flux_ir.api.attribute`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_ir.files import complete_file, versions, write_json
from flux_ir.sampling.latents import TOKEN_PX
from flux_ir.steering.attribution import Estimates, Inside
from flux_ir.steering.dose import Made, Variant
from flux_ir.steering.folder import claim, keep_picture
from flux_ir.steering.regions import Grid
from flux_ir.steering.removals import UNSTEERED, Agreement, Removal, Together
from flux_ir.tables import write_rows
from flux_ir.visualize.sheet import SheetColumn, SheetRow, draw_sheet

AMPLIFIED = 4
"""What differences are multiplied by where they are drawn."""
OUTLINE = (255, 0, 160)


def removal_name(sae: int, feature: int) -> str:
    """What the picture without one feature is called."""
    return f"without_{sae}_{feature}"


class AttributionFolder:
    """One attribution's folder. `identity` is what its numbers depend on, but for which features are removed.

    Raises FluxIRError for a folder that holds an attribution with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity, self.pictures = path, dict(identity), path / "pictures"
        self.estimates, self.table = path / "estimates.safetensors", path / "removals.csv"
        self.numbers, self.sheet = path / "attribution.json", path / "removals.png"
        claim(path, identity, "an attribution")

    # ---- What was computed

    def read_estimates(self) -> list[Estimates] | None:
        """The estimates of every autoencoder; None if they are not there yet."""
        if not self.estimates.is_file():
            return None
        stored = load_file(self.estimates)
        count = len({name.partition(".")[0] for name in stored})
        return [Estimates(**{name: stored[f"{i}.{name}"] for name in Estimates._fields}) for i in range(count)]

    def keep_estimates(self, estimates: Sequence[Estimates]) -> None:
        """Write the estimates of every autoencoder."""
        named = {f"{i}.{name}": tensor for i, one in enumerate(estimates) for name, tensor in one._asdict().items()}
        with complete_file(self.estimates) as beside:
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, beside)

    def picture(self, name: str) -> Path:
        """The PNG of one picture; its latent is beside it, under the same name."""
        return self.pictures / f"{name}.png"

    def _latent(self, name: str) -> Path:
        return self.pictures / f"{name}.safetensors"

    def has(self, variant: Variant) -> bool:
        """Whether a picture is there with its latent."""
        return self._latent(variant.row).is_file()

    def keep(self, made: Made) -> None:
        """Write a picture, then its latent."""
        keep_picture(self.picture(made.variant.row), made.picture.numpy())
        with complete_file(self._latent(made.variant.row)) as beside:
            save_file({"latent": made.latent.contiguous()}, beside)

    def read(self, variant: Variant) -> Made:
        """A picture that is there."""
        with Image.open(self.picture(variant.row)) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        return Made(variant, load_file(self._latent(variant.row))["latent"], pixels, None)

    # ---- What people read

    def write(
        self,
        chosen: Mapping[str, Any],
        removals: Sequence[Removal],
        agreement: Agreement,
        together: Together,
    ) -> None:
        """The numbers of every removal, as JSON and as CSV."""
        rows = [removal._asdict() for removal in removals]
        write_json(
            self.numbers,
            {
                "settings": self.identity | dict(chosen),
                "agreement": agreement._asdict(),
                "together": together._asdict(),
                "removals": rows,
                "versions": versions("torch"),
            },
        )
        write_rows(self.table, [{name: row[name] for name in row if name != "by_step"} for row in rows])

    def draw(
        self,
        title: str,
        whose: str,
        best: Sequence[Removal],
        at_once: str,
        together: Together,
        inside: Inside,
        grid: Grid,
        *,
        several: bool,
    ) -> None:
        """The unsteered picture with its region, then those of the best removals, alone and `at_once`.

        Below each is where it differs from the unsteered one. `several`: with more than one autoencoder.
        """
        shown = [
            (
                removal_name(removal.sae, removal.feature),
                SheetColumn(
                    f"{f'{removal.site} ' if several else ''}{removal.feature}: {removal.latent_inside:.2f}",
                    str(removal.feature),
                ),
            )
            for removal in best
        ]
        if len(best) > 1:
            shown.append((at_once, SheetColumn(f"all {len(best)}: {together.effect_of_sum:.2f}", "all")))
        subtitle = f"{whose}: without each feature, and how far that moves the latent in the outlined region"
        with Image.open(self.picture(UNSTEERED)) as opened:
            unsteered = np.asarray(opened.convert("RGB"))
        region = self.picture("region")
        keep_picture(region, _outlined(unsteered, inside, grid))
        differences: list[Path | None] = [None]
        for name, _ in shown:
            with Image.open(self.picture(name)) as opened:
                away = np.abs(np.asarray(opened.convert("RGB")).astype(int) - unsteered.astype(int))
            differences.append(self.picture(f"{name}_difference"))
            keep_picture(self.picture(f"{name}_difference"), np.minimum(AMPLIFIED * away, 255).astype(np.uint8))
        columns = [SheetColumn("unsteered", "0"), *(column for _, column in shown)]
        pictures = SheetRow("without", [region, *(self.picture(name) for name, _ in shown)])
        draw_sheet(title, subtitle, columns, [pictures, SheetRow(f"difference x {AMPLIFIED}", differences)], self.sheet)


def _outlined(pixels: np.ndarray, inside: Inside, grid: Grid) -> np.ndarray:
    """The picture with a line around the region; itself where that is all of it."""
    mask = inside.reshape(grid.rows, grid.columns).numpy()
    mask = mask.repeat(TOKEN_PX, axis=0).repeat(TOKEN_PX, axis=1)
    if mask.all():
        return pixels
    around = np.pad(mask, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:] & mask
    drawn = pixels.copy()
    drawn[mask & ~inner] = OUTLINE
    return drawn
