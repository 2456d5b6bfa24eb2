"""Which pictures of a run are shown, and in which order: read from its folder alone, without the model.

A decoded generation has one picture per block and step: a grid. What should be in the grid is known from the pictures
that are there and from `lens.json`, so that a picture that has gone missing is noticed. `film.py` draws the frames.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.layout import Kind, Lens, RunFolder

_SITE = re.compile(r"(double|single)\.(\d{1,9})(\.img)?")


class Cell(NamedTuple):
    """One block at one step. Cells sort in the order the sampler met them: step, double before single, 2 before 10."""

    step: int
    kind: Kind
    block: int

    @property
    def label(self) -> str:
        """The block's name: "double 7"."""
        return f"{self.kind} {self.block}"

    @property
    def captions(self) -> tuple[str, ...]:
        """What the picture shows, from the full sentence to what fits on a stamp. All say the same."""
        step, block = f"Step {self.step}", f"block {self.block}"
        terse_step, terse_block = f"s{self.step}", f"{self.kind[0]}{self.block}"
        return (
            f"{step} | {self.kind} {block}",
            f"{step}\n{self.kind} {block}",
            f"{step}\n{self.kind}\n{block}",
            f"{terse_step} {terse_block}",
            f"{terse_step}\n{terse_block}",
        )


class Frame(NamedTuple):
    """One cell and its pictures: one, or one per generation where several stand side by side."""

    cell: Cell
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Choice:
    """Which cells of the grid are shown, None leaving nothing out. `max_blocks` counts in depth order, in each step."""

    block_type: Kind | None = None
    max_blocks: int | None = None
    steps: tuple[int, ...] | None = None
    order: Literal["depth", "steps"] = "depth"


def run_facts(folder: RunFolder) -> dict[str, Any]:
    """The run's metadata: model, seed, prompt and so on. Empty if the file is gone: it only names what is shown."""
    if not folder.has_metadata():
        return {}
    return read_json(folder.find_metadata())


def find_cells(folder: RunFolder, lens: Lens) -> list[Cell]:
    """Every cell that was decoded with this lens, in order, whether or not its picture is still there.

    Raises FluxIRError if no picture is there at all.
    """
    found = set(_cells_on_disk(folder, lens))
    if not found:
        raise _nothing_decoded(folder, lens)
    found |= set(_cells_on_record(folder, lens))
    blocks = {(cell.kind, cell.block) for cell in found}
    return sorted(Cell(step, *block) for step in {cell.step for cell in found} for block in blocks)


def choose_cells(cells: Sequence[Cell], choice: Choice) -> list[Cell]:
    """The cells to show, in the order to show them. Raises FluxIRError for steps or blocks that are not there."""
    steps = sorted({cell.step for cell in cells})
    if unknown := sorted(set(choice.steps or ()) - set(steps)):
        raise FluxIRError(
            f"--steps must be steps that were decoded, {in_ranges(steps)}: got {', '.join(map(str, unknown))}",
            hint="leave --steps out for all of them",
        )
    blocks = sorted({(cell.kind, cell.block) for cell in cells if choice.block_type in (None, cell.kind)})
    if not blocks:
        raise FluxIRError(
            f"no {choice.block_type} blocks were decoded, only {cells[0].kind} ones", hint="leave --block_type out"
        )
    shown = set(blocks[: choice.max_blocks])
    chosen = [cell for cell in cells if (cell.kind, cell.block) in shown and cell.step in (choice.steps or steps)]
    if choice.order == "steps":
        return sorted(chosen, key=lambda cell: (cell.kind, cell.block, cell.step))
    return sorted(chosen)


def make_frames(folders: Sequence[RunFolder], lens: Lens, cells: Sequence[Cell]) -> list[Frame]:
    """One frame per cell, with the picture that each folder has of it."""
    return [
        Frame(cell, tuple(folder.decoded_image(lens, cell.step, cell.kind, cell.block) for folder in folders))
        for cell in cells
    ]


def in_ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in rising order, as they are written on the command line: 0-3,5,8-9."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def _cells_on_disk(folder: RunFolder, lens: Lens) -> Iterator[Cell]:
    for image in folder.decoded_images(lens):
        yield Cell(image.step, image.kind, image.block)


def _cells_on_record(folder: RunFolder, lens: Lens) -> Iterator[Cell]:
    """The cells whose picture `lens.json` has a number for. Nothing if there is no such file yet."""
    if not folder.lens_json.exists():
        return
    numbers = read_json(folder.lens_json, hint="delete it, and decode the capture again")
    for site, rows in numbers.get("sites", {}).items():
        if match := _SITE.fullmatch(site):
            for row in rows:
                if f"psnr_{lens}_db" in row:
                    yield Cell(int(row["step"]), _kind(match[1]), int(match[2]))


def _kind(text: str) -> Kind:
    return "double" if text == "double" else "single"


def _nothing_decoded(folder: RunFolder, lens: Lens) -> FluxIRError:
    other: Lens = "x0" if lens == "euler" else "euler"
    command = f"flux-ir lens --generation_id {folder.generation_id} --lens {lens}"
    if lens not in ("euler", "x0"):
        command += " --fitted_lens lenses/NAME"
    if folder.output_dir != Path("output"):
        command += f" --output_dir {shlex.quote(str(folder.output_dir))}"
    hint = f"make them: {command}"
    if any(_cells_on_disk(folder, other)):
        hint += f"; or show those that there are: --lens {other}"
    return FluxIRError(
        f"generation {folder.generation_id} has no pictures of the {lens} lens: {folder.decoded(lens)} holds none",
        hint=hint,
    )
