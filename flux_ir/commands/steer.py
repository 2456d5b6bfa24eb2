"""`flux-ir steer`: one prompt with a feature turned to several strengths, the price of each, and controls beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    COMPARED,
    MACHINE,
    PICTURE,
    WHERE,
    BatchOptions,
    EditedRunsOptions,
    EmbeddedPromptOptions,
    GivenPictureOptions,
    ModelOptions,
    RegionOptions,
)
from flux_ir.errors import FluxIRError

if TYPE_CHECKING:
    from flux_ir.steering.table import DoseRow, Estimate

WHAT = "What is changed"


@dataclass(frozen=True, kw_only=True)
class SteerOptions(
    EmbeddedPromptOptions,
    RegionOptions,
    EditedRunsOptions,
    GivenPictureOptions,
    ModelOptions,
    BatchOptions,
):
    """Sample one prompt with an edit at several strengths, beside the unsteered pictures of the same noises.

    Says for every strength how active the feature is afterwards and what the rest of the picture pays, and makes the
    same with random directions and the best aligned neuron. Stopped at any moment, the same command goes on. Where
    LPIPS is installed (pip install lpips) it joins the price.
    """

    init_strength: float | None = option(
        None,
        help="with --init_image: the share of the steps that is run, above 0 to 1",
        group=PICTURE,
        default_text="0.6",
    )
    sae: Path | None = option(None, help="the folder of an autoencoder", group=WHAT, default_text="none")
    feature: tuple[int, ...] = option((), help="one of its features, or several", group=WHAT, default_text="none")
    steering_prompt: str | None = option(
        None,
        help="a prompt whose code under --sae is added, in place of a feature",
        group=WHAT,
        free_text=True,
        default_text="none",
    )
    vector: Path | None = option(
        None,
        help="a plain direction in place of a feature: FILE.safetensors, with :NAME if it holds several",
        group=WHAT,
        default_text="none",
    )
    kind: Literal["add", "scale", "clamp", "set", "ablate", "replace"] = option(
        "add",
        help="add strength units; scale by the strength; clamp: no less than it; set to it; ablate: to 0; replace: set "
        "to it, with all other features at 0",
        group=WHAT,
    )
    strength: tuple[float, ...] = option((0.0, 1.0, 2.0, 4.0), help="how much, side by side", group=WHAT)
    unit: Literal["max", "mean", "norm", "raw"] | None = option(
        None,
        help="what strengths are measured in: the feature's own maximum, its mean when active, the mean length of the "
        "site's tokens, or 1",
        group=WHAT,
        default_text="max for features, norm for vectors",
    )
    edit: Path | None = option(
        None,
        help="a file that says all of this, for several edits too, such as the edit.json of an earlier steering",
        group=WHAT,
        default_text="the flags say it",
    )

    sites: tuple[str, ...] | None = option(
        None, help="where, as shell patterns", group=WHERE, default_text="the site the autoencoder was trained on"
    )
    weights: tuple[str, ...] | None = option(
        None,
        help="what the change is multiplied by at each site: numbers, or presence",
        group=WHERE,
        default_text="1",
    )
    gate: str = option(
        "all",
        help="which tokens of the region: all; active: those on which the feature is; or those above a number of units",
        group=WHERE,
    )
    schedule: tuple[float, ...] | None = option(
        None, help="what the change is multiplied by at each step", group=WHERE, default_text="1"
    )

    seeds: int = option(4, help="noises, for the intervals", group=COMPARED)
    controls: int = option(20, help="random directions that move every token as far; 0: no controls", group=COMPARED)

    output_dir: Path = option(Path("steering"), help="where the folders of steerings are", group=MACHINE)


def run(options: SteerOptions) -> None:
    """Steer as the options say. Raises FluxIRError for what a user can mend, before anything heavy where possible."""
    from flux_ir.api.steer import SteerSettings, run_steering
    from flux_ir.commands.report import Report, peak_memory

    given = options.given(SteerSettings)
    settings = SteerSettings(**given | {"gate": gate_of(options.gate), "weights": weights_of(options.weights)})
    with Report() as report:
        done = run_steering(settings, report.watch)
    for line in dose_table(done.table):
        report.results.print(line, markup=False)
    written = done.drawn | {"numbers": done.numbers}
    if done.edit.is_file():
        written["the edit, for --edit"] = done.edit
    report.table("steered", written, peak_memory())


def gate_of(text: str) -> str | float:
    """A gate as it is typed. Raises FluxIRError for what is neither a word nor a number."""
    if text in ("all", "active"):
        return text
    try:
        return float(text)
    except ValueError:
        raise FluxIRError(
            f"--gate must be all, active or a number of units: got {text!r}", hint="leave it out for all tokens"
        ) from None


def weights_of(words: tuple[str, ...] | None) -> str | tuple[float, ...] | None:
    """Weights as they are typed. Raises FluxIRError for what is neither presence nor numbers."""
    if words is None or words == ("presence",):
        return None if words is None else "presence"
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise FluxIRError(
            f"--weights must be presence, or numbers with commas between: got {','.join(words)!r}",
            hint="one number for all sites, or one for each",
        ) from None


def dose_table(table: "Sequence[DoseRow]") -> list[str]:
    """One line per kind of picture and strength, under headings; intervals where there are several noises."""
    from flux_ir.commands.report import aligned

    head = ["", "strength", "active", "carried", "moved", "inside [dB]", "outside [dB]", "latent inside", "outside"]
    lpips = any(row.lpips is not None for row in table)
    rows = [
        (
            row.row,
            f"{row.strength:g}",
            _said(row.activation, 2),
            _said(row.carried, 2),
            _said(row.moved, 0),
            "identical" if row.identical == row.pictures else _said(row.psnr_inside_db, 1),
            _said(row.psnr_outside_db, 1),
            _said(row.latent_inside, 3),
            _said(row.latent_outside, 3),
            *([_said(row.lpips, 3), _said(row.lpips_outside, 3)] if lpips else []),
        )
        for row in table
    ]
    return aligned([(*head, *(["LPIPS", "outside"] if lpips else [])), *rows])


def _said(estimate: "Estimate | None", digits: int) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} ± {estimate.high - estimate.mean:.{digits}f}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(SteerOptions, run, argv, prog=prog)
