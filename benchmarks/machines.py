"""One transformer in every way a machine can hold it: resident, compiled, streamed, quantised; diffusers beside.

Seconds of a step of each way, with and without a recorder on every block, and the memory its device takes. It needs
weights in a file; those of `full_size.py --keep` have the published size: `--model flux-schnell --checkpoint
full_size/transformer.safetensors --device cuda`. Without these it runs on flux-tiny, which says little but runs
anywhere. Beside a streamed way stands the floor of its bus: the bytes that come in a step, at the speed of one large
copy from pinned memory.
"""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Target, arguments, interleaved, machine, parse, print_report, synchronize
from networks import random_inputs
from sampler_vs_diffusers import their_forward

from flux_ir import load_model
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.streamed_flux import StreamedFlux
from flux_ir.models.suite import Suite
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.generate import Inputs, sample
from flux_ir.sites import block_outputs

STEPS = [1.0, 0.75, 0.5]
CAPTURE, DIFFUSERS, BUS = Target("most", 1.05), Target("most", 1.0), Target("most", 1.15)
COPY_BYTES = 2**30


def ways_of(device: str) -> dict[str, dict[str, Any]]:
    """The ways by name: what `load_model` is asked for."""
    on_gpu = torch.device(device).type == "cuda"
    streamed: dict[str, dict[str, Any]] = {"blocks": {"offload": "blocks"}}
    if on_gpu:
        streamed = {f"blocks, {gb} GB": {"offload": "blocks", "vram_gb": gb} for gb in (12, 24)}
    return {
        "resident": {},
        "compiled": {"compile": True},
        **streamed,
        **{name: {"quantize": name} for name in ("nf4", "int8", "fp8")},
    }


def steps_of(flux: Flux, inputs: Inputs, *, captured: bool) -> Callable[[], object]:
    """Two steps of the sampler, with or without a recorder on every block."""

    def run() -> None:
        if not captured:
            for _ in sample(flux, inputs, STEPS, 3.5):
                pass
            return
        sites = block_outputs(flux.params.depth, flux.params.depth_single_blocks)
        with Recorder(flux, sites, MemorySink()):
            for _ in sample(flux, inputs, STEPS, 3.5):
                pass

    return run


def bus_seconds(flux: StreamedFlux, model: Suite) -> float:
    """Seconds that a step's streamed weights take at the speed of one large copy from pinned memory."""
    device = model.placement.transformer
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    synchronize(device)
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    synchronize(device)
    rate = COPY_BYTES / (time.perf_counter() - start)
    units = flux.stream.units
    modulations = sum("mod" in unit.name.rpartition(".")[2] for unit in units)
    nbytes = sum(unit.nbytes(model.dtype) for unit in units[modulations:])
    nbytes += sum(unit.nbytes(model.dtype) for unit in units[:modulations]) // (len(STEPS) - 1)
    return nbytes / rate


def main(options: argparse.Namespace) -> None:
    """Print a table for each size of picture."""
    device, on_gpu = options.device, torch.device(options.device).type == "cuda"
    for side in options.sides:
        rows, resident = [], 0.0
        for name, choices in ways_of(device).items():
            model = load_model(
                options.model, parts=["transformer"], device=device, checkpoint=options.checkpoint, **choices
            )
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            with model.transformer() as flux:
                inputs = random_inputs(flux.params, side, model.spec.text_tokens, device, model.dtype)
                works = {"bare": steps_of(flux, inputs, captured=False), "with": steps_of(flux, inputs, captured=True)}
                if name == "resident" and options.diffusers:
                    works["theirs"] = their_forward(flux, inputs)
                seconds = interleaved(works, options.repetitions, device=device)
                bare, captured = (seconds[way] / (len(STEPS) - 1) for way in ("bare", "with"))
                resident = resident or bare
                verdicts = [CAPTURE.verdict(captured / bare)]
                if "theirs" in seconds:
                    verdicts.append(
                        f"{bare / seconds['theirs']:.2f} of diffusers, {DIFFUSERS.verdict(bare / seconds['theirs'])}"
                    )
                if on_gpu and isinstance(flux, StreamedFlux) and "quantize" not in choices:
                    floor = max(bus_seconds(flux, model), resident)
                    verdicts.append(f"{bare / floor:.2f} of the bus' floor, {BUS.verdict(bare / floor)}")
            taken = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if on_gpu else ""
            rows.append(
                [name, f"{bare:.3f}", f"{captured / bare:.3f}", f"{bare / resident:.2f}", taken, "; ".join(verdicts)]
            )
            del model, flux, inputs, works
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        columns = ["way", "s a step", "with capture", "of resident", "GPU memory", "targets"]
        print_report(f"Machines: {options.model}, {side} px", columns, rows, machine(device))


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--model", default="flux-tiny")
    parser.add_argument("--checkpoint", help="a file of its transformer; default: where the model's are found")
    parser.add_argument("--sides", type=int, nargs="+", default=[256], help="sizes of pictures [px]")
    parser.add_argument("--diffusers", action="store_true", help="their forward beside the resident one")
    main(parse(parser))
