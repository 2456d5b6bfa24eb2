"""Pairs of prompts that differ in something, and the region of the picture in which they do.

A pair names its region, or (flux-tiny's world) the judge finds it: where the objects are whose words differ. Next:
`transfer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from flux_ir.demo.judge import find_objects, match_objects
from flux_ir.demo.scenes import parse_caption
from flux_ir.errors import FluxIRError, counted, nearest
from flux_ir.sampling.latents import TOKEN_PX
from flux_ir.steering.dose import Made
from flux_ir.steering.regions import Grid, Mask, Region, given_region
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


class Case(NamedTuple):
    """One pair with one noise."""

    pair_number: int
    pair: Pair
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"pair_{self.pair_number}_seed_{self.seed}"


def cases_of(pairs: list[Pair], seed: int, seeds: int) -> Iterator[Case]:
    """Every pair, numbered from 1, with each of its noises."""
    for number, pair in enumerate(pairs, start=1):
        first = seed if pair.seed is None else pair.seed
        for noise in range(first, first + seeds):
            yield Case(number, pair, noise)


def region_of_case(
    case: Case, original: Made, edited: Made, grid: Grid, *, judge: bool
) -> tuple[Tensor | None, str | None]:
    """The region's image tokens (None: the whole picture), and a sentence on it where nobody named it.

    With `judge` it is where the judge sees a difference.

    Raises FluxIRError where the two pictures are the same in it.
    """
    said = None
    if case.pair.region is not None:
        inside: Tensor | None = torch.from_numpy(case.pair.region.mask("img", grid.tokens, grid))
    else:
        pictures = (original.picture.numpy(), edited.picture.numpy())
        judged = judged_region(case.pair, pictures, grid) if judge else None
        inside = None if judged is None else torch.from_numpy(judged[0])
        said = (
            "note: no region is named, so it is the whole picture, and there is no rest that could be left alone"
            if judged is None
            else f"the region is where the judge finds {judged[1]}: {counted(int(judged[0].sum()), 'token')}"
        )
    alike = original.latent == edited.latent if inside is None else (original.latent == edited.latent)[inside]
    if bool(alike.all()):
        raise FluxIRError(
            f"the two prompts must give pictures that differ in the region: those of {case.name} do not",
            hint="move the region, or change the edited prompt",
        )
    return inside, said
