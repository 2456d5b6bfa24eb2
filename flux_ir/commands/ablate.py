"""`flux-ir ablate`: what each block is for: one block edited at a time, and what becomes of the pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import (
    COMPARED,
    KNOWN,
    LARGEST_SEED,
    MACHINE,
    MEASURED,
    BatchOptions,
    ModelOptions,
    NameOptions,
    PictureOptions,
)

if TYPE_CHECKING:
    from flux_ir.api.ablate import Atlas

Kind = Literal["skip", "img_update", "txt_update", "attn", "mlp", "rotary", "patch_img", "patch_txt", "patch_update"]
Word = Literal[Kind, "none"]
EVERY: tuple[Kind, ...] = (
    "skip", "img_update", "txt_update", "attn", "mlp", "rotary", "patch_img", "patch_txt", "patch_update",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AblateOptions(PictureOptions, BatchOptions, ModelOptions, NameOptions):
    """Say what each block is for: edit one block at a time, and measure what becomes of many pictures.

    Skip it, leave one stream or one branch out, shift the rotary positions of its image keys, take what it put out from
    another prompt's run: latent distance, PSNR, LPIPS where it is installed, and on captions of flux-tiny's world what
    is lost. Writes a table, a picture and a page. The same command goes on where it stopped; under torchrun all
    processes share the work and write the same files.
    """

    prompts: Path | None = option(
        None,
        help="whose pictures are edited: a file of prompts, as for flux-ir collect",
        group=KNOWN,
        default_text="16 captions of flux-tiny's world",
    )
    max_prompts: int | None = option(
        None, help="edit pictures of the first so many prompts alone", group=KNOWN, default_text="all of them"
    )
    repeats: int = option(1, help="pictures per prompt, each from its own noise", group=KNOWN)
    seed: int = option(
        0,
        help="base seed: the noise of a picture follows from it, the prompt and the repeat",
        group=KNOWN,
        maximum=LARGEST_SEED,
    )

    blocks: tuple[str, ...] | None = option(
        None,
        help="which blocks are edited, as shell patterns such as double.* or single.3",
        group=MEASURED,
        default_text="all",
    )
    kinds: tuple[Word, ...] = option(EVERY, help="what is done to a block, at all steps", group=MEASURED)
    window_kinds: tuple[Word, ...] = option(
        ("skip",), help="what is also done in the early, middle and late third of the steps alone", group=MEASURED
    )
    shift: int | None = option(
        None,
        help="rotary: how far the image keys are moved, down and to the right",
        unit="patches",
        group=MEASURED,
        minimum=0,
        default_text="a quarter of the shorter side",
    )
    control_kinds: tuple[Word, ...] = option(
        EVERY, help="what a random direction stands beside that moves every token as far", group=COMPARED
    )

    pictures: int = option(
        3, help="of how many pictures, the first ones, all edited ones are kept", group=MACHINE, minimum=0
    )
    output_dir: Path = option(Path("atlas"), help="where the folders of atlases are", group=MACHINE)


def run(options: AblateOptions) -> None:
    """Ablate as the options say. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.ablate import AblateSettings, run_ablation
    from flux_ir.commands.report import Report, aligned, peak_memory

    with Report() as report:
        atlas = run_ablation(AblateSettings(**options.given(AblateSettings)), report.watch)
    if os.environ.get("RANK", "0") != "0":
        return  # the first process of a job speaks for all
    for line in aligned(lines_of(atlas)):
        report.results.print(line, markup=False, soft_wrap=True)
    report.results.print()
    written = {
        "table": atlas.table,
        "picture": atlas.picture,
        "page": atlas.page,
        "numbers": atlas.folder / "atlas.json",
    }
    report.table("atlas", written, peak_memory())


def lines_of(atlas: "Atlas") -> list[tuple[str, ...]]:
    """Latent distances of what was done at all steps, blocks down, each with its control's in brackets; and what is
    lost most often when the block is skipped.
    """
    from flux_ir.studies.atlas import KINDS, Ablation

    rows = {(row.block, row.ablation): row for row in atlas.rows}
    kinds = [kind for kind in KINDS if (atlas.blocks[0], Ablation(kind)) in rows]
    lines = [("latent distance (random)", *kinds, "skipped, it loses")]
    for block in atlas.blocks:
        cells = []
        for kind in kinds:
            own, control = rows[block, Ablation(kind)], rows.get((block, Ablation(kind, control=True)))
            beside = f" ({control.latent.mean:.2f})" if control is not None else ""
            cells.append(f"{own.latent.mean:.2f}{beside}")
        skipped = rows.get((block, Ablation("skip")))
        lost = {} if skipped is None else {name: share.mean for name, share in skipped.lost_of.items() if share.mean}
        most = max(lost, key=lambda name: lost[name]) if lost else ""
        lines.append((block, *cells, f"{most} {lost[most]:.0%}" if most else "-"))
    return lines + [(one.block, f"{one.latent.mean:.2f}", *[""] * len(kinds)) for one in atlas.anchors]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(AblateOptions, run, argv, prog=prog)
