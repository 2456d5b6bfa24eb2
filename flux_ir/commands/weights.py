"""`flux-ir weights`: what a file of weights is, and how much a LoRA changes each block."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flux_ir.commands.cli.option import REQUIRED, Options, option
from flux_ir.commands.cli.parse import launch
from flux_ir.errors import in_units

if TYPE_CHECKING:
    from flux_ir.api.weights import DescribedWeights
    from flux_ir.models.checkpoints.describe import Network

BAR = 40  # characters of the longest bar


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(Options):
    """Say what a file or a folder of weights is: which network of which model, how large, how it is stored.

    For a LoRA, a table of how much it changes each block, ||dW|| / ||W|| over all its linear layers, at strength 1,
    where the weights of its model are on this machine. Nothing is fetched, and only headers are read otherwise.
    """

    file: Path = option(REQUIRED, help="a file of weights, or a folder of some", positional=True)
    model: str | None = option(
        None,
        help="compare a LoRA with the weights of this model",
        default_text="the first that it fits and whose weights are here",
    )
    checkpoint: Path | None = option(
        None, help="where these weights are", default_text="the environment, the package, the hub's cache"
    )
    output: Path | None = option(None, help="a JSON file to write all of it to", default_text="nothing is written")


def run(options: WeightsOptions) -> None:
    """Say what the file is. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.weights import describe_weights
    from flux_ir.commands.report import Report

    with Report() as report:
        described = describe_weights(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    for line in summary(described):
        report.results.print(line, markup=False)


def summary(described: "DescribedWeights") -> list[str]:
    """What is printed: every file with its networks, and the changes of a LoRA as a table with bars."""
    lines: list[str] = []
    for file in described.files:
        lines.append(str(file.path))
        for network in file.networks:
            width = max(len(name) for name, _ in _facts(network))
            lines += [f"  {name:<{width}}  {value}" for name, value in _facts(network)]
    if described.changes is not None:
        lines.append(f"relative change of each block of {described.model}, ||dW|| / ||W||, at strength 1")
        most, width = max(described.changes.values()), max(map(len, described.changes))
        for block, value in described.changes.items():
            bar = "#" * round(BAR * value / most) if most else ""
            lines.append(f"  {block:<{width}}  {value:8.3%}  {bar}".rstrip())
    return lines


def _facts(network: "Network") -> list[tuple[str, str]]:
    """Rows of the description: what is empty is left out."""
    stored = ", ".join(f"{dtype} ({count})" for dtype, count in network.dtypes.items())
    rows = {
        "what": network.kind,
        "layout": network.layout,
        "prefix": network.prefix,
        **network.facts,
        "tensors": f"{network.tensors:,}",
        "parameters": f"{network.parameters:,}",
        "size": in_units(network.nbytes),
        "stored as": stored,
        "quantised": network.quantised,
    }
    return [(name, str(value)) for name, value in rows.items() if value != ""]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(WeightsOptions, run, argv, prog=prog)
