"""The folder that holds what is known of an autoencoder's features, and how every later stage reads it.

    features.json                          what was scored, where that lies, counts, FVU, and which stages are done
    images.jsonl                           a row per generation, in the source's order: everywhere else its number
    scores/{img|txt}/00000.safetensors     S and the token maps of a run of generations; complete or absent
    scores/sample.safetensors              the mean of each step and stream, and the edges of the histograms
    table.safetensors                      a column per number, an entry per feature, under "{stream}/"
    examples.safetensors, selection.safetensors, selection.json, decoder.safetensors, words.json, labels.json
                                           what later stages found
    embeddings/                            of the images, by which `select_features` compares them
    sheets/, draws/, overlays/             pictures of features; pages/ and thumbnails/ are the pages
    compare/, exports/                     other folders beside this one; the table for other programs

Within a part, entries are sorted by image, feature, step and token, so S is one row per run of equal (image, feature),
and the maps of a feature on an image are one slice. Next: `scoring`, which begins such a folder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flux_ir.errors import FluxIRError
from flux_ir.features.contents import ExampleTable, FeatureSettings, FeatureTable, ImageRow, ScorePart, digest_of
from flux_ir.files import complete_file, read_json, write_json
from flux_ir.sites import Stream

FORMAT, VERSION = "flux_ir features", 1
METADATA_KEY = "flux_ir"
"""The one key of a file's metadata, with JSON: the library writes several keys in an order that is never the same."""

_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U16": "<u2", "U8": "u1", "I8": "i1"}
_OPEN_PARTS = 128  # memory-mapped: each costs a file descriptor and nothing else

_FILES_OF: Mapping[str, Sequence[str]] = {
    "score": ("table.safetensors",),
    "examples": ("examples.safetensors",),
    "labels": ("words.json", "labels.json"),
    "pages": ("pages/index.html",),
}
"""The files of each stage, besides the parts of the scores: a stage whose files are gone is not done."""

Arrays = Mapping[str, NDArray[Any]]


class FeatureFolder:
    """One such folder, as it is on the disk now. `described` is the content of features.json.

    Raises FluxIRError for what is not there yet, naming the stage.
    """

    def __init__(self, path: Path, described: Mapping[str, Any]) -> None:
        self.path, self.described = path, described
        settings = {field.name: described["settings"][field.name] for field in fields(FeatureSettings)}
        settings |= {name: tuple(settings[name]) for name in ("streams", "steps")}
        self.settings = FeatureSettings(**settings)
        # A cache of a bound method would hold this object in a cycle, and files stay mapped until the garbage
        # collector runs; so what is cached is a function of the path.
        self._part = lru_cache(_OPEN_PARTS)(partial(_open_part, path, self.settings))

    def __repr__(self) -> str:
        scored, done = self.settings, ", ".join(self.stages) or "none"
        where = scored.site or "an array"
        return (
            f"<FeatureFolder {self.path}: {scored.d_sae} features of {where}, {scored.images} images; stages: {done}>"
        )

    # What was scored

    @property
    def sae(self) -> Path:
        """The folder of the autoencoder."""
        return (self.path / self.described["paths"]["sae"]).resolve()

    @property
    def captures(self) -> str:
        """Where the activations are: a path, or a URL."""
        path: str = self.described["paths"]["captures"]
        return path if "://" in path else str((self.path / path).resolve())

    @property
    def streams(self) -> tuple[Stream, ...]:
        return self.settings.streams

    @property
    def steps(self) -> tuple[int, ...]:
        return self.settings.steps

    @property
    def stages(self) -> Mapping[str, Any]:
        """The stages that are done, with what each depended on."""
        done: Mapping[str, Any] = self.described["stages"]
        return done

    @property
    def fvu(self) -> Mapping[str, Any]:
        """The FVU of the whole autoencoder: overall, per_step, per_stream, per_step_and_stream ("2.img")."""
        self.check_done("score")
        found: Mapping[str, Any] = self.described["fvu"]
        return found

    @cached_property
    def images(self) -> Sequence[ImageRow]:
        """All generations."""
        with (self.path / "images.jsonl").open(encoding="utf-8") as lines:
            rows = (json.loads(line) for line in lines)
            return [ImageRow(**row | {"grid": tuple(row["grid"]) if row["grid"] else None}) for row in rows]

    def picture(self, image: int) -> Path | None:
        """The picture of a generation, if there is one on this machine."""
        name = self.images[image].picture
        path = None if name is None or "://" in self.captures else (Path(self.captures) / name).resolve()
        return path if path is not None and path.is_file() else None

    # Scores

    def part_file(self, stream: Stream, number: int) -> Path:
        """The file of a part, whether or not it has been written."""
        return _part_file(self.path, stream, number)

    @cached_property
    def part_images(self) -> int:
        """Generations of a part."""
        return part_images(self.settings)

    @property
    def parts(self) -> int:
        """How many there are of each stream."""
        return -(-self.settings.images // self.part_images)

    def part(self, stream: Stream, number: int) -> ScorePart:
        """One part. Raises FluxIRError if it is not there, or was made with other settings."""
        self._check_stream(stream)
        return self._part(stream, number)

    def part_of(self, image: int, stream: Stream = "img") -> ScorePart:
        """The part that holds a generation."""
        if not 0 <= image < self.settings.images:
            raise FluxIRError(
                f"images are numbered 0 to {self.settings.images - 1}: got {image}", hint="images.jsonl lists them"
            )
        return self.part(stream, image // self.part_images)

    def scores(self, stream: Stream = "img") -> Iterator[ScorePart]:
        """All parts in order; each is memory-mapped only while it is read."""
        self._check_stream(stream)
        for number in range(self.parts):
            yield _open_part(self.path, self.settings, stream, number)

    def scores_of(self, feature: int, stream: Stream = "img") -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The images a feature fires on, ascending, and its S there."""
        images, values = [], []
        for part in self.scores(stream):
            rows = np.flatnonzero(part.feature == feature)
            images.append(part.images.start + np.searchsorted(part.image_ptr, rows, side="right") - 1)
            values.append(part.max[rows])
        return np.concatenate(images), np.concatenate(values)

    def map(self, feature: int, image: int, stream: Stream = "img") -> NDArray[np.float32]:
        """The map of a feature on an image at every step: [steps, rows, columns], NaN where no token was kept.

        What lies on no grid, as text, is one row.
        """
        part = self.part_of(image, stream)
        rows, columns = self.grid(image, stream)
        positions = part.positions[image - part.images.start]
        maps = np.full((len(part.steps), rows * columns), np.nan, np.float32)
        maps[:, positions[positions >= 0]] = part.token_map(image, feature)[:, positions >= 0]
        return maps.reshape(-1, rows, columns)

    def grid(self, image: int, stream: Stream = "img") -> tuple[int, int]:
        """Rows and columns of an image's tokens; one row of what lies on no grid."""
        grid = self.images[image].grid if stream == "img" else None
        if grid is not None:
            return grid
        part = self.part_of(image, stream)
        return 1, max(part.tokens, int(part.positions[image - part.images.start].max()) + 1)

    # Numbers of features

    def table(self, stream: Stream = "img") -> FeatureTable:
        """The table. Raises FluxIRError if scoring is not complete."""
        self.check_done("score")
        columns = self.columns("table.safetensors", stream)
        return FeatureTable(**{field.name: columns[field.name] for field in fields(FeatureTable)})

    def examples(self, stream: Stream = "img") -> ExampleTable:
        """The images that show what each feature responds to. Raises FluxIRError if they were not looked for."""
        self.check_done("examples")
        columns = self.columns("examples.safetensors", stream)
        return ExampleTable(**{field.name: columns[field.name] for field in fields(ExampleTable)})

    def columns(self, file: str, stream: Stream = "img") -> dict[str, NDArray[Any]]:
        """The arrays of one stream of a file of this folder (`examples.safetensors`), memory-mapped, by name."""
        self._check_stream(stream)
        tensors, _ = read_tensors(self.path / file)
        start = f"{stream}/"
        return {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}

    # Stages

    def stage_digest(self, stage: str, settings: Mapping[str, Any], after: Sequence[str] = ()) -> str:
        """A digest of a stage's settings and of the results it is made from, those of the stages `after`."""
        before = [self.stages[name]["digest"] for name in after]
        return digest_of([stage, self.settings.digest, dict(settings), before])

    def is_done(self, stage: str, settings: Mapping[str, Any], after: Sequence[str] = ()) -> bool:
        """Whether a stage's result for these settings is there, made from what the stages `after` left last."""
        if stage not in self.stages or not {*after} <= self.stages.keys():
            return False
        if not all(path.is_file() for path in self._files_of(stage)):
            return False  # the hint at a broken file is to delete it
        return bool(self.stages[stage]["digest"] == self.stage_digest(stage, settings, after))

    def _files_of(self, stage: str) -> Iterator[Path]:
        yield from (self.path / name for name in _FILES_OF.get(stage, ()))
        if stage == "score":
            for stream in self.streams:
                yield from (self.part_file(stream, number) for number in range(self.parts))

    def mark_done(
        self,
        stage: str,
        settings: Mapping[str, Any],
        after: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> "FeatureFolder":
        """Write into features.json that a stage is complete, with more `facts`; gives the folder as it is then.

        Call it last: a stage that is written there has its files.
        """
        record = {"settings": dict(settings), "digest": self.stage_digest(stage, settings, after)}
        described = dict(read_description(self.path)) | dict(facts or {})
        described["stages"] = dict(sorted({**described["stages"], stage: record}.items()))
        write_json(self.path / "features.json", described)
        return open_features(self.path)

    def check_done(self, stage: str) -> None:
        """Raises FluxIRError if a stage has not been completed."""
        if stage not in self.stages:
            verb = {"score": "score-features", "examples": "find-examples", "labels": "label-features"}.get(
                stage, "features"
            )
            raise FluxIRError(
                f"the stage {stage} is not complete in {self.path}", hint=f"run flux-ir {verb}: it goes on there"
            )

    def _check_stream(self, stream: Stream) -> None:
        if stream not in self.streams:
            raise FluxIRError(
                f"{self.path} holds features of {' and '.join(self.streams)} tokens: got {stream}",
                hint=f"ask for {self.streams[0]}",
            )


def _part_file(folder: Path, stream: Stream, number: int) -> Path:
    return folder / "scores" / stream / f"{number:05d}.safetensors"


def _open_part(folder: Path, settings: FeatureSettings, stream: Stream, number: int) -> ScorePart:
    path = _part_file(folder, stream, number)
    tensors, metadata = read_tensors(path)
    if metadata.get("settings") != settings.digest:
        raise FluxIRError(f"{path} was made with other settings", hint="run flux-ir score-features again")
    first = number * part_images(settings)
    images = range(first, first + len(tensors["positions"]))
    return ScorePart(images=images, steps=settings.steps, **tensors)


def open_features(features: str | Path | FeatureFolder) -> FeatureFolder:
    """The folder of features as it is on the disk now. Raises FluxIRError for a folder that holds none."""
    path = features.path if isinstance(features, FeatureFolder) else Path(features)
    return FeatureFolder(path, read_description(path))


def read_description(folder: Path) -> Mapping[str, Any]:
    """What features.json says. Raises FluxIRError where there is none, and for one of another version."""
    file = folder / "features.json"
    if not file.is_file():
        raise FluxIRError(
            f"{folder} holds no features: there is no {file.name}", hint="make it with flux-ir score-features"
        )
    try:
        described = read_json(file, hint="delete the folder, and score again")
        version = described["version"] if described["format"] == FORMAT else None
    except KeyError as error:
        raise FluxIRError(
            f"{file} is no description of features: {error}", hint="delete the folder, and score again"
        ) from error
    if version != VERSION:
        raise FluxIRError(
            f"{file} has the layout {version}: this program reads {VERSION}", hint="score again into another folder"
        )
    found: Mapping[str, Any] = described
    return found


def part_images(settings: FeatureSettings) -> int:
    """Generations of a part: 256, or fewer where they have many tokens. A function of the settings alone."""
    rows = len(settings.steps) * max(settings.tokens.values())
    return max(1, min(256, PART_TOKENS // max(rows, 1)))


PART_TOKENS = 1 << 18
"""Tokens of a part, over all steps: with 64 features each its entries are 100 MB."""


def write_tensors(path: Path, tensors: Arrays, metadata: Mapping[str, Any] | None = None) -> None:
    """Write arrays as safetensors, complete or not at all; the same arrays give the same bytes."""
    text = json.dumps(metadata or {}, sort_keys=True, ensure_ascii=False)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with complete_file(path) as beside:
        save_file(contiguous, beside, {METADATA_KEY: text})


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """The arrays of a file that `write_tensors` wrote, memory-mapped and read only, and its metadata.

    Raises FluxIRError for a file that is missing or is none.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        metadata = json.loads(header.pop("__metadata__", {}).get(METADATA_KEY, "{}"))
        arrays = {name: _array(content, start, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise FluxIRError(f"there is no {path}", hint="run the stage again that makes it") from error
    except (OSError, ValueError, KeyError) as error:
        raise FluxIRError(
            f"{path} is no complete safetensors file: {error}", hint="delete it, and run its stage again"
        ) from error
    return arrays, metadata


def _array(content: NDArray[np.uint8], start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    first, last = entry["data_offsets"]
    if start + last > len(content):
        raise ValueError("it is cut short")
    return content[start + first : start + last].view(np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
