"""How long a user waits: `capture_sample.py --help`, and the whole first command of the README, as they are typed."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from measure import Target, arguments, machine, parse, print_report, seconds_of

ROOT = Path(__file__).resolve().parents[1]
FIRST_COMMAND = re.compile(r"^.*capture_sample\.py .*$", re.MULTILINE)
HELP_SECONDS = Target("most", 0.7)
FIRST_COMMAND_SECONDS = Target("most", 60)


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__ or "")
    options = parse(parser)
    with tempfile.TemporaryDirectory() as output_dir:
        help_command = f'"{sys.executable}" capture_sample.py --help'
        first_command = f'{first_command_of_the_readme()} --device {options.device} --output_dir "{output_dir}"'
        rows = [
            row("capture_sample.py --help", help_command, options.repetitions, HELP_SECONDS),
            row("the README's first command", first_command, 1, FIRST_COMMAND_SECONDS),
        ]
    columns = ["command", "runs", "median [s]", "target"]
    print_report("Whole commands", columns, rows, machine(options.device))


def first_command_of_the_readme() -> str:
    """The first line of the README that captures, as it stands there."""
    found = FIRST_COMMAND.search((ROOT / "README.md").read_text(encoding="utf-8"))
    if found is None:
        raise LookupError("README.md has no command with capture_sample.py")
    return found.group()


def row(name: str, command: str, runs: int, target: Target) -> list[str]:
    """One command, run several times in a shell."""
    seconds = median(seconds_of(lambda: run(command)) for _ in range(runs))
    return [name, str(runs), f"{seconds:.2f}", target.verdict(seconds)]


def run(command: str) -> None:
    """Run a command line in the repository's root. Raises CalledProcessError if it fails."""
    subprocess.run(command, shell=True, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
