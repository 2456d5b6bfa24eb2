"""The page of an atlas: blocks by kinds of edits as a heat table, and behind each cell its pictures and numbers.

It lies in the atlas's folder, which can be moved: its pictures are found by relative links.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_ir.explorer.document import filled, joined, policy, safe_json
from flux_ir.files import complete_file

PAGE = "atlas.html"
STYLES = ("base.css", "atlas.css")
SCRIPTS = ("shared.js", "atlas/table.js")


def write_atlas_page(folder: Path, atlas: Mapping[str, Any]) -> Path:
    """Write the page of an atlas (the content of its atlas.json) into its folder; gives its path."""
    style, script = joined(STYLES), joined(SCRIPTS)
    slots = {
        "policy": iter([policy(style, script)]),
        "style": iter([style]),
        "data": iter([safe_json(atlas)]),
        "script": iter([script]),
    }
    target = folder / PAGE
    with complete_file(target) as page, page.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(filled(PAGE, slots))
    return target
