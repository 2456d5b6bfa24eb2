"""What `--compile` gains: seconds of one step, as it is and with every block compiled, and what compiling takes.

A second table says what of a step are the rotary table and the modulations, which are the same work at every step.
"""

import argparse
from dataclasses import replace

import torch
from measure import arguments, interleaved, machine, parse, print_report, seconds_of
from networks import FULL, random_flux, random_inputs

from flux_ir.models.compiled import compile_blocks
from flux_ir.models.flux1.attention import rotary_table
from flux_ir.models.flux1.blocks import Modulation
from flux_ir.models.flux1.transformer import Flux, FluxParams
from flux_ir.models.registry import get_spec
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import Inputs

TINY = get_spec("flux-tiny").flux
WIDE = replace(FULL, depth=2, depth_single_blocks=2)
NETWORKS = {
    "flux-tiny, 128 px": (TINY, 128, 20),
    "2 + 2 blocks of width 3072, 256 px": (WIDE, 256, 256),
}
STEPS = 4


def main() -> None:
    """Print one row per network and dtype."""
    options = options_of_this_run()
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    runs = [(name, *parts, dtype) for name, parts in NETWORKS.items() for dtype in dtypes]
    columns = ["network", "dtype", "plain [s/step]", "compiled [s/step]", "ratio", "compiling [s]"]
    rows = [row(*run, options) for run in runs]
    print_report("compiled", columns, rows, machine(options.device))
    columns = [
        "network",
        "dtype",
        "rotary table",
        "modulations",
        f"those of {STEPS} steps ahead",
        "in one product",
        "bits",
    ]
    print_report("the same at every step", columns, [shares(*run, options) for run in runs], "Shares of a step.")


def options_of_this_run() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="dtypes to measure in (default both)")
    return parse(parser)


def row(
    name: str, params: FluxParams, side_px: int, txt: int, dtype: torch.dtype, options: argparse.Namespace
) -> list[str]:
    """One step, both ways in turns. Both networks have the same weights, in one memory."""
    plain = random_flux(params, options.device, dtype)
    compiled = plain.twin()
    compile_blocks(compiled)
    inputs = random_inputs(params, side_px, txt, options.device, dtype)
    compiling = seconds_of(lambda: step(compiled, inputs), options.device)
    ways = {"plain": lambda: step(plain, inputs), "compiled": lambda: step(compiled, inputs)}
    seconds = interleaved(ways, options.repetitions, device=options.device)
    times = [f"{seconds[way]:.4f}" for way in ways]
    return [
        name,
        str(dtype).removeprefix("torch."),
        *times,
        f"{seconds['compiled'] / seconds['plain']:.3f}",
        f"{compiling:.0f}",
    ]


@torch.no_grad()
def step(model: Flux, inputs: Inputs) -> torch.Tensor:
    """One forward."""
    time, guidance = per_sample(0.5, inputs.img), per_sample(2.5, inputs.img)
    return model(inputs.img, inputs.img_ids, inputs.txt, inputs.txt_ids, time, inputs.y, guidance)


@torch.no_grad()
def shares(
    name: str, params: FluxParams, side_px: int, txt: int, dtype: torch.dtype, options: argparse.Namespace
) -> list[str]:
    """The rotary table and the modulations of one step, as shares of it; and the modulations of all steps at once."""
    model = random_flux(params, options.device, dtype)
    inputs = random_inputs(params, side_px, txt, options.device, dtype)
    ids = torch.cat([inputs.txt_ids, inputs.img_ids], dim=1)
    layers = [module for module in model.modules() if isinstance(module, Modulation)]
    vecs = torch.randn(STEPS, params.hidden_size, dtype=dtype, device=options.device)

    def one_by_one() -> list[object]:
        return [layer(vec) for layer in layers for vec in vecs.split(1)]

    def step_by_step() -> list[object]:
        return [layer(vec) for vec in vecs.split(1) for layer in layers]

    def together() -> list[object]:
        return [layer(vecs) for layer in layers]

    equal = all(
        torch.equal(alone, part[:1])
        for layer in layers
        for alone, part in zip(layer(vecs[:1])[0], layer(vecs)[0], strict=True)
    )
    ways = {
        "step": lambda: step(model, inputs),
        "table": lambda: rotary_table(ids, params.axes_dim, params.theta),
        "by step": step_by_step,
        "ahead": one_by_one,
        "together": together,
    }
    seconds = interleaved(ways, options.repetitions, device=options.device)
    figures = [seconds["table"], *(seconds[way] / STEPS for way in ("by step", "ahead", "together"))]
    cells = [f"{figure / seconds['step']:.2%}" for figure in figures]
    return [name, str(dtype).removeprefix("torch."), *cells, "equal" if equal else "others"]


if __name__ == "__main__":
    main()
