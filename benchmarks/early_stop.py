"""What stopping early saves: seconds per step of a whole forward, and of one that ends at the last recorded site.

The sites go from the first block, where nearly everything is saved, to the last, where nothing is.
"""

import argparse
from dataclasses import replace

import torch
from measure import Target, arguments, interleaved, machine, parse, print_report
from networks import FULL, SIDE_PX, TXT_TOKENS, random_flux, random_inputs

from flux_ir.models.flux1.transformer import Flux
from flux_ir.recording.recorder import Recorder, RecordingComplete, StepContext
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import Inputs
from flux_ir.sites import Site

# The depth of the published network, 19 + 38 blocks, narrow enough for a CPU.
DEEP = replace(FULL, hidden_size=256, num_heads=4, axes_dim=(8, 28, 28))
SPEEDUP = {"double.0.img": Target("least", 20.0)}
SITES = ("double.0.img", "double.18.img", "single.18", "single.37")


class Nowhere:
    """A sink that keeps nothing."""

    def begin_step(self, step: int, context: StepContext) -> None:
        """Nothing."""

    def write(self, step: int, site: Site, value: torch.Tensor) -> None:
        """Nothing."""


def main() -> None:
    """Print one row per site."""
    options = options_of_this_run()
    params = FULL if options.full else replace(DEEP, hidden_size=options.width, num_heads=options.width // 64)
    model = random_flux(params, options.device, torch.bfloat16)
    inputs = random_inputs(params, options.side_px, options.txt_tokens, options.device, torch.bfloat16)
    rows = [row(model, inputs, site, options) for site in SITES]
    columns = ["last site", "whole [s/step]", "stopped [s/step]", "speed-up", "target"]
    tokens = f"{inputs.img.shape[1]} image and {options.txt_tokens} text tokens"
    blocks = f"{params.depth} + {params.depth_single_blocks} blocks of width {params.hidden_size}"
    print_report(f"Stopping early: {blocks}, {tokens}", columns, rows, machine(options.device))


def options_of_this_run() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--full", action="store_true", help="the full-size network, on a GPU")
    parser.add_argument("--width", type=int, default=256, help="width of the network, a multiple of 64 (default 256)")
    parser.add_argument("--side_px", type=int, default=SIDE_PX, help=f"of the square picture (default {SIDE_PX})")
    parser.add_argument("--txt_tokens", type=int, default=TXT_TOKENS, help=f"of the text (default {TXT_TOKENS})")
    return parse(parser)


def row(model: Flux, inputs: Inputs, site: str, options: argparse.Namespace) -> list[str]:
    """One step, recorded at one site, both ways in turns."""
    seconds = interleaved(
        {
            "whole": lambda: step(model, inputs, site, stop_early=False),
            "stopped": lambda: step(model, inputs, site, stop_early=True),
        },
        options.repetitions,
        device=options.device,
    )
    speedup = seconds["whole"] / seconds["stopped"]
    verdict = SPEEDUP[site].verdict(speedup) if site in SPEEDUP else "none"
    return [site, f"{seconds['whole']:.4f}", f"{seconds['stopped']:.4f}", f"{speedup:.1f}", verdict]


@torch.inference_mode()
def step(model: Flux, inputs: Inputs, site: str, *, stop_early: bool) -> None:
    """One forward, recorded at one site."""
    img, img_ids, txt, txt_ids, y = inputs
    with Recorder(model, [Site.parse(site)], Nowhere(), steps=[0], stop_early=stop_early):
        try:
            model(img, img_ids, txt, txt_ids, per_sample(0.75, img), y)
        except RecordingComplete:
            return


if __name__ == "__main__":
    main()
