"""Steering: eight strengths side by side against one after the other, and memory over the number of strengths.

Both ways make the same pictures of flux-tiny, decoded. One after the other is how a script does it: each picture is
sampled by itself, with all the threads that torch takes. Peak memory is that of a process of its own.
"""

import argparse
import subprocess
import sys

import torch
from measure import Target, arguments, interleaved, keep_freed_memory, machine, parse, print_report

from flux_ir import encode_prompt, load_model
from flux_ir.commands.report import peak_host_bytes
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.schedule import schedule_of
from flux_ir.steering.apply import Steering, steered
from flux_ir.steering.dose import Painter, Variant
from flux_ir.steering.edits import Edit
from flux_ir.steering.regions import Grid

PROMPT = "a large red circle left of a small blue square on a white background"
SITE, STRENGTHS = "double.2.img", 8
FASTER, FLAT = Target("least", 1.5), Target("most", 1.05)
MANY = 64


class Doses:
    """The pictures to make, and both ways of making them."""

    def __init__(self, device: str, strengths: int) -> None:
        self.model: Suite = load_model("flux-tiny", device=device)
        side, steps = self.model.spec.default_side_px, self.model.spec.default_steps
        self.grid = Grid(side, side)
        self.times = schedule_of(self.model.spec, steps, self.grid.tokens)
        sae = make_sae(SAEConfig("topk", d_in=192, d_sae=1536, k=16, site=SITE, model="flux-tiny"))
        edit = Edit(sae=sae.requires_grad_(False).to(device), feature=12, unit="norm", gate=0.0)
        ready = Steering([edit], self.model.spec, grid=self.grid, num_steps=steps, device=device)
        text: TextEmbedding = encode_prompt(self.model, PROMPT)
        doses = [number / strengths for number in range(1, strengths + 1)]
        self.variants = [Variant("edit", strength, 0, text, ready.at(strength)) for strength in doses]

    def side_by_side(self) -> None:
        """As `steer` makes them."""
        with self.model.transformer() as flux, self.model.autoencoder() as autoencoder:
            painter = Painter(
                flux, autoencoder, self.grid, self.times, 1.0, self.model.dtype, meter=None, batch=len(self.variants)
            )
            for _ in painter.make(self.variants):
                pass

    @torch.no_grad()
    def one_by_one(self) -> None:
        """As a script makes them."""
        side = self.grid.height
        with self.model.transformer() as flux, self.model.autoencoder() as autoencoder:
            for variant in self.variants:
                noise = noise_for([variant.seed], side, side, self.model.placement.transformer, self.model.dtype)
                inputs = prepare(noise, variant.text, side, side)
                with steered(flux, [variant.steering]):
                    *_, last = sample(flux, inputs, self.times, 1.0)
                decode(autoencoder, last.after, side, side, self.model.dtype)


def peak_of(strengths: int) -> int:
    """Peak memory [bytes] of a process that makes so many pictures."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak_of", str(strengths)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def main(options: argparse.Namespace) -> None:
    """Print both tables."""
    keep_freed_memory()
    doses = Doses(options.device, STRENGTHS)
    ways = {"one by one": doses.one_by_one, "side by side": doses.side_by_side}
    seconds = interleaved(ways, options.repetitions, device=options.device)
    ratio = seconds["one by one"] / seconds["side by side"]
    rows = [[name, f"{taken:.2f}", f"{taken / STRENGTHS:.3f}"] for name, taken in seconds.items()]
    rows.append(["times as fast", f"{ratio:.2f}", FASTER.verdict(ratio)])
    print_report(
        f"Steering: {STRENGTHS} strengths of flux-tiny", ["way", "seconds", "a picture"], rows, machine(options.device)
    )
    if options.device == "cpu":
        few, many = (peak_of(count) for count in (STRENGTHS, MANY))
        rows = [[str(n), f"{peak / 1e6:.0f}"] for n, peak in ((STRENGTHS, few), (MANY, many))]
        rows.append(["ratio", f"{many / few:.3f}, {FLAT.verdict(many / few)}"])
        print_report("Steering: peak memory", ["strengths", "MB"], rows, machine())


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--peak_of", type=int, help=argparse.SUPPRESS)
    given = parse(parser)
    if given.peak_of:
        Doses("cpu", given.peak_of).side_by_side()
        print(peak_host_bytes())
    else:
        main(given)
