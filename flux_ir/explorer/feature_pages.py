"""The pages of features: a list of all of them and a page for each, in a folder that opens from `file://`.

    index.html                       the page: its style sheet, its script, and what is true of all features
    list-img.js  texts-img.js  words-img.js          the numbers of all features; their labels; an index of prompts
    records/img/0001.js              64 features each: examples with maps, histogram, profile, words, neighbours
    images/0000.js                   1,024 pictures each: prompt, seed, size
    patches/000/000123.js            the strongest features of every patch of a picture
    ../thumbnails/000/000123.webp    a picture, shared by all features

Everything but the page is a classic script that hands over one value, since modules and fetch do not work from `file://`.
Memory holds the numbers of all features (some 100 bytes each), and the examples of 1,024 of them.
"""

import shutil
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.errors import FluxIRError
from flux_ir.explorer import feature_list, feature_pictures, feature_records
from flux_ir.explorer.document import filled, joined, policy, safe_json, write_script
from flux_ir.explorer.feature_pictures import (
    draw_thumbnails,
    image_shards,
    numbered,
    originals,
    patches_of,
)
from flux_ir.explorer.feature_records import Group, Panels, shard_records
from flux_ir.explorer.feature_stages import read_groups, read_later, read_panels, stages_digest, token_strings
from flux_ir.features.contents import COMMON, PLACE_R2, RARE, digest_of
from flux_ir.features.folder import FeatureFolder
from flux_ir.files import complete_file, read_json, versions, write_json
from flux_ir.sites import Stream
from flux_ir.visualize.heatmap import COLOURS

SCHEMA = 1  # raised when a page's script could no longer read older data
TEMPLATE = "features.html"
STYLES = ("base.css", "features.css")
REGIONS = (
    "data",
    "state",
    "columns",
    "order",
    "list",
    "scatter",
    "overlay",
    "examples",
    "charts",
    "feature",
    "patch",
    "main",
)
SCRIPTS = ("shared.js", "svg.js", *(f"features/{region}.js" for region in REGIONS))


@dataclass(frozen=True)
class PagesSettings:
    """What `explore_features` is asked to put on the pages."""

    pictures: bool = True
    """Show pictures; without them the maps and the prompts stand alone."""
    patch_features: int = 8
    """The strongest features kept of every patch of every picture shown; 0: none, which saves most of the disk."""
    thumbnail_px: int = 256
    """The longer side of the small pictures; none is enlarged."""

    def __post_init__(self) -> None:
        if not 0 <= self.patch_features <= 64:
            raise FluxIRError(
                f"features of a patch must be 0 to 64: got {self.patch_features}",
                hint="8 are as many as a page shows well",
            )
        if not 16 <= self.thumbnail_px <= 1024:
            raise FluxIRError(
                f"small pictures must have 16 to 1,024 pixels on the longer side: got {self.thumbnail_px}",
                hint="try 256",
            )


class Written(NamedTuple):
    """So many files of a kind are there now."""

    stage: str
    done: int
    total: int


class Shown(NamedTuple):
    """What the pages show of one stream."""

    groups: Sequence[Group]
    panels: Panels
    columns: Sequence[feature_list.ListColumn]


def write_pages(folder: FeatureFolder, settings: PagesSettings) -> Iterator[Written]:
    """Write `pages/` into a folder of features, as far as it is not there; gives what has been written.

    Raises FluxIRError before anything is written if a stage is missing, or there are no pictures to show.
    """
    folder.check_done("examples")
    pages = folder.path / "pages"
    streams = {stream: _shown(folder, stream) for stream in folder.streams}
    images = np.unique(np.concatenate([_images_of(shown.groups) for shown in streams.values()]))
    pictured = _pictured(folder, images) if settings.pictures else []
    _begin(pages, _digest(folder, settings), "records", "images", "patches", "*.js")
    if settings.pictures:
        thumbnails = folder.path / "thumbnails"
        _begin(thumbnails, digest_of([folder.settings.captures, settings.thumbnail_px]), "[0-9][0-9][0-9]")
        for done, _ in enumerate(draw_thumbnails(folder, thumbnails, pictured, settings.thumbnail_px), start=1):
            yield Written("pictures", done, len(pictured))
    if settings.patch_features:
        for done, image in enumerate(images, start=1):
            _write_patches(folder, pages, int(image), settings.patch_features)
            yield Written("patches", done, len(images))
    _write_images(folder, pages, images)
    for stream, shown in streams.items():
        _write_list(folder, pages, stream, shown, pictured if settings.pictures else None)
        yield from _write_records(folder, pages, stream, shown)
    _write_index(folder, pages, streams, settings)  # last: a page that opens finds all its files


def page_digest() -> str:
    """A digest of the page itself: its template, style sheets and scripts."""
    return digest_of([joined([TEMPLATE]), joined(STYLES), joined(SCRIPTS)])


# What is shown


def _shown(folder: FeatureFolder, stream: Stream) -> Shown:
    table = folder.table(stream)
    columns = feature_list.columns_of(table, folder.steps, read_later(folder, stream))
    return Shown(read_groups(folder, stream), read_panels(folder, stream), columns)


def _images_of(groups: Sequence[Group]) -> NDArray[np.int64]:
    images = np.unique(np.concatenate([np.unique(group.image) for group in groups]))
    return images[images >= 0].astype(np.int64)


def _pictured(folder: FeatureFolder, images: NDArray[np.int64]) -> list[int]:
    """Those of the images that have a picture. Raises FluxIRError if none has."""
    rows = folder.images
    pictured = [int(image) for image in images if rows[image].picture is not None]
    if "://" in folder.captures:
        raise FluxIRError(
            f"pictures are read from a folder: these captures are at {folder.captures}",
            hint="download the collection, or write pages of maps and prompts alone: --pictures False",
        )
    if len(images) and not pictured:
        raise FluxIRError(
            f"the captures at {folder.captures} were collected without pictures",
            hint="collect them with --save_images, or write pages of maps and prompts alone: --pictures False",
        )
    return pictured


# Writing


def _digest(folder: FeatureFolder, settings: PagesSettings) -> str:
    before = [folder.stages[name]["digest"] for name in ("score", "examples")]
    return digest_of([SCHEMA, folder.settings.digest, before, stages_digest(folder), asdict(settings)])


def _begin(target: Path, digest: str, *parts: str) -> None:
    """Make a folder ready: if these parts of it were made for another digest, they are deleted."""
    note = target / "made_for.json"
    if note.is_file() and read_json(note).get("digest") == digest:
        return
    for part in parts:
        for path in target.glob(part):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(note, {"digest": digest})


def _write_patches(folder: FeatureFolder, pages: Path, image: int, top: int) -> None:
    path = numbered(pages / "patches", image, ".js")
    if not path.exists():
        write_script(path, path.relative_to(pages).with_suffix("").as_posix(), patches_of(folder, image, top))


def _write_images(folder: FeatureFolder, pages: Path, images: NDArray[np.int64]) -> None:
    shown = np.zeros(len(folder.images), np.bool_)
    shown[images] = True
    for number, rows in enumerate(image_shards(folder, shown, token_strings(folder))):
        write_script(pages / "images" / f"{number:04d}.js", f"images/{number:04d}", rows)


def _write_list(
    folder: FeatureFolder, pages: Path, stream: Stream, shown: Shown, pictured: Sequence[int] | None
) -> None:
    (top,) = (group for group in shown.groups if group.kind == "top")
    has_picture = np.zeros(len(folder.images) + 1, np.bool_)
    if pictured is not None:
        has_picture[list(pictured)] = True
    visible = np.where(has_picture[top.image], top.image, -1)  # the last entry stands for -1
    value = {"columns": feature_list.columns_text(shown.columns)}
    value |= feature_list.first_pictures(folder, stream, visible, top.token)
    write_script(pages / f"list-{stream}.js", f"list-{stream}", value)
    labels = [shown.panels.labels.get(feature, {}).get("text") or "" for feature in range(folder.settings.d_sae)]
    lifting = shown.panels.rows.get("words")
    words = list(feature_list.common_words(folder, top.image))
    if lifting is not None:
        words = [
            ", ".join(word for word, *_ in lifting.get(feature, ())[:4]) or words[feature]
            for feature in range(len(words))
        ]
    write_script(pages / f"texts-{stream}.js", f"texts-{stream}", {"labels": labels, "words": words})
    write_script(pages / f"words-{stream}.js", f"words-{stream}", feature_list.prompt_words(folder, top.image))


def _write_records(folder: FeatureFolder, pages: Path, stream: Stream, shown: Shown) -> Iterator[Written]:
    shards = -(-folder.settings.d_sae // feature_records.SHARD)
    paths = [pages / "records" / stream / f"{number:04d}.js" for number in range(shards)]
    if all(path.exists() for path in paths):
        return
    records = shard_records(folder, stream, shown.groups, shown.panels)
    for done, (path, some) in enumerate(zip(paths, records, strict=True), start=1):
        write_script(path, f"records/{stream}/{path.stem}", some)
        yield Written("features", done, shards)


def _write_index(folder: FeatureFolder, pages: Path, streams: Mapping[Stream, Shown], settings: PagesSettings) -> None:
    style, script = joined(STYLES), joined(SCRIPTS)
    slots = {
        "policy": policy(style, script, scripts_beside=True),
        "style": style,
        "script": script,
        "data": safe_json(_data(folder, pages, streams, settings)),
    }
    with complete_file(pages / "index.html") as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(filled(TEMPLATE, {name: iter([text]) for name, text in slots.items()}))


def _data(
    folder: FeatureFolder, pages: Path, streams: Mapping[Stream, Shown], settings: PagesSettings
) -> dict[str, Any]:
    """The JSON in the page itself: what holds for all features."""
    scored = folder.settings
    return {
        "schema": SCHEMA,
        "flux_ir": versions()["flux_ir"],
        "name": folder.path.name,
        "site": scored.site,
        "facts": _facts(folder),
        "d_sae": scored.d_sae,
        "steps": list(scored.steps),
        "streams": list(streams),
        "of": {stream: _stream_data(folder, stream, shown) for stream, shown in streams.items()},
        "pictures": settings.pictures,
        "patch_features": settings.patch_features,
        "originals": originals(folder, pages),
        "shards": {"records": feature_records.SHARD, "images": feature_pictures.SHARD},
        "top_thumbnails": feature_list.TOP_THUMBNAILS,
        "rare": RARE,
        "common": COMMON,
        "place": PLACE_R2,
        "colours": b64encode(np.rint(COLOURS).astype(np.uint8).tobytes()).decode("ascii"),
        "missing": _missing(streams),
    }


def _stream_data(folder: FeatureFolder, stream: Stream, shown: Shown) -> dict[str, Any]:
    names = [column.name for column in shown.columns]
    ordered = next((name for name in feature_list.SORT if name in names), names[0])
    has_maps = stream == "txt" or any(row.grid is not None and max(row.grid) > 1 for row in folder.images)
    return {
        "columns": [
            {"name": column.name, "title": column.title, "unit": column.unit, "about": column.about}
            for column in shown.columns
        ],
        "shown": [name for name in feature_list.SHOWN if name in names],
        "sort": f"-{ordered}",
        "edges": [float(f"{edge:.4g}") for edge in folder.table(stream).edges],
        "maps": has_maps,
        "tokens": folder.settings.tokens[stream],
    }


def _facts(folder: FeatureFolder) -> list[str]:
    scored = folder.settings
    kind = scored.architecture if scored.k is None else f"{scored.architecture}, k {scored.k}"
    steps = f"steps {', '.join(map(str, scored.steps))}" if len(scored.steps) > 1 else f"step {scored.steps[0]}"
    overall = folder.fvu["overall"]
    unexplained = None if overall is None else f"{100 * overall:.1f} % unexplained (FVU)"
    generations = f"{scored.images:,} generations".replace(",", "\u202f")
    return [fact for fact in (scored.model, kind, steps, unexplained, generations) if fact is not None]


def _missing(streams: Mapping[Stream, Shown]) -> list[str]:
    """A sentence for every stage that has not been run."""
    rows = {name for shown in streams.values() for name in shown.panels.rows}
    named = {column.name for shown in streams.values() for column in shown.columns}
    stages = {
        "Coherence and stability: flux-ir select-features.": "coherence" in named,
        "Neighbours and what it draws: flux-ir draw-features.": {"nearest", "draws"} <= rows,
        "Words and a label: flux-ir label-features.": "words" in rows,
        "What turning it does: flux-ir demonstrate.": "steering" in rows,
    }
    return [sentence for sentence, is_there in stages.items() if not is_there]
