"""Captions for flux-tiny, one per line, all different: prompts to collect activations with.

uv run python -m flux_ir.demo.captions --count 1000 > prompts.txt
"""

import argparse
from itertools import count, islice

from flux_ir.demo.scenes import scene_at


def captions(number: int, seed: int) -> list[str]:
    """So many different captions of scenes drawn with this seed."""
    found = dict.fromkeys(scene_at(seed, index).caption for index in range(number))
    for index in count(number):
        if len(found) >= number:
            break
        found[scene_at(seed, index).caption] = None
    return list(islice(found, number))


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description="Captions that flux-tiny knows every word of, one per line.")
    parser.add_argument("--count", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=77, help="another seed gives others (default 77)")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count must be at least 1: got {options.count}")
    print("\n".join(captions(options.count, options.seed)))


if __name__ == "__main__":
    main()
