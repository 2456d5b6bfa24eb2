"""The page itself: template, style sheet, script, data and, if asked for, every picture, written as one file.

Nothing is put together at view time and nothing comes from elsewhere: the page works from `file://`, and its content
security policy allows no script but its own, whatever a prompt contains.
"""

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import Run, read_run, run_entry
from flux_ir.explorer.links import Beside, Inside, Links
from flux_ir.explorer.sprites import draw_bands, picture_size, plan_sheet
from flux_ir.layout import complete_file

SCHEMA = 1  # raised when a page's script could no longer read an older page's data

_SLOT = re.compile(r"\{\{(\w+)\}\}")
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


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


def safe_json(value: Any) -> str:
    """JSON in ASCII that can stand in any HTML element: no `</script>`, no `<!--`, no line separator survives in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: _UNSAFE[found[0]], text)


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
    """The text of the page in order. Slots are found in the template alone, so no content is ever taken for one."""
    style, script = _asset("explorer.css"), _asset("explorer.js")
    slots: dict[str, Iterator[str]] = {
        "policy": iter([_policy(style, script)]),
        "style": iter([style]),
        "data": iter([safe_json(data)]),
        "first": links.first(),
        "script": iter([script]),
        "rest": links.rest(),
    }
    for index, part in enumerate(_SLOT.split(_asset("template.html"))):
        if index % 2 == 0:
            yield part
        else:
            yield from slots[part]


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src 'self' file: blob:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode('ascii')}'"


def _asset(name: str) -> str:
    return files("flux_ir.explorer").joinpath(name).read_text(encoding="utf-8")
