"""Collecting: tokens per second and bytes against a plain loop, peak memory over many prompts, processes and threads.

The plain loop samples prompt by prompt, records every block at every step, decodes the picture, and saves it all with
`torch.save`. Both ways count the tokens of the same site at the same steps.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Target, arguments, interleaved, machine, parse, print_report

from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.prompts import WorkList
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.storage import LocalStorage
from flux_ir.commands.report import bytes_at, peak_host_bytes
from flux_ir.distributed import Ranks
from flux_ir.errors import in_units
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import encode
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sites import Site, block_outputs

SPEC = get_spec("flux-tiny")
SITE = Site.parse("single.2.img")  # 4 double and 2 single blocks of 4 + 8 before it
STEPS = (0, 2)
SPEED, MEMORY = Target("least", 5.0), Target("most", 1.1)
FEW, MANY = 10, 1000
WORDS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "small", "large")
SHAPES = ("circle", "square", "triangle")


def main() -> None:
    """Print the three tables, or, in the process that is weighed, its peak."""
    options = options_of_this_run()
    if options.peak_of:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            collected(Path(folder), prompts(options.peak_of), options.device)
        print(peak_host_bytes())
        return
    about = machine(options.device)
    # Weighed first, while this process is small: without /proc a child may report the peak of its parent.
    memory = memory_row(options)
    columns = ["way", "seconds", "tokens/s", "ratio", "target", "bytes on disk", "bytes per token"]
    print_report(f"Collect: {SITE} at steps 0 and 2, {options.prompts} prompts", columns, speed_rows(options), about)
    columns = ["memory", f"{FEW} prompts", f"{options.many} prompts", "ratio", "target"]
    print_report("Collect: peak memory", columns, [memory], about)
    columns = ["processes", "threads each", "tokens/s", "ratio"]
    print_report("Collect: processes", columns, process_rows(options), about)


def options_of_this_run() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the timed runs (default 64)")
    parser.add_argument("--many", type=int, default=MANY, help=f"prompts of the longer weighed run (default {MANY})")
    parser.add_argument("--shared", type=int, default=512, help="prompts that processes share (default 512)")
    parser.add_argument("--dir", type=Path, help="where everything is written (default: a temporary folder)")
    parser.add_argument("--peak_of", type=int, help=argparse.SUPPRESS)
    return parse(parser)


def prompts(count: int) -> list[str]:
    """So many different prompts."""
    every = (
        f"a {one} {two} {shape} number {n}" for n in range(count) for one in WORDS for two in WORDS for shape in SHAPES
    )
    return [prompt for prompt, _ in zip(every, range(count), strict=False)]


def new_suite(device: str, *, autoencoder: bool) -> Suite:
    """flux-tiny, not loaded yet."""
    return Suite(
        SPEC,
        locate_model(SPEC, autoencoder=autoencoder),
        plan(torch.cuda.device_count(), device=device),
        torch.bfloat16,
    )


def recipe() -> Recipe:
    """What is collected."""
    side = SPEC.default_side_px
    return Recipe(SPEC, side, side, SPEC.default_steps, 2.5, (SITE,), STEPS, torch.bfloat16, torch.bfloat16)


def collected(folder: Path, texts: list[str], device: str) -> None:
    """Everything of one collection, the loading of the model too: `record` loads it."""
    settings = CollectSettings(recipe(), texts)
    job = Collector(settings, new_suite(device, autoencoder=False), LocalStorage(folder), Ranks())
    for part in (job.verify, job.encode, job.record, job.merge):
        for _ in part():
            pass


@torch.no_grad()
def plain(folder: Path, texts: list[str], device: str) -> None:
    """The plain loop, the loading of the model too."""
    suite, side = new_suite(device, autoencoder=True), SPEC.default_side_px
    everything = block_outputs(SPEC.flux.depth, SPEC.flux.depth_single_blocks)
    with suite.text_encoders() as text, suite.transformer() as model, suite.autoencoder() as autoencoder:
        for item in WorkList(texts, repeats=1, seed=0).items(0, len(texts)):
            noise = noise_for([item.seed], side, side, device, torch.bfloat16)
            inputs = prepare(noise, encode(text.t5, text.clip, [item.prompt]), side, side)
            sink, latent = MemorySink(), inputs.img
            with Recorder(model, everything, sink):
                for step in sample(model, inputs, recipe().timesteps, 2.5):
                    latent = step.after
            kept: dict[str, Any] = {f"{site} {step}": value.cpu() for (step, site), value in sink.values.items()}
            torch.save(kept, folder / f"{item.id}.pt")
            pixels = decode(autoencoder, latent, side, side)
            (folder / f"{item.id}.jpg").write_bytes(jpeg_bytes(pixels, model=SPEC.name, prompt=item.prompt))


def speed_rows(options: argparse.Namespace) -> list[list[str]]:
    """Both ways in turns, each into folders of its own."""
    texts, bytes_on_disk = prompts(options.prompts), {}
    ways = {"plain loop": plain, "flux-ir collect": collected}
    with tempfile.TemporaryDirectory(dir=options.dir) as root:

        def run(name: str) -> None:
            folder = Path(tempfile.mkdtemp(dir=root))
            ways[name](folder, texts, options.device)
            bytes_on_disk[name] = bytes_at(folder)

        timed = {name: lambda name=name: run(name) for name in ways}
        seconds = interleaved(timed, options.repetitions, device=options.device)
    tokens = options.prompts * recipe().img_tokens * len(STEPS)
    rows = []
    for name, value in seconds.items():
        ratio, size = seconds["plain loop"] / value, bytes_on_disk[name]
        verdict = SPEED.verdict(ratio) if name != "plain loop" else ""
        figures = [f"{value:.2f}", f"{tokens / value:.0f}", f"{ratio:.2f}", verdict]
        rows.append([name, *figures, in_units(size), f"{size / tokens:.0f}"])
    return rows


def memory_row(options: argparse.Namespace) -> list[str]:
    """The peaks of a short and a long collection, each in a process of its own."""
    few, many = (weigh(count, options) for count in (FEW, options.many))
    return ["resident", in_units(few), in_units(many), f"{many / few:.3f}", MEMORY.verdict(many / few)]


def weigh(count: int, options: argparse.Namespace) -> int:
    """The peak [bytes] of a process that collects so many prompts."""
    command = [sys.executable, __file__, "--device", options.device, "--peak_of", str(count)]
    command += ["--dir", str(options.dir)] if options.dir else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return int(done.stdout)


def process_rows(options: argparse.Namespace) -> list[list[str]]:
    """The whole command, as torchrun starts it, once each; its own figure leaves out starting and loading."""
    ways = [(1, 1), (1, 2), (2, 1)]
    if options.device != "cpu":
        ways = [way for way in ways if way[0] <= torch.cuda.device_count()]  # a process has a GPU of its own
    with tempfile.TemporaryDirectory(dir=options.dir) as root:
        (Path(root) / "prompts.txt").write_text("\n".join(prompts(options.shared)))
        speeds = {way: tokens_per_second(Path(root), *way, options.device) for way in ways}
    return [[str(n), str(threads), f"{s:.0f}", f"{s / speeds[1, 1]:.2f}"] for (n, threads), s in speeds.items()]


def tokens_per_second(root: Path, processes: int, threads: int, device: str) -> float:
    """What the command says of its speed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "flux_ir", "collect", "--prompts", str(root / "prompts.txt"), "--model", SPEC.name]
    command += ["--sites", str(SITE), "--steps", ",".join(map(str, STEPS)), "--device", device.partition(":")[0]]
    command += ["--output_dir", str(root / f"{processes}_{threads}")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    speed = re.search(r"^speed +(\d+) tokens/s", done.stdout, flags=re.MULTILINE)
    assert speed, done.stdout
    return float(speed[1])


if __name__ == "__main__":
    main()
