"""`flux-ir explore-features`: pages to look at features with, which open without a server."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from flux_ir.commands.cli.option import option
from flux_ir.commands.cli.parse import launch
from flux_ir.commands.cli.shared import FolderOptions

SHOWN = "what is shown"


@dataclass(frozen=True, kw_only=True)
class ExploreFeaturesOptions(FolderOptions):
    """Write pages/index.html into a folder of features: a list of all features, and a page for each.

    Open it in a browser; it needs no server and no network. It reads the files beside it and the small pictures in
    thumbnails/, so keep the folder together. What later stages find is shown once they have run: write the pages again.
    """

    pictures: bool = option(True, help="show pictures; without them the maps and the prompts stand alone", group=SHOWN)
    patch_features: int = option(
        8,
        help="the strongest features kept of every patch of the pictures shown; 0: none, which saves most of the disk",
        group=SHOWN,
        minimum=0,
    )
    thumbnail_px: int = option(
        256, help="the longer side of the small pictures, of which none is enlarged", group=SHOWN, minimum=16
    )


def run(options: ExploreFeaturesOptions) -> None:
    """Write the pages and print which to open. Raises FluxIRError for what a user can mend."""
    from flux_ir.api.explore_features import explore_features
    from flux_ir.commands.report import Report

    with Report() as report:
        page = explore_features(
            **{field.name: getattr(options, field.name) for field in fields(options)}, progress=report.watch
        )
    report.results.print(str(page), markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    return launch(ExploreFeaturesOptions, run, argv, prog=prog)
