"""What `attention_maps` keeps: a file of maps for each step, means over the steps, and contact sheets.

Memory is that of the maps of one step and of one sum over the steps: it does not grow with their number.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.files import complete_file
from flux_ir.maps.attention import GROUPS, BlockMaps
from flux_ir.maps.concepts import concept_maps
from flux_ir.steering.regions import Grid
from flux_ir.visualize.heatmap import overlay
from flux_ir.visualize.sheet import SheetColumn, SheetRow, draw_sheet

SHEET_PX = 192
"""The longer side of a picture on the contact sheet."""
_NAME = "step_{step}.safetensors"


class Means:
    """Maps as they come: those of one step are kept until they are written, and sums over the steps of each block."""

    def __init__(self, folder: Path, grid: Grid, steps: Sequence[int], *, heads: bool, concept_blocks: int) -> None:
        """`heads`: maps have an axis of heads in front; `concept_blocks`: how many blocks have concept maps."""
        self.folder, self.grid, self.steps, self.heads = folder, grid, steps, heads
        self.files: list[Path] = []
        self._concept_maps = len(steps) * concept_blocks
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, BlockMaps] = {}
        self._concepts: Tensor | None = None

    def take(self, step: int, block: str, maps: BlockMaps) -> None:
        """One block of a step."""
        self._step |= {f"{block}/{name}": value for name, value in self._on_grid(maps).items()}
        if self.heads:
            maps = maps.mean_of_heads()
        before = self._sums.get(block)
        self._sums[block] = maps if before is None else BlockMaps(*map(torch.add, before, maps))

    def take_concepts(self, step: int, block: int, scores: Tensor) -> None:
        """The concepts' scores in a block of a step."""
        maps = rearrange(concept_maps(scores)[0], "c (rows columns) -> c rows columns", rows=self.grid.rows).cpu()
        self._step[f"double.{block}/concepts"] = maps
        self._concepts = maps if self._concepts is None else self._concepts + maps

    def concept_map(self) -> Tensor | None:
        """Mean over steps and blocks."""
        return None if self._concepts is None else self._concepts / self._concept_maps

    def write_step(self, step: int) -> None:
        """All blocks of a step as one file."""
        path = self.folder / _NAME.format(step=step)
        kept = {name: value.contiguous() for name, value in self._step.items() if value.numel()}
        metadata = {"groups": ", ".join(GROUPS), "step": str(step)}
        with complete_file(path) as beside:
            save_file(kept, beside, metadata)
        self.files.append(path)
        self._step = {}

    def _on_grid(self, maps: BlockMaps) -> dict[str, Tensor]:
        return {
            name: value.unflatten(-1, (self.grid.rows, self.grid.columns)) for name, value in maps._asdict().items()
        }

    def by_group(self) -> dict[str, dict[str, Tensor]]:
        """Means over steps and over the blocks of each group."""
        return self._means(block_groups(list(self._sums)))

    def by_block(self) -> dict[str, dict[str, Tensor]]:
        """Means over steps, of each block."""
        return self._means({block: [block] for block in self._sums})

    def _means(self, groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Tensor]]:
        means = {}
        for group, blocks in groups.items():
            summed = zip(*(self._sums[block] for block in blocks), strict=True)
            means[group] = self._on_grid(BlockMaps(*(sum(parts) / (len(self.steps) * len(blocks)) for parts in summed)))
        return means

    def masses(self) -> dict[str, dict[str, float]]:
        """How the image's attention is divided, mean over image tokens and steps: by block, and over all."""
        of_block = {block: sums.to_groups.mean(dim=-1) / len(self.steps) for block, sums in self._sums.items()}
        every = {"all": torch.stack(list(of_block.values())).mean(dim=0)} | of_block
        return {block: dict(zip(GROUPS, mass.tolist(), strict=True)) for block, mass in every.items()}

    def register_counts(self) -> dict[str, float]:
        """How many image tokens are registers in each block, mean over the steps."""
        return {block: float(sums.registers.sum()) / len(self.steps) for block, sums in self._sums.items()}


def block_groups(blocks: Sequence[str]) -> dict[str, list[str]]:
    """All blocks, and the first and second half of each kind: `double 0-9`, `double 10-18`."""
    groups = {"all": list(blocks)}
    for kind in ("double", "single"):
        of_kind = [block for block in blocks if block.startswith(kind)]
        half = (len(of_kind) + 1) // 2
        for part in (of_kind[:half], of_kind[half:]):
            if part:
                numbers = [block.split(".")[1] for block in part]
                groups[f"{kind} {numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")] = part
    return groups


class MapSheet(NamedTuple):
    """A picture with maps over it: how its pages are titled and where its files go."""

    folder: Path
    picture: Image.Image
    prompt: str
    source: str
    """The model and the seed."""

    def draw_words(
        self, path: Path, mean: Mapping[str, Mapping[str, Tensor]], words: Sequence[str], patches: Sequence[int]
    ) -> None:
        """Words and patches down, groups of blocks across; each map from its least to its largest value."""
        rows = []
        for direction, number, label in _rows(words, patches):
            cells: list[Path | None] = [self._plain()]
            for group, maps in mean.items():
                values = maps[direction][number].double().numpy()
                path_of_cell = f"{direction}_{number}/{group.replace(' ', '_')}.png"
                cells.append(self._over(path_of_cell, values, values.min(), values.max()))
            rows.append(SheetRow(label, cells))
        columns = [SheetColumn(name, name) for name in ("picture", *mean)]
        subtitle = f"{self.source}: attention, mean over steps, each from its least to its most"
        draw_sheet(self.prompt, subtitle, columns, rows or [SheetRow("no words", [self._plain()])], path)

    def draw_concepts(self, path: Path, concept_map: Tensor, concepts: Sequence[str], blocks: Sequence[int]) -> None:
        """Concepts across, all from the least to the largest value of all."""
        values = concept_map.double().numpy()
        cells: list[Path | None] = [self._plain()]
        cells += [self._over(f"concept_{n}.png", one, values.min(), values.max()) for n, one in enumerate(values)]
        columns = [SheetColumn(name, name) for name in ("picture", *concepts)]
        subtitle = f"{self.source}: the concept a token is most like, double {', '.join(map(str, blocks))}"
        draw_sheet(self.prompt, subtitle, columns, [SheetRow("", cells)], path)

    def _small(self) -> Image.Image:
        picture = self.picture.copy()
        picture.thumbnail((SHEET_PX, SHEET_PX))
        return picture

    def _plain(self) -> Path:
        return _saved(self._small(), self.folder / "overlays" / "picture.png")

    def _over(self, name: str, values: NDArray[np.float64], least: float, most: float) -> Path:
        scaled = (values - least) / (most - least) if most > least else np.zeros_like(values)
        return _saved(overlay(self._small(), scaled, 1.0, smooth=True), self.folder / "overlays" / name)


def _rows(words: Sequence[str], patches: Sequence[int]) -> Iterator[tuple[str, int, str]]:
    for number, word in enumerate(words):
        yield "to_words", number, f"image > {word}"
        yield "from_words", number, f"{word} > image"
    for number, patch in enumerate(patches):
        yield "from_patches", number, f"patch {patch} > image"


def _saved(picture: Image.Image, path: Path) -> Path:
    with complete_file(path) as beside:
        picture.save(beside, "PNG")
    return path
