"""What a lens is worth elsewhere: other prompts, sizes and weights than those it was fitted to, without a new fit.

uv run flux-ir train-lens --captures captures/tiny
uv run python recipes/runs/lens_transfer.py --lens lenses/tiny --captures captures/tiny --on captures/wide captures/nf4

`--captures` is the collection that the lens was fitted to: of it only the held-out prompts are judged on, and its
prompts are left out of the others. A step of another collection is read by the maps of the step of the same number.
Prints a table in Markdown: the error of the velocity, relative to its variance there, as the median over all blocks but
the last, averaged over steps.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flux_ir.api.progress import unwatched
from flux_ir.api.train_lens import begin, layers_around_the_blocks
from flux_ir.files import read_json
from flux_ir.lens.fitted import FittedLens
from flux_ir.lens.jacobian import JacobianLens, load_jacobian_lens
from flux_ir.lens.judge import Read, plain, relative_errors
from flux_ir.lens.tuned import TunedLens, load_tuned_lens
from flux_ir.models.architecture import Transformer
from flux_ir.sites import Site


def lenses_in(folder: Path) -> Mapping[str, FittedLens]:
    """The lenses that a folder holds, by the name of their column."""
    found: dict[str, FittedLens] = {}
    if (folder / TunedLens.file_name).exists():
        found["tuned"] = load_tuned_lens(folder)
    if (folder / JacobianLens.file_name).exists():
        found |= {"Jacobian": load_jacobian_lens(folder), "summed": load_jacobian_lens(folder, "summed")}
    return found


def reading(lens: FittedLens, model: Transformer, site: Site, step: int) -> Read:
    """One block at one step through a lens."""
    return lambda rows: lens.velocity(model, site, step, rows.block, rows.vec)


def judge_on(
    captures: Path, lenses: Mapping[str, FittedLens], held_out: float, without: Sequence[str]
) -> tuple[int, Mapping[str, np.ndarray]]:
    """The generations that were judged on, and {reading: errors [blocks, steps]}, the last block left out.

    Without prompts to leave out, the collection is the lens's own: its held-out part is taken.
    """
    begun = begin(captures, held_out, None, None, unwatched)
    data = begun.data
    if without:
        known = set(without)
        prompts = [one.prompt for one in data.source.generations]
        data = replace(data, parts=["fit" if prompt in known else "held_out" for prompt in prompts])
    model = layers_around_the_blocks(begun, unwatched)
    errors = [
        [
            relative_errors(
                data,
                model,
                site,
                step,
                [plain(model), *(reading(lens, model, site, step) for lens in lenses.values())],
            )
            for step in begun.steps
        ]
        for site in begun.sites
        if site != data.last
    ]
    by_reading = np.moveaxis(np.array(errors), 2, 0)
    return data.parts.count("held_out"), dict(zip(["plain", *lenses], by_reading, strict=True))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lens", type=Path, required=True, help="a folder of flux-ir train-lens")
    parser.add_argument("--captures", type=Path, required=True, help="the collection it was fitted to")
    parser.add_argument("--on", type=Path, nargs="*", default=[], help="other collections of the same blocks and steps")
    words = parser.parse_args()
    lenses = lenses_in(words.lens)
    held_out = read_json(words.lens / "evaluation.json")["settings"]["held_out"]
    own = begin(words.captures, held_out, None, None, unwatched)
    fitted_to = [one.prompt for one in own.data.source.generations]
    summary: Callable[[np.ndarray], float] = lambda errors: float(np.median(errors, axis=0).mean())  # noqa: E731
    print("| judged on | generations | " + " | ".join(["plain", *lenses]) + " |")
    print("| --- |" + " ---: |" * (2 + len(lenses)))
    for captures in [words.captures, *words.on]:
        count, errors = judge_on(captures, lenses, held_out, [] if captures == words.captures else fitted_to)
        print(
            f"| {captures.name} | {count} | " + " | ".join(f"{summary(value):.3f}" for value in errors.values()) + " |"
        )


if __name__ == "__main__":
    main()
