"""What the page knows: run folders read into one JSON value, described in docs/file-formats.md.

Only what lies in the run folders is read: which pictures there are, `lens.json` and the metadata. No path is ever taken
from their content.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.layout import Kind, Lens, RunFolder, find_runs

LENSES: tuple[Lens, ...] = get_args(Lens)
FITTED: tuple[Lens, ...] = tuple(lens for lens in LENSES if lens not in ("euler", "x0"))
"""Those that read a velocity of their own from a block."""
OTHER_NUMBERS = {"distance": "other_distance", "cka": "other_cka"}
"""What `difference.json` says of a block and the same one of another run: by its name there, and on the page."""
NUMBERS = (
    *("relative_distance", "cosine"),
    *(f"{lens}_{number}" for lens in FITTED for number in ("relative_distance", "cosine")),
    *(f"psnr_{lens}_db" for lens in LENSES),
    *OTHER_NUMBERS.values(),
)
FACTS = ("model", "seed", "width", "height", "guidance", "num_steps", "timestamp")  # shown as they are

_MAKE_AGAIN = "make the run again, or leave it out by naming the others with --generation_id"
_SITE = re.compile(r"(double|single)\.(0|[1-9]\d*)(\.img)?")


class Block(NamedTuple):
    """One block of the transformer. Sorts in depth order: double before single, 2 before 10."""

    kind: Kind
    number: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.number}"


Pictures = Mapping[tuple[Block, int], Path]  # by block and step


@dataclass(frozen=True)
class PageRun:
    """One generation as the page shows it: blocks in depth order, steps, and a picture for most of their pairs."""

    folder: RunFolder
    facts: Mapping[str, Any]
    prompt: str
    timesteps: Sequence[float]
    blocks: Sequence[Block]
    steps: Sequence[int]
    pictures: Mapping[Lens, Pictures]
    numbers: Mapping[tuple[Block, int], Mapping[str, float | None]]
    other: Mapping[str, str] | None = None
    """The run that it was compared with, and how that one was fed; None: it was not compared."""

    def missing(self, lens: Lens) -> list[tuple[int, int]]:
        """Places in the grid without a picture, as (row, column)."""
        pictures = self.pictures[lens]
        return [
            (row, column)
            for row, block in enumerate(self.blocks)
            for column, step in enumerate(self.steps)
            if (block, step) not in pictures
        ]


def decoded_runs(output_dir: Path) -> list[str]:
    """The ids of all runs with decoded pictures, oldest first. Raises FluxIRError if there are none."""
    if not output_dir.is_dir():
        raise FluxIRError(
            f"the folder {output_dir} does not exist", hint="name the folder of the runs with --output_dir"
        )
    runs = find_runs(output_dir)
    decoded = [run for run in runs if any(_pictures(run).values())]
    if not decoded:
        raise FluxIRError(
            f"the explorer needs decoded pictures: {output_dir} has {len(runs)} runs and none of them has any",
            hint="flux-ir lens --generation_id ID decodes a run" if runs else "make one with capture_sample.py",
        )
    return [run.generation_id for run in sorted(decoded, key=lambda run: (run.find_metadata().name, run.generation_id))]


def read_run(output_dir: Path, generation_id: str) -> PageRun:
    """One run from its folder. Raises FluxIRError where there is no such run, no picture in it, or a broken file."""
    folder = RunFolder(output_dir, generation_id)
    metadata = read_json(folder.find_metadata(), hint=_MAKE_AGAIN)
    pictures = {lens: found for lens, found in _pictures(folder).items() if found}
    if not pictures:
        raise FluxIRError(
            f"generation {generation_id} has no decoded pictures",
            hint=f"flux-ir lens --generation_id {generation_id} --lens both makes them",
        )
    cells = {cell for found in pictures.values() for cell in found}
    return PageRun(
        folder=folder,
        facts={name: metadata.get(name) for name in FACTS} | {"weights": weights_of(metadata)},
        prompt=str(metadata.get("prompt", "")),
        timesteps=[float(t) for t in metadata.get("timesteps") or []],
        blocks=sorted({block for block, _ in cells}),
        steps=sorted({step for _, step in cells}),
        pictures=pictures,
        numbers=_with_differences(_numbers(folder.lens_json), folder.difference_json),
        other=_other(folder.difference_json),
    )


def weights_of(metadata: Mapping[str, Any]) -> str | None:
    """What a run says of its transformer's weights: quantised or not, and with which LoRAs; None: it says nothing."""
    file = _object(_object(metadata.get("files")).get("transformer"))
    if not file:
        return None
    kinds = [str(metadata["quantize"])] if metadata.get("quantize") else []
    kinds += [f"a file of {name}" for name in _object(file.get("stored_as"))]
    named = metadata.get("loras")
    loras = [_object(lora) for lora in named] if isinstance(named, list) else []
    told = [f"LoRA {Path(str(lora.get('path', ''))).name} at {lora.get('strength')}" for lora in loras]
    return ", ".join([f"quantised: {', '.join(kinds)}" if kinds else "not quantised", *told])


def _object(value: Any) -> Mapping[str, Any]:
    """A JSON object; of a file that somebody has changed, an empty one in place of something else."""
    return value if isinstance(value, Mapping) else {}


def run_entry(run: PageRun) -> dict[str, Any]:
    """What the page's JSON says of a run, all but the addresses of its pictures (`lenses`, `picture`)."""
    numbers = {
        name: [[run.numbers.get((block, step), {}).get(name) for step in run.steps] for block in run.blocks]
        for name in NUMBERS
    }
    return {
        "id": run.folder.generation_id,
        "prompt": run.prompt,
        **run.facts,
        "blocks": [str(block) for block in run.blocks],
        "steps": list(run.steps),
        "times": [_interval(run.timesteps, step) for step in run.steps],
        **({} if run.other is None else {"other": dict(run.other)}),
        "numbers": {name: rows for name, rows in numbers.items() if any(v is not None for row in rows for v in row)},
    }


def _pictures(folder: RunFolder) -> dict[Lens, Pictures]:
    return {
        lens: {(Block(one.kind, one.block), one.step): one.path for one in folder.decoded_images(lens)}
        for lens in LENSES
    }


def _numbers(lens_json: Path) -> dict[tuple[Block, int], dict[str, float | None]]:
    """The numbers of `lens.json` by block and step; empty without the file (a decoding that was interrupted)."""
    rows = _rows(lens_json) if lens_json.exists() else {}
    return {place: {name: _finite(row.get(name)) for name in NUMBERS} for place, row in rows.items()}


def _with_differences(
    numbers: dict[tuple[Block, int], dict[str, float | None]], difference_json: Path
) -> dict[tuple[Block, int], dict[str, float | None]]:
    """The same with those of `difference.json`, where the run was compared with another."""
    rows = _rows(difference_json) if difference_json.exists() else {}
    for place, row in rows.items():
        numbers.setdefault(place, {}).update({name: _finite(row.get(there)) for there, name in OTHER_NUMBERS.items()})
    return numbers


def _other(difference_json: Path) -> dict[str, str] | None:
    """Which run it was compared with, by its id, and how that was fed: free, or forced."""
    if not difference_json.exists():
        return None
    content = read_json(difference_json, required=("other", "mode"), hint=_MAKE_AGAIN)
    return {"id": str(content["other"]), "mode": str(content["mode"])}


def _rows(path: Path) -> dict[tuple[Block, int], dict[str, Any]]:
    """What a file of numbers has for each block and step."""
    found: dict[tuple[Block, int], dict[str, Any]] = {}
    try:
        for site, rows in read_json(path, hint=_MAKE_AGAIN)["sites"].items():
            if parsed := _SITE.fullmatch(site):
                block = Block("double" if parsed[1] == "double" else "single", int(parsed[2]))
                found |= {(block, row["step"]): dict(row) for row in rows}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FluxIRError(
            f"{path} is not what this program writes: {type(error).__name__}: {error}", hint=_MAKE_AGAIN
        ) from error
    return found


def _finite(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _interval(timesteps: Sequence[float], step: int) -> tuple[float, float] | None:
    """Flow time before and after a step."""
    return (timesteps[step], timesteps[step + 1]) if step + 1 < len(timesteps) else None
