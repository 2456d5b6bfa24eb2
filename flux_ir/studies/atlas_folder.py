"""The folder of an atlas: which units of work there are, and what of each is kept.

A unit is a batch of pictures with one block edited in every way. Its numbers are in one file, named by a digest of all
that they depend on: units of other settings, prompts or weights never meet. What exists is complete. Next:
`flux_ir.api.ablate`, which does the work.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from flux_ir.collecting.prompts import WorkItem
from flux_ir.files import complete_file, read_json, write_json
from flux_ir.shapes import Pixels
from flux_ir.steering.dose import Picture
from flux_ir.studies.atlas import Ablation

FORMAT = 1
"""Of the units' files: numbers that are computed in another way have another."""
UNEDITED, OTHER_PROMPT = "unedited", "other_prompt"
"""What a unit without a block holds: the pictures of its prompts, and of the others."""
MOST_PICTURE_PX = 256
"""Pictures that are kept to be looked at are no wider and no higher."""
Numbers = list[dict[str, Any]]
"""Of every picture of a batch: see `atlas.measured`."""


class Unit(NamedTuple):
    """One batch of pictures with one block edited in every way; `block` None: the unedited pictures."""

    items: tuple[WorkItem, ...]
    others: tuple[str, ...] | None
    """The prompts that patches come from, one for each picture; None: there is one prompt alone."""
    block: str | None


def units_of(items: Sequence[WorkItem], blocks: Sequence[str], batch_size: int) -> list[Unit]:
    """All work, batch by batch: fixed slices of the pictures, so that no number depends on who computes it.

    The other prompt of a picture is the next one that differs; that of the last is the first.
    """
    prompts = list(dict.fromkeys(item.prompt for item in items))
    following = dict(zip(prompts, prompts[1:] + prompts[:1], strict=True))
    units = []
    for first in range(0, len(items), batch_size):
        batch = tuple(items[first : first + batch_size])
        others = tuple(following[item.prompt] for item in batch) if len(prompts) > 1 else None
        units += [Unit(batch, others, block) for block in (None, *blocks)]
    return units


class AtlasFolder:
    """One atlas on disk. `identity` is what all numbers depend on; of the pictures `kept`, by id, the JPEGs stay."""

    def __init__(self, path: Path, identity: Mapping[str, Any], kept: Sequence[str]) -> None:
        self.path, self.identity, self.kept = path, {"format": FORMAT, **identity}, frozenset(kept)

    def missing(self, unit: Unit, ablations: Sequence[Ablation]) -> list[str]:
        """The names of what has to be made of a unit: of its edits, or of the runs without one."""
        known = self.read(unit)
        names = self.names(unit, ablations)
        return [name for name in names if name not in known or not all(p.is_file() for _, p in self._jpegs(unit, name))]

    def names(self, unit: Unit, ablations: Sequence[Ablation]) -> list[str]:
        """What a unit holds when it is complete."""
        if unit.block is None:
            return [UNEDITED] if unit.others is None else [UNEDITED, OTHER_PROMPT]
        return [ablation.name for ablation in ablations]

    def read(self, unit: Unit) -> dict[str, Numbers]:
        """The numbers that are kept of a unit, by the name of the edit."""
        path = self._part(unit)
        return read_json(path, required=("cells",))["cells"] if path.is_file() else {}

    def keep(self, unit: Unit, name: str, numbers: Numbers, pixels: Pixels) -> None:
        """Write pictures that are to be looked at, then the numbers, beside those that were there."""
        for number, path in self._jpegs(unit, name):
            with complete_file(path) as beside:
                beside.write_bytes(_small_jpeg(pixels[number]))
        cells = self.read(unit) | {name: numbers}
        # In the order of the alphabet: whatever was asked for first, the file has the same bytes.
        write_json(self._part(unit), {"key": self._key(unit), "cells": dict(sorted(cells.items()))})

    def _jpegs(self, unit: Unit, name: str) -> Iterator[tuple[int, Path]]:
        """The pictures of a unit that are kept: the number in the batch, and the file."""
        for number, item in enumerate(unit.items):
            if item.id in self.kept:
                yield number, self.path / picture_path(item.id, unit.block, name)

    def _part(self, unit: Unit) -> Path:
        digest = hashlib.sha256(json.dumps(self._key(unit), sort_keys=True).encode()).hexdigest()[:16]
        return self.path / "parts" / f"{unit.block or UNEDITED}_{digest}.json"

    def _key(self, unit: Unit) -> dict[str, Any]:
        items = [[item.prompt, item.seed] for item in unit.items]
        return {**self.identity, "block": unit.block, "pictures": items, "others": unit.others}


def picture_path(item_id: str, block: str | None, name: str) -> str:
    """Where a picture to be looked at is, below the folder of an atlas."""
    return f"pictures/{item_id}/{name}.jpg" if block is None else f"pictures/{item_id}/{block}/{name}.jpg"


def _small_jpeg(pixels: Picture) -> bytes:
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((MOST_PICTURE_PX, MOST_PICTURE_PX), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, format="JPEG", quality=92, subsampling=0)
    return encoded.getvalue()
