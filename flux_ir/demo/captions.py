"""Captions for flux-tiny, all different: prompts to collect activations with, and a program that prints them.

uv run python -m flux_ir.demo.captions --count 1000 > prompts.txt

A study needs several sets that share no caption: one to train on, others to choose and to report on. A hash of the
caption says which of `PARTS` it belongs to, whatever the seed.
"""

import argparse
import hashlib
from collections.abc import Iterator
from itertools import count
from typing import Literal, get_args

from flux_ir.demo.scenes import scene_at

CaptionPart = Literal["T", "A", "B", "C"]
PARTS: tuple[CaptionPart, ...] = get_args(CaptionPart)
"""T trains autoencoders, A picks features, B ranks recipes, C is for the report alone."""

_OF_TEN = "TTTTAABBCC"
# There are 1,920 captions of one object, so a fifth of them has about 384: more than this may not exist.
MOST_ALONE = {"T": 700, "A": 340, "B": 340, "C": 340}


def captions(number: int, seed: int, part: CaptionPart | None = None, alone: int | None = None) -> list[str]:
    """`number` different captions of scenes drawn with this seed; of one part only, if one is named.

    `alone` is how many of them have one object; None leaves it to chance.

    Raises ValueError for more captions of one object than there are.
    """
    if alone is not None and not 0 <= alone <= min(number, MOST_ALONE[part or "T"]):
        raise ValueError(f"alone must be in 0..{min(number, MOST_ALONE[part or 'T'])}: got {alone}")
    missing: dict[bool | None, int] = {None: number} if alone is None else {True: alone, False: number - alone}
    found: dict[str, None] = {}
    for caption, is_alone in _endless(seed, part):
        kind = None if alone is None else is_alone
        if missing[kind] and caption not in found:
            found[caption] = None
            missing[kind] -= 1
            if not any(missing.values()):
                break
    return list(found)


def part_of(caption: str) -> CaptionPart:
    """The part a caption belongs to, by its hash: the same for every seed."""
    letter = _OF_TEN[int.from_bytes(hashlib.sha256(f"part {caption}".encode()).digest()[:4], "big") % 10]
    return next(part for part in PARTS if part == letter)


def _endless(seed: int, part: CaptionPart | None) -> Iterator[tuple[str, bool]]:
    """Endless captions of a part, with repetitions, each with whether it has one object."""
    for index in count():
        scene = scene_at(seed, index)
        if part is None or part_of(scene.caption) == part:
            yield scene.caption, scene.relation is None


def main() -> None:
    """Print captions, one per line."""
    parser = argparse.ArgumentParser(description="Captions that flux-tiny knows every word of, one per line.")
    parser.add_argument("--count", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=77, help="another seed gives others (default 77)")
    parser.add_argument("--part", choices=PARTS, help="of one of four parts that share no caption (default: of all)")
    parser.add_argument("--alone", type=int, help="how many of them have one object (default: about a third)")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count must be at least 1: got {options.count}")
    try:
        print("\n".join(captions(options.count, options.seed, options.part, options.alone)))
    except ValueError as error:
        parser.error(f"--{error}")


if __name__ == "__main__":
    main()
