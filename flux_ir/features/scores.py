"""One pass over stored activations: what every feature does on every token, image, step and place.

Parts of up to 256 generations are computed one by one, in any order and by any process, and each is complete or absent;
the table is the sum over all parts in their order. So a run may be killed at any moment: the same command goes on, and
ends with the same bytes.

Memory holds two parts (100 MB each at 64 features per token), the autoencoder, and per feature 64 bins, at most 256
places and a few sums: 3 kB, which is 200 MB for 65,536 features. The number of images does not matter.
Next: `table`, which adds the parts up.
"""

import json
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.blocks import Drawn, DrawnSource, TokenSource
from flux_ir.collecting.workers import in_order
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import (
    FORMAT,
    HISTOGRAM_BINS,
    VERSION,
    FeatureFolder,
    FeatureSettings,
    FeatureTable,
    open_features,
    read_tensors,
    write_tensors,
)
from flux_ir.features.table import BINS_PER_OCTAVE, Sums, counts_of, unexplained
from flux_ir.layout import complete_file, write_json
from flux_ir.sae.config import HAS_K
from flux_ir.sae.data.filters import Filters, SiteKey, all_finite
from flux_ir.sae.kernels.choose import sparse_decode
from flux_ir.sae.metrics import Deviation
from flux_ir.sae.sparse_autoencoder import SparseAutoencoder
from flux_ir.sites import Stream

CHUNK_TOKENS = 8192
"""Tokens encoded before they are sorted into rows. Bits may depend on it, so no flag changes it."""
DENSE_ENTRIES = 1 << 26
"""Entries of a [tokens, d_sae] matrix that an architecture may hold at once: 256 MB."""
SAMPLE_IMAGES = 64
OCTAVES_BELOW = 12
"""Of the histograms, below the length of a token's deviation; there are 16 in all."""
PIXELS_PER_TOKEN = 16

SAMPLE_FILE = Path("scores", "sample.safetensors")


class Sample(NamedTuple):
    """What has to be known before the pass: from up to 64 images, evenly spaced over the source."""

    mean: Mapping[Stream, Tensor]
    """[steps, d_in]: the mean token of each step."""
    edges: NDArray[np.float64]
    """[65]: of the histograms. Powers of 2 and three between them, around the length of a token's deviation."""


@dataclass(frozen=True)
class Scoring:
    """An autoencoder, folded, without gradients and on its device, and the activations it is used on."""

    sae: SparseAutoencoder
    source: TokenSource
    site: SiteKey
    settings: FeatureSettings

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    def runs(self, images: range, most: int) -> Iterator[range]:
        """These images in pieces of at most so many, none of which crosses a run of the source."""
        for run in self.source.runs:
            first, last = max(run.start, images.start), min(run.stop, images.stop)
            for start in range(first, last, most):
                yield range(start, min(start + most, last))

    def read(self, images: range, step: int, stream: Stream) -> "Tokens":
        """Their tokens of one stream at a step. Raises FluxIRError for values that are not finite."""
        run = self.source.read_run(images, half_of(self.site, stream), step)
        if not all_finite(run.values) or (run.scale is not None and not all_finite(run.scale)):
            wrong = (~torch.isfinite(run.floats())).flatten(1).any(1).nonzero()[0]
            known = self.source.generations[images[int(wrong)]]
            raise FluxIRError(
                f"activations must be finite numbers: {self.site or 'the array'} at step {step} holds NaN or infinity "
                f"in generation {known.id}" + (f" of {known.path}" if known.path else ""),
                hint="the network overflowed there or the file is damaged: capture it again",
            )
        used = Filters().used(run)
        counted = np.ones(run.positions.shape, np.bool_) if used is None else used.numpy()
        return Tokens(run.floats(), run.positions.numpy(), counted)


class Tokens(NamedTuple):
    """Tokens of one stream, of some images at one step."""

    values: Tensor
    """[images, tokens, d_in]."""
    positions: NDArray[np.int32]
    counted: NDArray[np.bool_]
    """[images, tokens]: not padding, as far as that is known."""

    def rows(self, device: torch.device) -> Tensor:
        """The values of those that count, float32."""
        flat = self.values.flatten(0, 1)
        chosen = flat if self.counted.all() else flat[torch.from_numpy(self.counted.ravel())]
        return chosen.to(device, torch.float32)


def half_of(site: SiteKey, stream: Stream) -> SiteKey:
    """What holds the tokens of one stream of a site."""
    return replace(site, stream=stream) if site is not None and site.stream is None else site


# The beginning


def settings_of(
    sae: SparseAutoencoder, weights: str, source: TokenSource, site: SiteKey, steps: Sequence[int]
) -> FeatureSettings:
    """What the scores depend on. `weights` is the digest of the autoencoder's folder."""
    config = sae.config
    streams: tuple[Stream, ...] = ("img",)
    if site is not None:
        streams = ("img", "txt") if site.stream is None else (site.stream,)
    return FeatureSettings(
        weights=weights,
        architecture=config.architecture,
        d_in=config.d_in,
        d_sae=config.d_sae,
        k=config.k if config.architecture in HAS_K else None,
        captures=source.identity,
        model=source.model,
        site=None if site is None else str(site),
        streams=streams,
        steps=tuple(steps),
        images=len(source.generations),
        tokens={stream: source.tokens(half_of(site, stream)) for stream in streams},
    )


def begin_folder(path: Path, scoring: Scoring, sae: Path, captures: str, pictures: Path | None = None) -> FeatureFolder:
    """The folder with what is known before the pass: features.json and images.jsonl.

    `pictures` is a folder of pictures called as the generations are. Raises FluxIRError for a folder that holds the
    features of something else.
    """
    if (path / "features.json").is_file():
        found = open_features(path)
        _check_same(found, scoring.settings)
        if pictures is None:
            return found
    paths = {"sae": _relative(str(sae), path), "captures": _relative(captures, path)}
    known = asdict(scoring.settings)
    rows = list(image_rows(scoring, captures, pictures))
    with complete_file(path / "images.jsonl") as beside, beside.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if (path / "features.json").is_file():
        return open_features(path)
    versions = {"flux_ir": import_module("flux_ir").__version__, "torch": torch.__version__}
    described = {"format": FORMAT, "version": VERSION, "settings": known, "paths": paths, "versions": versions}
    write_json(path / "features.json", {**described, "stages": {}})
    return open_features(path)


def _check_same(found: FeatureFolder, asked: FeatureSettings) -> None:
    there, here = asdict(found.settings), asdict(asked)
    words = {"weights": "weights of the autoencoder", "captures": "content of the captures"}
    for name, value in here.items():
        if there[name] != value:
            raise FluxIRError(
                f"{found.path} holds features with another {words.get(name, name)}: {there[name]}, not {value}",
                hint="name another folder with --name, or delete that one",
            )


def _relative(where: str, folder: Path) -> str:
    """A path as it is said in the folder, so that both may be moved together; a URL as it is."""
    if "://" in where:
        return where
    try:
        return Path(os.path.relpath(Path(where).resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return Path(where).resolve().as_posix()


def image_rows(scoring: Scoring, captures: str, pictures: Path | None) -> Iterator[dict[str, Any]]:
    """A row of images.jsonl for every generation. Raises FluxIRError if `pictures` holds none of their pictures."""
    source, steps, found = scoring.source, scoring.settings.steps, 0
    folder = Path(captures) if Path(captures).is_dir() else Path(captures).parent
    for run in source.runs:
        used: Sequence[int | None] = [None] * len(run)
        if scoring.site is not None:
            used = source.read_run(run, half_of(scoring.site, scoring.settings.streams[0]), steps[0], range(1)).used_txt
        for index, used_txt in zip(run, used, strict=True):
            known = source.generations[index]
            drawn = source.drawn(index) if isinstance(source, DrawnSource) else Drawn(None, None, None, None)
            picture = drawn.picture
            if pictures is not None and (pictures / known.id).is_file():
                picture, found = pictures / known.id, found + 1
            row = {"index": index, "id": known.id, "prompt": known.prompt, "seed": drawn.seed}
            row |= {"width": drawn.width, "height": drawn.height, "grid": _grid(scoring, drawn)}
            row |= {"picture": None if picture is None else _relative(str(picture), folder), "used_txt": used_txt}
            yield row
    if pictures is not None and not found:
        raise FluxIRError(
            f"--pictures must hold files called as the generations are, such as {source.generations[0].id}: "
            f"there are none in {pictures}",
            hint="name the folder that flux-ir collect-clip read; what flux-ir collect keeps is found by itself",
        )


def _grid(scoring: Scoring, drawn: Drawn) -> list[int] | None:
    """Rows and columns of the image tokens: FLUX has one for 16 x 16 pixels."""
    if scoring.site is None or "img" not in scoring.settings.streams or drawn.width is None or drawn.height is None:
        return None
    return [drawn.height // PIXELS_PER_TOKEN, drawn.width // PIXELS_PER_TOKEN]


def notes_of(folder: FeatureFolder) -> Iterator[str]:
    """What the numbers will lack, a sentence each."""
    known, images = folder.settings, folder.images
    if known.images == 1:
        yield "there is one image, so nothing can be said of what features mean: give more"
    if "txt" in known.streams and (unknown := sum(row.used_txt is None for row in images)):
        yield f"of {unknown} of {known.images} prompts it is not known where they end: their padding is counted too"
    if "img" not in known.streams:
        return
    if known.tokens["img"] == 1:
        yield "each image has one token, so there are no maps"
    elif any(row.grid is None for row in images):
        yield "it is not known where the tokens lie in their images, so centre, spread and place are left out"
    elif any(row.grid is not None and row.grid[0] * row.grid[1] > known.tokens["img"] for row in images):
        yield "not all tokens of the images were kept, so maps have holes, and spatial numbers are of what is there"


# The sample


def measure_sample(scoring: Scoring) -> Sample:
    """The mean of each step and stream, and how long tokens are around it."""
    known = scoring.settings
    chosen = np.unique(np.linspace(0, known.images - 1, SAMPLE_IMAGES).round().astype(int)).tolist()
    mean: dict[Stream, Tensor] = {}
    squares, count = 0.0, 0
    for stream in known.streams:
        deviations = []
        for step in known.steps:
            deviation = Deviation(known.d_in)
            for image in chosen:
                tokens = scoring.read(range(image, image + 1), step, stream)
                deviation.add(tokens.rows(torch.device("cpu")))
            squares, count = squares + float(deviation.squares), count + deviation.count
            deviations.append(deviation.mean.float())
        mean[stream] = torch.stack(deviations)
    rows = scoring.sae.W_dec.detach().norm(dim=1).double().median().item()
    length = math.sqrt(squares / max(count, 1)) / (rows or 1.0)
    octave = round(math.log2(length)) if length > 0 else 0
    edges = 2.0 ** (octave - OCTAVES_BELOW + np.arange(HISTOGRAM_BINS + 1) / BINS_PER_OCTAVE)
    return Sample(mean, edges)


def write_sample(folder: FeatureFolder, sample: Sample) -> None:
    """Keep it: a run that goes on uses it as it is."""
    means = {f"{stream}/mean": mean.numpy() for stream, mean in sample.mean.items()}
    write_tensors(folder.path / SAMPLE_FILE, {"edges": sample.edges, **means}, {"settings": folder.settings.digest})


def read_sample(folder: FeatureFolder) -> Sample | None:
    """The sample that was kept; None: there is none yet."""
    if not (folder.path / SAMPLE_FILE).is_file():
        return None
    tensors, said = read_tensors(folder.path / SAMPLE_FILE)
    if said.get("settings") != folder.settings.digest:
        return None
    means = {stream: torch.from_numpy(tensors[f"{stream}/mean"].copy()) for stream in folder.streams}
    return Sample(means, np.array(tensors["edges"]))


# A part


def missing_parts(folder: FeatureFolder, stream: Stream) -> list[int]:
    """The numbers of the parts that are not there, or were made with other settings."""
    return [number for number in range(folder.parts) if not _is_made(folder, stream, number)]


def _is_made(folder: FeatureFolder, stream: Stream, number: int) -> bool:
    if not folder.part_file(stream, number).is_file():
        return False
    try:
        folder.part(stream, number)
    except FluxIRError:
        return False
    return True


class _Encoded(NamedTuple):
    """What the autoencoder made of some images of one stream, as it comes: entry by entry, step by step."""

    number: int
    images: range
    at: NDArray[np.int64]
    """[entries]: number of the image times the places of one, plus the place as `ScorePart` counts it."""
    feature: NDArray[np.int64]
    value: NDArray[np.float32]
    error: NDArray[np.float32]
    norm: NDArray[np.float32]
    positions: NDArray[np.int32]
    centred: NDArray[np.float64]


def make_parts(
    scoring: Scoring, folder: FeatureFolder, sample: Sample, stream: Stream, numbers: Sequence[int]
) -> Generator[int, None, None]:
    """Computes these parts and writes them; yields the number of each when it is there.

    The autoencoder works in this thread, entries are sorted in a second, and a third writes.
    """
    workers = 1 if scoring.device.type == "cpu" else 4
    pieces = _encode(scoring, folder, sample, stream, numbers)
    with closing(in_order(lambda made: (made.number, _sorted(scoring.settings, made)), pieces, workers,
                          torch_threads=None)) as found:  # fmt: skip
        joined = _joined(folder, found)
        write = in_order(lambda part: _write_part(folder, stream, *part), joined, 1, torch_threads=None)
        with closing(write) as written:
            yield from written


def _encode(
    scoring: Scoring, folder: FeatureFolder, sample: Sample, stream: Stream, numbers: Sequence[int]
) -> Iterator[_Encoded]:
    """The images of these parts, a few at a time, through the autoencoder."""
    known, tokens = scoring.settings, scoring.settings.tokens[stream]
    means = sample.mean[stream].to(scoring.device)
    most = max(1, CHUNK_TOKENS // (len(known.steps) * tokens))
    at_once = max(1, min(CHUNK_TOKENS, DENSE_ENTRIES // known.d_sae))
    for number in numbers:
        first = number * folder.part_images
        for images in scoring.runs(range(first, min(first + folder.part_images, known.images)), most):
            made = _Entries(len(images), len(known.steps), tokens, known.d_in)
            for at, step in enumerate(known.steps):
                read = scoring.read(images, step, stream)
                made.begin(at, read)
                rows = read.rows(scoring.device)
                for batch in torch.split(rows, at_once):
                    found = scoring.sae.encode_sparse(batch)
                    x_hat = sparse_decode(found.values, found.indices, scoring.sae.W_dec, scoring.sae.b_dec)
                    centred = batch - means[at]
                    made.add(
                        found.values.cpu().numpy(),
                        found.indices.cpu().numpy(),
                        (batch - x_hat).square().sum(1).cpu().numpy(),
                        centred.square().sum(1).cpu().numpy(),
                        centred.sum(0).cpu().numpy(),
                    )
            yield made.taken(number, images)


class _Entries:
    """Collects what batches give, of some images of one stream. A place is an image, a step and a token."""

    def __init__(self, images: int, steps: int, tokens: int, d_in: int) -> None:
        self.shape = (images, steps, tokens)
        self.error, self.norm = (np.zeros(images * steps * tokens, np.float32) for _ in range(2))
        self.positions = np.full((images, tokens), -1, np.int32)
        self.centred = np.zeros((steps, d_in))
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def begin(self, step: int, read: Tokens) -> None:
        """A step, by its number among those that are scored: its tokens come next, in their order."""
        self.positions[:, : read.positions.shape[1]] = np.where(read.counted, read.positions, -1)
        image, token = np.nonzero(read.counted)
        _, steps, tokens = self.shape
        self._step, self._coming = step, (image * steps + step) * tokens + token

    def add(
        self,
        values: NDArray[np.float32],
        indices: NDArray[np.int64],
        error: NDArray[np.float32],
        norm: NDArray[np.float32],
        centred: NDArray[np.float32],
    ) -> None:
        """The next tokens of this step."""
        at, self._coming = self._coming[: len(values)], self._coming[len(values) :]
        self.error[at], self.norm[at] = error, norm
        self.centred[self._step] += centred
        entries = np.flatnonzero(values)
        self._parts.append((at[entries // values.shape[1]], indices.ravel()[entries], values.ravel()[entries]))

    def taken(self, number: int, images: range) -> _Encoded:
        """All of it. `number` is that of the part."""
        at, feature, value = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        error, norm = self.error.reshape(self.shape), self.norm.reshape(self.shape)
        return _Encoded(number, images, at, feature, value, error, norm, self.positions, self.centred)


class _Rows(NamedTuple):
    """A piece of a part: some images, their rows and entries in order."""

    counts: NDArray[np.int64]
    """[images]: rows of each."""
    lengths: NDArray[np.int64]
    """[rows]: entries of each."""
    tensors: Mapping[str, NDArray[Any]]


def _sorted(known: FeatureSettings, made: _Encoded) -> _Rows:
    """Entries by image and feature, and S of each. Within a row they stay as they came: by step, then token.

    One sort of whole numbers, image and feature in front and the entry's own number behind, is several times as fast as
    any that returns an order.
    """
    entries, places = len(made.value), len(known.steps) * made.positions.shape[1]
    bits = max(entries, 1).bit_length()
    order = np.sort(((made.at // places * known.d_sae + made.feature) << bits) | np.arange(entries))
    key, order = order >> bits, order & ((1 << bits) - 1)
    value, place = made.value[order], made.at[order] % places
    starts = _starts(key)
    lengths = np.diff(starts, append=entries)
    image, feature = np.divmod(key[starts], known.d_sae)
    tensors = _row_scores(known, made, value, place, starts, lengths, image)
    tensors |= {
        "feature": feature.astype(np.uint16 if known.d_sae <= 1 << 16 else np.int32),
        "place": place.astype(np.uint16 if places <= 1 << 16 else np.int32),
        "value": value,
        "error": made.error,
        "norm": made.norm,
        "positions": made.positions,
        "centred": made.centred,
    }
    return _Rows(np.bincount(image, minlength=len(made.images)), lengths, tensors)


def _row_scores(
    known: FeatureSettings,
    made: _Encoded,
    value: NDArray[np.float32],
    place: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    image: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """S of each row, its mean, and where the first of its largest values is."""
    if not len(starts):
        empty = np.zeros(0, np.float32)
        return {"max": empty, "mean": empty, "at_token": empty.astype(np.int32), "at_step": empty.astype(np.int16)}
    largest = np.maximum.reduceat(value, starts)
    row = np.repeat(np.arange(len(starts)), lengths)
    largest_at = np.flatnonzero(value == largest[row])
    first = largest_at[_starts(row[largest_at])]
    step, token = np.divmod(place[first], made.positions.shape[1])
    counted = (made.positions >= 0).sum(1) * len(known.steps)
    return {
        "max": largest,
        "mean": (np.add.reduceat(value.astype(np.float64), starts) / counted[image]).astype(np.float32),
        "at_token": made.positions[image, token],
        "at_step": np.array(known.steps, np.int16)[step],
    }


def _starts(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of equal keys begins."""
    return np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1]) if len(key) else np.zeros(0, np.int64)


def _joined(folder: FeatureFolder, found: Iterable[tuple[int, _Rows]]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Pieces put together to whole parts."""
    waiting: list[_Rows] = []
    images = 0
    for number, piece in found:
        waiting.append(piece)
        images += len(piece.counts)
        if images < min(folder.part_images, folder.settings.images - number * folder.part_images):
            continue
        tensors = {
            name: np.concatenate([part.tensors[name] for part in waiting])
            for name in piece.tensors
            if name != "centred"
        }
        tensors["centred"] = np.sum([part.tensors["centred"] for part in waiting], axis=0)
        for name, counts in (("image_ptr", "counts"), ("row_ptr", "lengths")):
            counted = np.concatenate([getattr(part, counts) for part in waiting])
            tensors[name] = np.concatenate([[0], np.cumsum(counted)]).astype(np.int64)
        waiting, images = [], 0
        yield number, tensors


def _write_part(folder: FeatureFolder, stream: Stream, number: int, tensors: dict[str, NDArray[Any]]) -> int:
    known, first = folder.settings, number * folder.part_images
    ids = [row.id for row in folder.images[first : first + len(tensors["positions"])]]
    said = {"settings": known.digest, "stream": stream, "steps": list(known.steps), "first_image": first, "ids": ids}
    write_tensors(folder.part_file(stream, number), tensors, said)
    return number


def make_table(folder: FeatureFolder, sample: Sample, decoder_norms: NDArray[np.float64]) -> FeatureFolder:
    """Adds up all parts, writes table.safetensors, and notes counts and FVU: the stage is complete with it."""
    sums, counts, columns = dict[Stream, Sums](), dict[str, Any](), dict[str, NDArray[Any]]()
    for stream in folder.streams:
        sums[stream] = Sums(folder.settings, stream, sample.edges)
        for part in folder.scores(stream):
            sums[stream].add(part, folder.images[part.images.start : part.images.stop])
        table = sums[stream].table(decoder_norms)
        counts[stream] = counts_of(sums[stream], table)
        columns |= {f"{stream}/{field.name}": getattr(table, field.name) for field in fields(FeatureTable)}
    write_tensors(folder.path / "table.safetensors", columns, {"settings": folder.settings.digest})
    fvu = unexplained(sums, sample.mean, folder.steps)
    return folder.mark_done("score", {}, facts={"counts": counts, "fvu": fvu})
