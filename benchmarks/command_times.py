"""How long a user waits: each verb's `--help`, and the README's first command against importing torch alone.

Run it twice to know both kinds of CPU: as it is, and with ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2, which leave
no bfloat16 instructions. Wall clock is what a user waits, and is judged; CPU seconds depend less
on other programs.
"""

import re
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from measure import Target, arguments, machine, parse, print_report, seconds_of

from flux_ir.commands.main import VERBS
from flux_ir.models.compute_dtype import choose_dtype

ROOT = Path(__file__).resolve().parents[1]
FIRST_COMMAND = re.compile(r"^.*?(capture_sample\.py .*)$", re.MULTILINE)
DECODING = re.compile(r"^(?:decode|contact sheet) +([\d.]+) s$", re.MULTILINE)
HELP_SECONDS = Target("most", 0.7)
TIMES_IMPORT_TORCH = Target("most", 3)


class Waited(NamedTuple):
    """What one process took, and what it printed."""

    seconds: float
    cpu_seconds: float
    stdout: str

    @property
    def decoding(self) -> float:
        """Seconds of decoding and of drawing the sheets, as the command's own table tells them."""
        return sum(float(found) for found in DECODING.findall(self.stdout))


def main() -> None:
    """Print both tables."""
    options = parse(arguments(__doc__ or ""))
    about = machine(options.device)
    about += f"\n- computes in: {choose_dtype('auto', [options.device])}"
    rows = [help_row(verb, options.repetitions) for verb in VERBS]
    print_report("Help pages", ["command", "median [s]", "CPU [s]", "target"], rows, about)
    columns = ["command", "median [s]", "CPU [s]", "of it decoding [s]", "rest / import torch", "target"]
    print_report("The first command", columns, first_rows(options.device, options.repetitions), about)


def help_row(verb: str, repetitions: int) -> list[str]:
    """One verb's help page."""
    waited = [run("-m", "flux_ir", verb, "--help") for _ in range(repetitions)]
    seconds = median(one.seconds for one in waited)
    return [f"{verb} --help", f"{seconds:.2f}", cpu(waited), HELP_SECONDS.verdict(seconds)]


def first_rows(device: str, repetitions: int) -> list[list[str]]:
    """Importing torch and the whole first command, in turns."""
    imports, commands = list[Waited](), list[Waited]()
    with tempfile.TemporaryDirectory() as output_dir:
        words = [*first_command_of_the_readme(), "--device", device, "--output_dir", output_dir]
        for _ in range(repetitions):
            imports.append(run("-c", "import torch"))
            commands.append(run(*words))
    torch_seconds = median(one.seconds for one in imports)
    ratio = median((one.seconds - one.decoding) / base.seconds for one, base in zip(commands, imports, strict=True))
    seconds, decoding = (median(values) for values in zip(*((c.seconds, c.decoding) for c in commands), strict=True))
    verdict = TIMES_IMPORT_TORCH.verdict(ratio)
    return [
        ["import torch", f"{torch_seconds:.2f}", cpu(imports), "", "", ""],
        ["the README's first command", f"{seconds:.2f}", cpu(commands), f"{decoding:.2f}", f"{ratio:.2f}", verdict],
    ]


def cpu(waited: list[Waited]) -> str:
    """The median of the seconds that all cores together worked."""
    return f"{median(one.cpu_seconds for one in waited):.2f}"


def first_command_of_the_readme() -> list[str]:
    """The words of the README's first line that captures, from the script's name on."""
    found = FIRST_COMMAND.search((ROOT / "README.md").read_text(encoding="utf-8"))
    if found is None:
        raise LookupError("README.md has no command with capture_sample.py")
    return shlex.split(found[1])


def run(*words: str) -> Waited:
    """Run Python with these words in the repository's root. Raises CalledProcessError if it fails."""
    before, told = resource.getrusage(resource.RUSAGE_CHILDREN), ""

    def work() -> None:
        nonlocal told
        command, quiet = [sys.executable, *words], subprocess.DEVNULL
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=quiet, text=True)
        told = done.stdout

    seconds = seconds_of(work)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Waited(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, told)


if __name__ == "__main__":
    main()
