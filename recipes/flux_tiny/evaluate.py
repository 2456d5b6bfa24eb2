"""How well flux-tiny draws what a caption says: `python -m recipes.flux_tiny.evaluate`.

Samples held-out captions at the default number of steps, lets `judge` look at the pixels and prints a table. `--write`
puts the table into the model's provenance.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flux_ir.demo.judge import TallyRow, judge, tally
from flux_ir.demo.scenes import held_out_scenes
from flux_ir.errors import FluxIRError
from flux_ir.files import write_json
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.placement import plan
from flux_ir.models.registry import ASSETS, PROVENANCE_FILE, ModelSpec, packaged_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.latents import image_ids
from flux_ir.sampling.schedule import schedule_of

NOISE_SEED = 1_000_000  # far from the seeds people try first
CAPTION_SEED = 5
BATCH = 20


class Bar(NamedTuple):
    """What the shipped model must reach: the least share of one aspect, over captions with this many objects."""

    captions: int
    aspect: str
    least: float


BARS = (
    Bar(1, "background", 0.95),
    Bar(1, "colour", 0.95),
    Bar(1, "place", 0.95),
    Bar(1, "shape", 0.85),
    Bar(2, "relation and both colours", 0.85),
    Bar(2, "shape of each", 0.85),
)


def draw_captions(suite: Suite, captions: list[str], num_steps: int) -> Iterator[np.ndarray]:
    """One picture, uint8 [side, side, 3], per caption, each from a noise of its own."""
    spec, side = suite.spec, suite.spec.default_side_px
    timesteps = schedule_of(spec, num_steps, image_ids(1, side, side).shape[1])
    with suite.text_encoders() as text, suite.transformer() as flux, suite.autoencoder() as autoencoder:
        for start in range(0, len(captions), BATCH):
            prompts = captions[start : start + BATCH]
            seeds = [NOISE_SEED + start + i for i in range(len(prompts))]
            noise = noise_for(seeds, side, side, suite.placement.transformer, suite.dtype)
            inputs = prepare(noise, encode(text.t5, text.clip, prompts), side, side)
            *_, last = sample(flux, inputs, timesteps, spec.default_guidance)
            yield from decode(autoencoder, last.after, side, side, suite.dtype).numpy()


def evaluate(spec: ModelSpec, count: int, num_steps: int, device: str | None) -> list[TallyRow]:
    """The table over `count` held-out captions that all differ."""
    placement = plan(torch.cuda.device_count(), device=device)
    suite = Suite(spec, locate_model(spec), placement, choose_dtype("auto", placement.devices).dtype)
    scenes = held_out_scenes(count, CAPTION_SEED)
    pictures = draw_captions(suite, [scene.caption for scene in scenes], num_steps)
    followed = track(pictures, "drawing and judging", total=count, console=Console(stderr=True))
    return tally((judge(picture, scene), scene) for picture, scene in zip(followed, scenes, strict=True))


def bar_for(row: TallyRow) -> float | None:
    """The bar this row has to reach, if there is one."""
    return next((bar.least for bar in BARS if (bar.captions, bar.aspect) == (row.captions, row.aspect)), None)


def print_table(rows: list[TallyRow], title: str) -> None:
    """The rows on stdout, with the bar beside those that have one."""
    table = Table("objects", "aspect", "right", "bar", "cases", title=title, title_justify="left")
    for row in rows:
        least = bar_for(row)
        verdict = "" if least is None else f"{least:.0%} {'reached' if row.share >= least else 'MISSED'}"
        table.add_row(str(row.captions), row.aspect, f"{row.share:.1%}", verdict, str(row.n))
    Console().print(table)


def write_quality(folder: Path, rows: list[TallyRow], num_steps: int) -> None:
    """Put the table into the provenance of the model in `folder`."""
    path = folder / PROVENANCE_FILE
    provenance = json.loads(path.read_text(encoding="utf-8"))
    provenance["quality"] = {
        "command": "python -m recipes.flux_tiny.evaluate --write",
        "held_out_captions": sum(row.n for row in rows if row.aspect == "background"),
        "num_steps": num_steps,
        "rows": [{**row._asdict(), "share": round(row.share, 4)} for row in rows],
    }
    write_json(path, provenance)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m recipes.flux_tiny.evaluate", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ASSETS / "flux-tiny", help="the exported model")
    parser.add_argument("--captions", type=int, default=500, help="how many held-out captions")
    parser.add_argument("--num_steps", type=int, default=None, help="Euler steps (default: the model's own)")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N")
    parser.add_argument("--write", action="store_true", help="put the table into the model's provenance")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print; 1 if a bar is missed."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        spec = packaged_spec(args.folder.name, args.folder)
        num_steps = args.num_steps or spec.default_steps
        rows = evaluate(spec, args.captions, num_steps, args.device)
    except FluxIRError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False)
        return 2
    print_table(rows, f"{spec.name}, {args.captions} held-out captions, {num_steps} steps")
    if args.write:
        write_quality(args.folder, rows, num_steps)
    return 0 if all(row.share >= (bar_for(row) or 0) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
