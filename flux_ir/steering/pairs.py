"""Pairs of prompts that differ in something, and the region of the picture in which they do.

A pair names its region, or (flux-tiny's world) the judge finds it: where the objects are whose words differ. Next:
`transfer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flux_ir.demo.judge import find_objects, match_objects
from flux_ir.demo.scenes import parse_caption
from flux_ir.errors import FluxIRError, nearest
from flux_ir.sampling.latents import TOKEN_PX
from flux_ir.steering.regions import Grid, Mask, Region
from flux_ir.tables import read_rows

FIELDS = ("prompt", "edited_prompt", "region", "mask", "above", "seed")
_HINT = 'write {"prompt": "a red circle", "edited_prompt": "a blue circle", "region": [0, 0, 64, 128]}, for example'


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two prompts that are sampled from the same noise. Raises FluxIRError for prompts that are the same."""

    prompt: str
    edited_prompt: str
    region: Region | None = None
    """None: where the judge sees the difference, or else the whole picture."""
    seed: int | None = None
    """Of its first noise; None: the one that is asked for."""

    def __post_init__(self) -> None:
        for name in ("prompt", "edited_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise FluxIRError(f"{name} must be a text: got {value!r}", hint=_HINT)
        if self.prompt == self.edited_prompt:
            raise FluxIRError(
                f"the two prompts of a pair must differ: got {self.prompt!r} twice", hint="change what shall change"
            )


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a .jsonl file, one object per line. Files of masks are found from its folder.

    Raises FluxIRError for a line that is no pair, naming it, and for a file without a pair.
    """
    pairs = []
    for row in read_rows(path, what="pairs"):
        try:
            pairs.append(_pair(row.cells, path.parent))
        except FluxIRError as error:
            raise FluxIRError(f"{path}, line {row.line}: {error.message}", hint=error.hint) from error
    if not pairs:
        raise FluxIRError(f"{path} must have a pair per line: it has none", hint=_HINT)
    return pairs


def _pair(cells: dict[str, Any], folder: Path) -> Pair:
    if unknown := [name for name in cells if name not in FIELDS]:
        near = nearest(str(unknown[0]), FIELDS)
        raise FluxIRError(
            f"a pair has no {unknown[0]!r}", hint=f"did you mean {near}?" if near else f"it has {', '.join(FIELDS)}"
        )
    if missing := [name for name in FIELDS[:2] if name not in cells]:
        raise FluxIRError(f"a pair has a prompt and an edited_prompt: it lacks {missing[0]}", hint=_HINT)
    seed, mask = cells.get("seed"), cells.get("mask")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise FluxIRError(f"seed must be a whole number from 0 on: got {seed!r}", hint="leave it out")
    if mask is not None and not isinstance(mask, str):
        raise FluxIRError(f"mask must be the name of a file: got {mask!r}", hint="a PNG, or a .npy map")
    above = cells.get("above", 0.5)
    if isinstance(above, bool) or not isinstance(above, int | float):
        raise FluxIRError(f"above must be a number: got {above!r}", hint="leave it out")
    region = given_region(cells.get("region"), None if mask is None else folder / mask, float(above))
    return Pair(prompt=cells["prompt"], edited_prompt=cells["edited_prompt"], region=region, seed=seed)


def given_region(rectangle: object, mask: str | Path | None, above: float) -> Region | None:
    """The region as people give it: left, top, right, bottom [px], or a file. Raises FluxIRError for anything else."""
    if rectangle is not None and mask is not None:
        raise FluxIRError("a region is a rectangle or a mask: got both", hint="leave one of them out")
    if rectangle is not None:
        sides = list(rectangle) if isinstance(rectangle, list | tuple) else []
        if len(sides) != 4 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
            raise FluxIRError(
                f"a region is left, top, right, bottom in px, whole numbers: got {rectangle!r}",
                hint="0,0,64,128 is the left half of a picture of 128 x 128 px",
            )
        return Region(rectangle=tuple(sides))
    if mask is not None:
        is_map = Path(mask).suffix == ".npy"
        return Region(map=mask, above=above) if is_map else Region(image=mask, above=above)
    return None


# ---- Where two pictures of flux-tiny's world differ


def judged_region(
    pair: Pair, pictures: tuple[UInt8[np.ndarray, "height width 3"], ...], grid: Grid
) -> tuple[Mask, str] | None:
    """The tokens on which the judge finds the objects whose words differ, in either picture, and what they are.

    None where the prompts are no captions of flux-tiny's world, differ in more than words of objects, or no such object
    is found.
    """
    try:
        scenes = [parse_caption(pair.prompt), parse_caption(pair.edited_prompt)]
    except ValueError:
        return None
    ours, theirs = scenes
    if ours.background != theirs.background or len(ours.things) != len(theirs.things) or grid.width != grid.height:
        return None
    differing = [
        number for number, things in enumerate(zip(ours.things, theirs.things, strict=True)) if _differ(*things)
    ]
    mask = np.zeros((grid.height, grid.width), dtype=bool)
    for scene, picture in zip(scenes, pictures, strict=True):
        sight, masks = find_objects(picture)
        matched = match_objects(sight.objects, scene)
        for number in differing:
            if (found := matched[number]) is not None:
                mask |= masks[found]
    tokens = mask.reshape(grid.rows, TOKEN_PX, grid.columns, TOKEN_PX).any(axis=(1, 3)).reshape(-1)
    words = " and ".join(f"{ours.things[number].words} or {theirs.things[number].words}" for number in differing)
    return (tokens, words) if tokens.any() else None


def _differ(thing: Any, other: Any) -> bool:
    return (thing.words, thing.place) != (other.words, other.place)


def cases_of(pairs: list[Pair], seed: int, seeds: int) -> Iterator[tuple[int, Pair, int]]:
    """Every pair with each of its noises: its number (from 1), itself, the noise's seed."""
    for number, pair in enumerate(pairs, start=1):
        first = seed if pair.seed is None else pair.seed
        for noise in range(first, first + seeds):
            yield number, pair, noise
