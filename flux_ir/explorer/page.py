"""The page of runs: template, style sheet, script, data and, if asked for, every picture, written as one file."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import Run, read_run, run_entry
from flux_ir.explorer.document import filled, joined, policy, safe_json
from flux_ir.explorer.links import Beside, Inside, Links
from flux_ir.explorer.sprites import draw_bands, picture_size, plan_sheet
from flux_ir.layout import complete_file

SCHEMA = 1  # raised when a page's script could no longer read an older page's data
STYLES = ("base.css", "explorer.css")
SCRIPTS = ("shared.js", "explorer.js")


def write_explorer(output_dir: Path, generation_ids: Sequence[str], target: Path, *, single_file: bool = False) -> Path:
    """Write the page of these runs to `target`, and its thumbnails into a folder beside it; gives `target`.

    With `single_file` all pictures are inside the page. Raises FluxIRError for an unknown run, a run without decoded
    pictures, a broken file, and a target that is not in the output folder.
    """
    if not generation_ids:
        raise FluxIRError("the explorer shows at least one run: got none", hint="name runs with --generation_id")
    if not target.absolute().is_relative_to(output_dir.absolute()) or ".." in target.parts:
        raise FluxIRError(
            f"the page must lie in the folder of the runs, {output_dir}: got {target}",
            hint="nothing outside that folder is ever written",
        )
    beside = Beside(target)
    links: Links = Inside() if single_file else beside
    runs = [read_run(output_dir, generation_id) for generation_id in dict.fromkeys(generation_ids)]
    data = {"schema": SCHEMA, "flux_ir": version("flux-ir"), "runs": [_entry(run, links) for run in runs]}
    with complete_file(target) as page, page.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_page(data, links))
    beside.remove_stale()
    return target


def _entry(run: Run, links: Links) -> dict[str, Any]:
    plan = plan_sheet(*picture_size(run), len(run.blocks), len(run.steps))
    lenses = {
        lens: {
            "pictures": links.pictures(run, lens),
            "missing": run.missing(lens),
            "bands": [links.band(run, lens, index, jpeg) for index, jpeg in enumerate(draw_bands(run, lens, plan))],
        }
        for lens in run.pictures
    }
    return run_entry(run) | {"picture": links.picture(run), "lenses": lenses, "tiles": plan._asdict()}


def _page(data: dict[str, Any], links: Links) -> Iterator[str]:
    """The text of the page in order."""
    style, script = joined(STYLES), joined(SCRIPTS)
    slots: dict[str, Iterator[str]] = {
        "policy": iter([policy(style, script)]),
        "style": iter([style]),
        "data": iter([safe_json(data)]),
        "first": links.first(),
        "script": iter([script]),
        "rest": links.rest(),
    }
    return filled("explorer.html", slots)
