"""What capturing costs: sampling with and without a full capture to a file, and the peak memory at 4 and 50 steps.

Beside both stands the way of the program this project descends from: hooks that copy to lists, `torch.save` at the end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from capturing import Sampling, Setting, settings
from measure import Target, arguments, interleaved, machine, parse, print_report

from flux_ir.commands.report import peak_host_bytes
from flux_ir.errors import in_units
from flux_ir.recording.writer import file_bytes

SECONDS_RATIO = {"tiny": Target("most", 1.15), "wide": Target("most", 1.10)}
MEMORY_RATIO = Target("most", 1.1)
FEW_STEPS, MANY_STEPS = 4, 50
WAYS = {"captured": "captured", "hooked": "hooks and lists"}


def main() -> None:
    """Print both tables, or, in the process that is weighed, one peak."""
    options = options_of_this_run()
    if options.peak_of:
        name, steps, way = options.peak_of
        print(*peak_bytes(settings()[name], int(steps), way, options.device, options.dir))
        return
    known = settings()
    names = ["tiny", "wide", *(["full"] if options.full else [])]
    # Weighed first, while this process is small: without /proc a child may report the peak of its parent.
    memory = [row for name in names for way in WAYS for row in memory_rows(name, way, known[name], options)]
    seconds = [seconds_row(name, known[name], options) for name in names]
    about = machine(options.device)
    columns = [
        "network",
        "steps",
        "file",
        "plain [s]",
        "captured [s]",
        "ratio",
        "target",
        "hooks and lists [s]",
        "ratio",
    ]
    print_report("Capture: seconds of sampling", columns, seconds, about)
    columns = ["network", "way", "memory", f"{FEW_STEPS} steps", f"{MANY_STEPS} steps", "ratio", "target"]
    print_report("Capture: peak memory", columns, memory, about)


def options_of_this_run() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dir", type=Path, help="where the captures are written (default: a temporary folder)")
    parser.add_argument("--full", action="store_true", help="also the full-size network, on a GPU")
    parser.add_argument("--peak_of", nargs=3, metavar=("NETWORK", "STEPS", "WAY"), help=argparse.SUPPRESS)
    return parse(parser)


def seconds_row(name: str, setting: Setting, options: argparse.Namespace) -> list[str]:
    """One network sampled in all three ways in turns."""
    sampling = Sampling(setting, options.device)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder) / "capture.pt"

        def captured() -> None:
            sampling.captured(path)
            path.unlink()  # a run has a file of its own: before one is replaced, ext4 would write it all to the disk

        def hooked() -> None:
            sampling.hooked(path)
            path.unlink()

        seconds = interleaved(
            {"plain": sampling.plain, "captured": captured, "hooked": hooked},
            options.repetitions,
            device=options.device,
        )
    ratio = seconds["captured"] / seconds["plain"]
    return [
        f"{setting.name}, {setting.side_px} px, {setting.txt_tokens} text tokens",
        str(setting.steps),
        in_units(file_bytes(sampling.plan)),
        f"{seconds['plain']:.3f}",
        f"{seconds['captured']:.3f}",
        f"{ratio:.3f}",
        SECONDS_RATIO[name].verdict(ratio) if name in SECONDS_RATIO else "none",
        f"{seconds['hooked']:.3f}",
        f"{seconds['hooked'] / seconds['plain']:.3f}",
    ]


def memory_rows(name: str, way: str, setting: Setting, options: argparse.Namespace) -> list[list[str]]:
    """The peaks of a short and a long capture: of the host, and of the GPU if there is one in use."""
    few, many = (weigh(name, steps, way, options) for steps in (FEW_STEPS, MANY_STEPS))
    rows = []
    for place, at_few, at_many in zip(("resident", options.device), few, many, strict=False):
        ratio = at_many / at_few
        figures = [in_units(at_few), in_units(at_many), f"{ratio:.3f}"]
        verdict = MEMORY_RATIO.verdict(ratio) if way == "captured" else "none"
        rows.append([setting.name, WAYS[way], place, *figures, verdict])
    return rows


def weigh(name: str, steps: int, way: str, options: argparse.Namespace) -> list[int]:
    """The peaks [bytes] of a process of its own that samples and captures."""
    command = [sys.executable, __file__, "--device", options.device, "--peak_of", name, str(steps), way]
    command += ["--dir", str(options.dir)] if options.dir else []
    command += ["--full"] if options.full else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return [int(peak) for peak in done.stdout.split()]


def peak_bytes(setting: Setting, steps: int, way: str, device: str, folder: Path | None) -> list[int]:
    """Sample and capture; the peak of this process, and on a GPU that of its memory."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        sampling, path = Sampling(setting, device, steps), Path(temporary) / "capture.pt"
        sampling.hooked(path) if way == "hooked" else sampling.captured(path)
    on_gpu = torch.device(device).type == "cuda"
    return [peak_host_bytes() or 0, *([torch.cuda.max_memory_allocated(device)] if on_gpu else [])]


if __name__ == "__main__":
    main()
