"""Where a steering keeps what it made: a PNG with its numbers per picture, sheets, a film, and one file of numbers.

A picture's numbers are written after it, so a picture that has them is complete. Next: `flux_ir.api.steer`.
"""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, read_json, versions, write_json
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.steering.dose import Made, Picture, Variant
from flux_ir.steering.edits import Edit, save_edits
from flux_ir.steering.perceptual import Lpips
from flux_ir.steering.regions import Grid
from flux_ir.steering.table import EDIT, NEURON, RANDOM, UNSTEERED, DoseRow, Run, row_json
from flux_ir.visualize.animate import write_gif
from flux_ir.visualize.palette import film_palette, thumbnail_side
from flux_ir.visualize.sheet import INK, PAGE, SheetColumn, SheetRow, draw_sheet

GIF_FPS = 2.0
CAPTION_PX = 18


class SteeringFolder:
    """One steering's folder. `identity` is what the pictures' bits depend on, but for seeds and strengths.

    Raises FluxIRError for a folder that holds a steering with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], edits: Sequence[Edit]) -> None:
        self.path, self.identity = path, dict(identity)
        self.edit, self.numbers = path / "edit.json", path / "steering.json"
        is_new = claim(path, self.identity, "a steering")
        if is_new and not any(isinstance(edit.sae, SparseAutoencoder) for edit in edits):
            save_edits(edits, self.edit)

    def picture(self, row: str, strength: float, seed: int) -> Path:
        """The PNG of one picture; its numbers are beside it, under the same name."""
        return self.picture_in(self.path, row, strength, seed)

    @staticmethod
    def picture_in(path: Path, row: str, strength: float, seed: int) -> Path:
        """The same in the folder of this path, which is not opened."""
        return path / "pictures" / f"{row}_strength_{strength:g}_seed_{seed}.png"

    def _run(self, row: str, strength: float, seed: int) -> Path:
        return self.picture(row, strength, seed).with_suffix(".json")

    def has(self, variant: Variant) -> bool:
        """Whether a picture is there with its numbers."""
        return self._run(variant.row, variant.strength, variant.seed).is_file()

    def keep(self, run: Run, made: Made) -> None:
        """Write a picture, then its numbers."""
        keep_picture(self.picture(run.row, run.strength, run.seed), made.picture.numpy())
        write_json(self._run(run.row, run.strength, run.seed), run.to_json())

    def read(self, variant: Variant) -> Run:
        """The numbers of a picture that is there."""
        return Run.from_json(read_json(self._run(variant.row, variant.strength, variant.seed)))

    def add_lpips(
        self, variants: Sequence[Variant], lpips: Lpips, inside: Bool[Tensor, "tokens"] | None, grid: Grid
    ) -> Iterator[Run]:
        """The numbers of pictures that are there, with LPIPS measured and kept where they have none yet."""
        for variant in variants:
            run = self.read(variant)
            if run.price is not None and run.price.lpips is None:
                picture = self._pixels(self.picture(run.row, run.strength, run.seed))
                unsteered = self._pixels(self.picture(UNSTEERED, 0.0, run.seed))
                run = run._replace(price=lpips.added_to(run.price, picture, unsteered, inside, grid))
                write_json(self._run(run.row, run.strength, run.seed), run.to_json())
            yield run

    def _pixels(self, path: Path) -> Picture:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB")))

    def write_numbers(self, settings: Mapping[str, Any], runs: Sequence[Run], table: Sequence[DoseRow]) -> Path:
        """Everything in one file: what was asked for, the table, and every picture's numbers."""
        write_json(
            self.numbers,
            {
                "settings": self.identity | dict(settings),
                "table": [row_json(row) for row in table],
                "pictures": [run.to_json() for run in runs],
                "versions": versions("torch"),
            },
        )
        return self.numbers

    # ---- What a person looks at

    def draw(self, title: str, runs: Sequence[Run]) -> dict[str, Path]:
        """The doses of every noise, the controls and the windows, each on one sheet; and a film from weak to strong."""
        doses = [run for run in runs if run.row == EDIT]
        strengths, seeds = sorted({run.strength for run in doses}), sorted({run.seed for run in doses})
        drawn = {"doses": self._strips("doses", title, "strength", [(f"seed {s}", EDIT, s) for s in seeds], strengths)}
        first = {run.row: run.seed for run in reversed(runs)}
        controls = [row for row in first if row == NEURON or row.startswith(RANDOM)]
        if controls:
            lines = [(row.replace("_", " "), row, first[row]) for row in (EDIT, NEURON, *sorted(controls, key=_number))]
            lines = [line for line in dict.fromkeys(lines) if line[1] in first]
            said = "strength; every line below the first moves the tokens as far, in another direction"
            drawn["controls"] = self._strips("controls", title, said, lines, strengths)
        windows = [run.row for run in runs if run.seed == seeds[0]]
        windows = [row for row in windows if row not in (EDIT, NEURON, UNSTEERED) and not row.startswith(RANDOM)]
        if windows:
            drawn["windows"] = self._windows(title, windows, seeds, runs)
        drawn["film"] = self._film(strengths, seeds)
        return drawn

    def _strips(
        self, name: str, title: str, subtitle: str, lines: Sequence[tuple[str, str, int]], strengths: Sequence[float]
    ) -> Path:
        """A line per (label, row, seed), a column per strength behind the unsteered picture."""
        columns = [SheetColumn("unsteered", "0"), *(SheetColumn(f"{s:g}", f"{s:g}") for s in strengths)]
        rows = [
            SheetRow(label, [self.picture(UNSTEERED, 0.0, seed), *(self.picture(row, s, seed) for s in strengths)])
            for label, row, seed in lines
        ]
        path = self.path / f"{name}.png"
        draw_sheet(title, subtitle, columns, rows, path)
        return path

    def _windows(self, title: str, windows: Sequence[str], seeds: Sequence[int], runs: Sequence[Run]) -> Path:
        strength = next(run.strength for run in runs if run.row == windows[0])
        columns = [SheetColumn(name, name[:1]) for name in (UNSTEERED, *windows, "all steps")]
        rows = [
            SheetRow(
                f"seed {seed}",
                [
                    self.picture(UNSTEERED, 0.0, seed),
                    *(self.picture(row, strength, seed) for row in windows),
                    self.picture(EDIT, strength, seed),
                ],
            )
            for seed in seeds
        ]
        path = self.path / "windows.png"
        draw_sheet(title, f"strength {strength:g}, in a third of the steps alone", columns, rows, path)
        return path

    def _film(self, strengths: Sequence[float], seeds: Sequence[int]) -> Path:
        """Every noise side by side, from unsteered to the largest strength: one frame per strength."""
        frames = [self._frame("unsteered", [self.picture(UNSTEERED, 0.0, seed) for seed in seeds])]
        frames += [self._frame(f"strength {s:g}", [self.picture(EDIT, s, seed) for seed in seeds]) for s in strengths]
        side = thumbnail_side(len(frames))
        palette = film_palette(frame.resize((side, side), Image.Resampling.NEAREST) for frame in frames)
        path = self.path / "doses.gif"
        write_gif(frames, palette, path, GIF_FPS)
        return path

    def _frame(self, caption: str, pictures: Sequence[Path]) -> Image.Image:
        opened = [Image.open(path).convert("RGB") for path in pictures]
        width, height = opened[0].size
        frame = Image.new("RGB", (width * len(opened), height + CAPTION_PX), PAGE)
        for number, picture in enumerate(opened):
            frame.paste(picture, (number * width, CAPTION_PX))
        ImageDraw.Draw(frame).text((4, CAPTION_PX // 2), caption, INK, ImageFont.load_default(12), anchor="lm")
        return frame


def claim(path: Path, identity: Mapping[str, Any], what: str) -> bool:
    """Write into a folder what its pictures' bits depend on; False where that is there already.

    Raises FluxIRError for a folder that holds `what` of another identity.
    """
    known = path / "identity.json"
    if not known.is_file():
        write_json(known, dict(identity))
        return True
    there = read_json(known)
    if differing := [name for name, value in identity.items() if there.get(name) != value]:
        raise FluxIRError(
            f"{path} holds {what} that differs in {', '.join(differing)}",
            hint="choose another --name, or leave it out: the name then follows from the settings",
        )
    return False


def keep_picture(path: Path, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write a picture as PNG."""
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    with complete_file(path) as beside:
        beside.write_bytes(encoded.getbuffer())


def _number(row: str) -> tuple[int, int]:
    """Controls by number: 2 before 10, the neuron first."""
    return (0, 0) if row == NEURON else (1, int(row.removeprefix(f"{RANDOM}_")))
