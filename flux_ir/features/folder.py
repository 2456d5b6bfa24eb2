"""The folder that holds what is known of an autoencoder's features, and how every later stage reads it.

    features.json                          what was scored, where that lies, counts, FVU, and which stages are done
    images.jsonl                           a row per generation, in the source's order: everywhere else its number
    scores/{img|txt}/00000.safetensors     S and the token maps of a run of generations; complete or absent
    scores/sample.safetensors              the mean of each step and stream, and the edges of the histograms
    table.safetensors                      a column per number, an entry per feature, under "{stream}/"
    examples.safetensors, selection.safetensors, decoder.safetensors, words.json, labels.json      later stages
    thumbnails/, sheets/, draws/, pages/   pictures of them

Within a part, entries are sorted by image, feature, step and token, so S is one row per run of equal (image, feature),
and the maps of a feature on an image are one slice. Next: `scores`, which writes all of this.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file, write_json
from flux_ir.sites import Stream

FORMAT, VERSION = "flux_ir features", 1
METADATA_KEY = "flux_ir"
"""The one key of a file's metadata, with JSON: the library writes several keys in an order that is never the same."""

HISTOGRAM_BINS = 64
RARE, COMMON = 0.01, 0.1
"""Shares of the tokens: a feature that fires on fewer than the first is rare, on fewer than the second common."""
PLACE_R2 = 0.5
"""A feature means a place if its position explains more than this share of its variance."""

_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U16": "<u2", "U8": "u1", "I8": "i1"}
_OPEN_PARTS = 128  # mapped, so of no cost but a descriptor each

_FILES_OF: Mapping[str, Sequence[str]] = {
    "score": ("table.safetensors",),
    "examples": ("examples.safetensors",),
    "labels": ("words.json", "labels.json"),
    "pages": ("pages/index.html",),
}
"""What each stage leaves, besides the parts of the scores: a stage whose files are gone is not done."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What the scores depend on, wherever it lies. Anything else gives other scores."""

    weights: str
    """sha256 of the autoencoder's weights."""
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    """Active features per token; None: the architecture is given no number."""
    captures: str
    """The identity of the activations: a digest of their content."""
    model: str | None
    site: str | None
    """None: a plain array, or CLIP's activations."""
    streams: tuple[Stream, ...]
    steps: tuple[int, ...]
    """By the sampler's numbers."""
    images: int
    """Generations."""
    tokens: Mapping[Stream, int]
    """Of each stream of a generation, padding among them; the most, where generations differ."""

    @property
    def digest(self) -> str:
        """16 hex digits that stand for all of it."""
        return digest_of(asdict(self))


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One generation."""

    index: int
    id: str
    prompt: str
    seed: int | None
    width: int | None
    """Pixels; None: not known, as of an array."""
    height: int | None
    grid: tuple[int, int] | None
    """Rows and columns of its image tokens; None: they lie on no grid, or it is not known."""
    picture: str | None
    """Path relative to the captures' folder; None: there is no picture."""
    used_txt: int | None
    """Text tokens that are not padding; None: not known."""


class TokenFeatures(NamedTuple):
    """The features of the tokens of one image at one step: those of token t are `ptr[t]` to `ptr[t + 1]`."""

    ptr: NDArray[np.int64]
    feature: NDArray[np.int64]
    value: NDArray[np.float32]
    """The largest of a token first."""


@dataclass(frozen=True)
class ScorePart:
    """The scores of a run of n generations, memory-mapped. Their tokens are the `positions` that are not -1."""

    images: range
    steps: tuple[int, ...]
    image_ptr: NDArray[np.int64]
    """[n + 1]: the rows of each image."""
    feature: NDArray[Any]
    """[rows], ascending within an image; a feature without a row is silent on the image."""
    max: NDArray[np.float32]
    """[rows]: S, the largest activation over all tokens and steps."""
    mean: NDArray[np.float32]
    """[rows]: over all tokens and steps, zeros included."""
    at_token: NDArray[np.int32]
    """[rows]: the position of the first of the largest, in its stream."""
    at_step: NDArray[np.int16]
    """[rows]: its step, by the sampler's number."""
    row_ptr: NDArray[np.int64]
    """[rows + 1]: the entries of each row."""
    place: NDArray[Any]
    """[entries]: number of the step times `tokens`, plus the token; ascending within a row."""
    value: NDArray[np.float32]
    """[entries], above 0."""
    error: NDArray[np.float32]
    """[n, steps, tokens]: ||x - x_hat||^2; 0 where there is no token."""
    norm: NDArray[np.float32]
    """[n, steps, tokens]: ||x - mean||^2, the mean being that of the sample at this step and stream."""
    positions: NDArray[np.int32]
    """[n, tokens]: of each token in its stream; -1: padding, or no token."""
    centred: NDArray[np.float64]
    """[steps, d_in]: the sum over all tokens of x - mean."""

    @property
    def tokens(self) -> int:
        """Places for tokens of each image and step."""
        return self.positions.shape[1]

    def rows(self, image: int) -> slice:
        """The rows of an image, by its number in the source."""
        at = image - self.images.start
        return slice(int(self.image_ptr[at]), int(self.image_ptr[at + 1]))

    def entries(self, image: int, feature: int) -> slice:
        """The entries of a feature on an image: an empty slice where it is silent."""
        rows = self.rows(image)
        row = rows.start + int(np.searchsorted(self.feature[rows], feature))
        if row == rows.stop or self.feature[row] != feature:
            return slice(0, 0)
        return slice(int(self.row_ptr[row]), int(self.row_ptr[row + 1]))

    def token_map(self, image: int, feature: int) -> NDArray[np.float32]:
        """The activation of every token, in the order of `positions`: [steps, tokens]."""
        entries, found = self.entries(image, feature), np.zeros(len(self.steps) * self.tokens, np.float32)
        found[self.place[entries]] = self.value[entries]
        return found.reshape(len(self.steps), self.tokens)

    def token_features(self, image: int, step: int) -> TokenFeatures:
        """All features of all tokens of an image at a step (the sampler's number)."""
        rows, tokens = self.rows(image), self.tokens
        entries = slice(int(self.row_ptr[rows.start]), int(self.row_ptr[rows.stop]))
        lengths = np.diff(self.row_ptr[rows.start : rows.stop + 1])
        token = self.place[entries].astype(np.int64) - self.steps.index(step) * tokens
        here = (token >= 0) & (token < tokens)
        feature = np.repeat(self.feature[rows].astype(np.int64), lengths)[here]
        token, value = token[here], np.asarray(self.value[entries])[here]
        order = np.lexsort((feature, -value, token))
        ptr = np.searchsorted(token[order], np.arange(tokens + 1)).astype(np.int64)
        return TokenFeatures(ptr, feature[order], value[order])


@dataclass(frozen=True)
class FeatureTable:
    """What is known of each feature of one stream, [d_sae] unless said otherwise. NaN where it is not defined."""

    count: NDArray[np.int64]
    """Tokens, over all steps, on which it fires."""
    frequency: NDArray[np.float64]
    """The same as a share of all tokens."""
    images: NDArray[np.int64]
    """Generations with such a token."""
    mean_active: NDArray[np.float32]
    """Mean activation over the tokens it fires on; 0 for a dead one."""
    max_active: NDArray[np.float32]
    share: NDArray[np.float64]
    """Its part of what all features add: sum of z^2 ||W_dec||^2 over the tokens, divided by that of all features."""
    step_frequency: NDArray[np.float64]
    """[d_sae, steps]: share of the tokens of a step on which it fires."""
    step_mean: NDArray[np.float64]
    """[d_sae, steps]: mean activation over all tokens of a step, zeros included."""
    histogram: NDArray[np.int64]
    """[d_sae, 64]: how many activations lie between one edge and the next; the outer bins hold all beyond."""
    edges: NDArray[np.float64]
    """[65]: four to an octave, the same for all features."""
    centre_x: NDArray[np.float64]
    """Where its activation lies on average, from 0, left, to 1; of text from its beginning to its end."""
    centre_y: NDArray[np.float64]
    """From 0, above, to 1; NaN for text."""
    spread: NDArray[np.float64]
    """Root mean square distance of a map's activation from the map's own centre, in units of its longer side."""
    entropy: NDArray[np.float64]
    """Mean entropy of a map, from 0, all on one token, to 1, equal on all. (Maps weigh as much as their activation.)"""
    position_r2: NDArray[np.float64]
    """Share of its variance over tokens that the position explains: above 0.5 the feature means a place."""

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """Whether it fires at all."""
        return self.count > 0

    @cached_property
    def means_place(self) -> NDArray[np.bool_]:
        """Whether it says where a token is more than what is there."""
        return np.nan_to_num(self.position_r2) > PLACE_R2

    @cached_property
    def density(self) -> NDArray[Any]:
        """dead, rare (fires on fewer than 1 % of the tokens), common (fewer than 10 %) or very common."""
        names = np.array(["dead", "rare", "common", "very common"])
        return names[np.where(self.count == 0, 0, 1 + np.digitize(self.frequency, [RARE, COMMON]))]


@dataclass(frozen=True)
class Examples:
    """Images by their numbers, [d_sae, most] of each kind, -1 where there are no more; one of each prompt in a row.

    Beside each: its S, and where the largest value is. `quantile` is [d_sae, Q, M].
    """

    top: NDArray[np.int32]
    """The strongest."""
    top_value: NDArray[np.float32]
    top_token: NDArray[np.int32]
    """Position in its stream."""
    top_step: NDArray[np.int16]
    """By the sampler's number."""
    quantile: NDArray[np.int32]
    """At random of each of Q equal shares of the images it fires on, the strongest share first."""
    quantile_value: NDArray[np.float32]
    quantile_token: NDArray[np.int32]
    quantile_step: NDArray[np.int16]
    quantile_edges: NDArray[np.float32]
    """[d_sae, Q - 1]: S between the shares."""
    quantile_count: NDArray[np.int64]
    """[d_sae, Q]: images in each share."""
    random: NDArray[np.int32]
    """At random of all images it fires on."""
    random_value: NDArray[np.float32]
    random_token: NDArray[np.int32]
    random_step: NDArray[np.int16]
    silent: NDArray[np.int32]
    """Images on which it never fires, most like its strongest ones by what else fires on them."""
    silent_value: NDArray[np.float32]
    """How alike: a cosine."""


class FeatureFolder:
    """One such folder, as it is on the disk now. Raises FluxIRError for what is not there yet, naming the stage."""

    def __init__(self, path: Path, described: Mapping[str, Any]) -> None:
        self.path, self.described = path, described
        known = {field.name: described["settings"][field.name] for field in fields(FeatureSettings)}
        known |= {name: tuple(known[name]) for name in ("streams", "steps")}
        self.settings = FeatureSettings(**known)
        # Not of a method: that would be a circle, and mapped files stay open until the garbage collector runs.
        self._part = lru_cache(_OPEN_PARTS)(partial(_open_part, path, self.settings))

    def __repr__(self) -> str:
        known, done = self.settings, ", ".join(self.stages) or "none"
        where = known.site or "an array"
        return f"<FeatureFolder {self.path}: {known.d_sae} features of {where}, {known.images} images; stages: {done}>"

    # What it is of

    @property
    def sae(self) -> Path:
        """The folder of the autoencoder."""
        return (self.path / self.described["paths"]["sae"]).resolve()

    @property
    def captures(self) -> str:
        """Where the activations are: a path, or a URL."""
        said: str = self.described["paths"]["captures"]
        return said if "://" in said else str((self.path / said).resolve())

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
        """Of the whole autoencoder: overall, per_step, per_stream, per_step_and_stream ("2.img")."""
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
        """Where a part is, or is going to be."""
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
        """All parts in order, each open only while it is looked at."""
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
        found = np.full((len(part.steps), rows * columns), np.nan, np.float32)
        found[:, positions[positions >= 0]] = part.token_map(image, feature)[:, positions >= 0]
        return found.reshape(-1, rows, columns)

    def grid(self, image: int, stream: Stream = "img") -> tuple[int, int]:
        """Rows and columns of an image's tokens; one row of what lies on no grid."""
        known = self.images[image].grid if stream == "img" else None
        if known is not None:
            return known
        part = self.part_of(image, stream)
        return 1, max(part.tokens, int(part.positions[image - part.images.start].max()) + 1)

    # Numbers of features

    def table(self, stream: Stream = "img") -> FeatureTable:
        """The table. Raises FluxIRError if scoring is not complete."""
        self.check_done("score")
        columns = self.columns("table.safetensors", stream)
        return FeatureTable(**{field.name: columns[field.name] for field in fields(FeatureTable)})

    def examples(self, stream: Stream = "img") -> Examples:
        """The images that show what each feature responds to. Raises FluxIRError if they were not looked for."""
        self.check_done("examples")
        columns = self.columns("examples.safetensors", stream)
        return Examples(**{field.name: columns[field.name] for field in fields(Examples)})

    def columns(self, file: str, stream: Stream = "img") -> dict[str, NDArray[Any]]:
        """The arrays of one stream of a file of this folder (`examples.safetensors`), memory-mapped, by name."""
        self._check_stream(stream)
        tensors, _ = read_tensors(self.path / file)
        start = f"{stream}/"
        return {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}

    # Stages

    def stage_digest(self, stage: str, settings: Mapping[str, Any], after: Sequence[str] = ()) -> str:
        """What stands for a stage's result: its settings, and the results it is made from."""
        before = [self.stages[name]["digest"] for name in after]
        return digest_of([stage, self.settings.digest, dict(settings), before])

    def is_done(self, stage: str, settings: Mapping[str, Any], after: Sequence[str] = ()) -> bool:
        """Whether a stage's result for these settings is there, made from what the stages `after` left last."""
        if stage not in self.stages or not {*after} <= self.stages.keys():
            return False
        if not all(path.is_file() for path in self._files_of(stage)):
            return False  # deleted, as the hint at a broken file says
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
        """Note in features.json that a stage is complete, with `facts` beside the others; the folder as it is then.

        Call it last: where it stands, the stage's files are.
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


def _open_part(folder: Path, known: FeatureSettings, stream: Stream, number: int) -> ScorePart:
    path = _part_file(folder, stream, number)
    tensors, said = read_tensors(path)
    if said.get("settings") != known.digest:
        raise FluxIRError(f"{path} was made with other settings", hint="run flux-ir score-features again")
    first = number * part_images(known)
    images = range(first, first + len(tensors["positions"]))
    return ScorePart(images=images, steps=known.steps, **tensors)


def open_features(path: Path | str) -> FeatureFolder:
    """The folder of features at a path. Raises FluxIRError for what is none."""
    return FeatureFolder(Path(path), read_description(Path(path)))


def read_description(folder: Path) -> Mapping[str, Any]:
    """What features.json says. Raises FluxIRError where there is none, and for one of another version."""
    file = folder / "features.json"
    if not file.is_file():
        raise FluxIRError(
            f"{folder} holds no features: there is no {file.name}", hint="make it with flux-ir score-features"
        )
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        version = described["version"] if described["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError) as error:
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


def digest_of(value: Any) -> str:
    """16 hex digits that stand for what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_tensors(path: Path, tensors: Arrays, metadata: Mapping[str, Any] | None = None) -> None:
    """Write arrays as safetensors, complete or not at all; the same arrays give the same bytes."""
    said = json.dumps(metadata or {}, sort_keys=True, ensure_ascii=False)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with complete_file(path) as beside:
        save_file(contiguous, beside, {METADATA_KEY: said})


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """The arrays of a file that `write_tensors` wrote, memory-mapped and read only, and its metadata.

    Raises FluxIRError for a file that is missing or is none.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        said = json.loads(header.pop("__metadata__", {}).get(METADATA_KEY, "{}"))
        arrays = {name: _array(content, start, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise FluxIRError(f"there is no {path}", hint="run the stage again that makes it") from error
    except (OSError, ValueError, KeyError) as error:
        raise FluxIRError(
            f"{path} is no complete safetensors file: {error}", hint="delete it, and run its stage again"
        ) from error
    return arrays, said


def _array(content: NDArray[np.uint8], start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    first, last = entry["data_offsets"]
    if start + last > len(content):
        raise ValueError("it is cut short")
    return content[start + first : start + last].view(np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
