"""The page of one folder of maps: choose a word, and see its map over the picture, of every block at every step.

    maps.html                     the page: its style sheet, its script, and what is true of all maps
    maps_files/word_0_to_words.js every map of one word in one direction; patches, groups and concepts likewise

A script is loaded when its word is chosen, so the page opens at once however many words there are. It is made of what
`flux-ir maps` has written, and of nothing else.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from flux_ir.errors import FluxIRError
from flux_ir.explorer.document import filled, joined, policy, safe_json, write_script
from flux_ir.files import complete_file, read_json, versions
from flux_ir.visualize.heatmap import COLOURS

SCHEMA = 1
STYLES = ("base.css", "maps.css")
SCRIPTS = ("shared.js", *(f"maps/{region}.js" for region in ("data", "state", "grid", "picture", "main")))
WAYS = {
    "to_words": ("image → word", "the share of its attention that each image token gives to the word"),
    "value_to_words": ("value-weighted", "the norm of what the word gives to each image token"),
    "from_words": ("word → image", "the share of its attention that the word gives to each image token"),
}
"""The three maps of a word, as the page calls them and says what they are."""
ONE_WAY = {
    "from_patches": ("patch → image", "the share of its attention that this patch gives to each image token"),
    "to_groups": ("image → group", "the share of its attention that each image token gives to these tokens"),
    "concepts": ("concept", "how much each image token is like this concept, of those in the list"),
}
MOST_BYTES = 4 << 20
"""Of all maps of one word in one direction: more tokens than that are pooled, 2 x 2 or more in one."""
_AGAIN = "make the maps again with flux-ir maps"


class Entry(NamedTuple):
    """One line of the page's list: what there are maps of."""

    kind: str
    """word, patch, group or concept."""
    name: str
    row: int
    """Which row it is of the tensors in the files of maps."""
    ways: tuple[str, ...]
    """The parts of a block's maps that it has."""

    def file(self, way: str) -> str:
        """The name of the script that has its maps."""
        return f"maps_files/{self.kind}_{self.row}_{way}"


def write_map_page(folder: Path) -> Path:
    """Write maps.html into a folder of maps, and what it reads beside it; gives the page's path.

    Raises FluxIRError for a folder that `flux-ir maps` has not finished.
    """
    facts = read_json(folder / "maps.json", hint=_AGAIN)
    try:
        entries = list(_entries(facts))
        rows, columns = facts["grid"]
        cells = (len(facts["blocks"]) + 1) * len(facts["steps"])
        pool = max(1, ceil(sqrt(rows * columns * cells / MOST_BYTES)))
        _write_scripts(folder, facts, entries, pool)
        data = _data(facts, entries, pool)
    except (KeyError, TypeError, ValueError, SafetensorError, FileNotFoundError) as error:
        raise FluxIRError(f"{folder} is not what this program writes: {error!r}", hint=_AGAIN) from error
    style, script = joined(STYLES), joined(SCRIPTS)
    slots = {"policy": policy(style, script, scripts_beside=True), "style": style, "script": script}
    slots["data"] = safe_json(data)
    page = folder / "maps.html"
    with complete_file(page) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(filled("maps.html", {name: iter([text]) for name, text in slots.items()}))
    return page


def _entries(facts: Mapping[str, Any]) -> Iterator[Entry]:
    for row, word in enumerate(facts["words"]):
        yield Entry("word", word["word"], row, tuple(WAYS))
    for row, concept in enumerate(facts["concepts"]):
        yield Entry("concept", concept, row, ("concepts",))
    for row, (group, share) in enumerate(facts["mass"]["all"].items()):
        if share:
            yield Entry("group", group, row, ("to_groups",))
    for row, patch in enumerate(facts["patches"]):
        yield Entry("patch", str(patch), row, ("from_patches",))


def _data(facts: Mapping[str, Any], entries: Sequence[Entry], pool: int) -> dict[str, Any]:
    """What the page itself holds."""
    rows, columns = facts["grid"]
    return {
        "schema": SCHEMA,
        "flux_ir": versions()["flux_ir"],
        "prompt": facts["prompt"],
        "facts": [facts["model"], f"seed {facts['seed']}", "{} x {} px".format(*facts["size"])],
        "blocks": facts["blocks"],
        "steps": facts["steps"],
        "times": [facts["timesteps"][step] for step in facts["steps"]],
        "grid": [rows, columns],
        "pool": pool,
        "entries": [
            {"kind": one.kind, "name": one.name, "files": {way: one.file(way) for way in one.ways}} for one in entries
        ],
        "ways": {way: list(words) for way, words in (WAYS | ONE_WAY).items()},
        "colours": b64encode(np.rint(COLOURS).astype(np.uint8).tobytes()).decode("ascii"),
    }


def _write_scripts(folder: Path, facts: Mapping[str, Any], entries: Sequence[Entry], pool: int) -> None:
    """A script for each entry and way: bytes [steps, blocks, cells], and what 0 and 255 of each map stand for."""
    rows, columns = facts["grid"]
    cells = ceil(rows / pool) * ceil(columns / pool)
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(folder / f"step_{step}.safetensors", "numpy")) for step in facts["steps"]
        ]
        names = [set(file.keys()) for file in files]
        for entry in entries:
            for way in entry.ways:
                bounds: list[list[float] | None] = []
                values = np.zeros((len(files) * len(facts["blocks"]), cells), np.uint8)
                for at, (number, block) in enumerate(
                    (number, block) for number in range(len(files)) for block in facts["blocks"]
                ):
                    key = f"{block}/{way}"
                    if key not in names[number]:  # concepts are mapped in some blocks alone
                        bounds.append(None)
                        continue
                    values[at], bound = _as_bytes(_row(files[number], key, entry.row), pool)
                    bounds.append(bound)
                value = {"values": b64encode(values.tobytes()).decode("ascii"), "bounds": bounds}
                name = entry.file(way)
                (folder / name).parent.mkdir(exist_ok=True)
                write_script(folder / f"{name}.js", name, value)


def _row(file: Any, key: str, row: int) -> NDArray[np.float64]:
    """One map [rows, columns] of a file; where heads were kept, their mean."""
    part = file.get_slice(key)
    values = part[:, row] if len(part.get_shape()) == 4 else part[row]
    values = np.asarray(values, np.float64)
    return values.mean(axis=0) if values.ndim == 3 else values


def _as_bytes(values: NDArray[np.float64], pool: int) -> tuple[NDArray[np.uint8], list[float]]:
    """A map pooled to means of pool x pool tokens and scaled to bytes, flat; and what 0 and 255 stand for."""
    if pool > 1:
        rows, columns = values.shape
        padded = np.pad(values, ((0, -rows % pool), (0, -columns % pool)), constant_values=np.nan)
        values = np.nanmean(padded.reshape(padded.shape[0] // pool, pool, -1, pool), axis=(1, 3))
    least, most = float(values.min()), float(values.max())
    scaled = (values - least) / (most - least) if most > least else np.zeros_like(values)
    return np.rint(255 * scaled).astype(np.uint8).ravel(), [float(f"{least:.6g}"), float(f"{most:.6g}")]
