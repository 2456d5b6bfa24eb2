"""What is scored, an autoencoder and stored activations, and what has to be known before the pass over them.

That is: the settings the scores depend on, a row for each generation, and a sample of the tokens. Next: `scores`, the
pass.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.blocks import Drawn, DrawnSource, TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.features.contents import HISTOGRAM_BINS, FeatureSettings
from flux_ir.features.folder import FORMAT, VERSION, FeatureFolder, open_features, read_tensors, write_tensors
from flux_ir.features.table import BINS_PER_OCTAVE
from flux_ir.files import complete_file, versions, write_json
from flux_ir.sae.architectures.config import HAS_K
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.filters import Filters, SiteKey, all_finite
from flux_ir.sae.evaluation.metrics import Deviation
from flux_ir.sites import Stream

SAMPLE_IMAGES = 64
OCTAVES_BELOW = 12
"""How many of the 16 octaves of the histograms lie below the length of a token's deviation from the mean."""
PIXELS_PER_TOKEN = 16

SAMPLE_FILE = Path("scores", "sample.safetensors")


class Sample(NamedTuple):
    """Measured before the pass, on up to 64 images, evenly spaced over the source."""

    mean: Mapping[Stream, Tensor]
    """[steps, d_in]: the mean token of each step."""
    edges: NDArray[np.float64]
    """[65]: the edges of the histograms, four to an octave, around the length of a token's deviation."""


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

    def read(self, images: range, step: int, stream: Stream) -> "StreamTokens":
        """Their tokens of one stream at a step. Raises FluxIRError for values that are not finite."""
        run = self.source.read_run(images, half_of(self.site, stream), step)
        values = run.floats()
        if not all_finite(values):
            wrong = (~torch.isfinite(values)).flatten(1).any(1).nonzero()[0]
            generation = self.source.generations[images[int(wrong)]]
            raise FluxIRError(
                f"activations must be finite numbers: {self.site or 'the array'} at step {step} holds NaN or infinity "
                f"in generation {generation.id}" + (f" of {generation.path}" if generation.path else ""),
                hint="the network overflowed there or the file is damaged: capture it again",
            )
        used = Filters().used(run)
        counted = np.ones(run.positions.shape, np.bool_) if used is None else used.numpy()
        return StreamTokens(values, run.positions.numpy(), counted)


class StreamTokens(NamedTuple):
    """Tokens of one stream, of some images at one step."""

    values: Tensor
    """[images, tokens, d_in]."""
    positions: NDArray[np.int32]
    counted: NDArray[np.bool_]
    """[images, tokens]: not padding, as far as that is known."""

    def rows(self, device: torch.device) -> Tensor:
        """The values of the counted tokens, float32."""
        flat = self.values.flatten(0, 1)
        chosen = flat if self.counted.all() else flat[torch.from_numpy(self.counted.ravel())]
        return chosen.to(device, torch.float32)


def half_of(site: SiteKey, stream: Stream) -> SiteKey:
    """The site that holds the tokens of one stream: half of a single block, or the site itself."""
    return replace(site, stream=stream) if site is not None and site.stream is None else site


# ---- The folder


def settings_of(
    sae: SparseAutoencoder, weights: str, source: TokenSource, site: SiteKey, steps: Sequence[int]
) -> FeatureSettings:
    """What the scores depend on. `weights` is the digest of the autoencoder's folder."""
    config = sae.config
    streams: tuple[Stream, ...] = ("img",)
    if site is not None:
        if site.stream == "cond":
            raise FluxIRError(
                f"features are scored on tokens of the image or the text: got {site}",
                hint="name a site such as double.3.img",
            )
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
    """Makes the folder, with features.json and images.jsonl. If it is there, only `pictures` may change it.

    `pictures` is a folder of pictures that are named by the generations' ids. Raises FluxIRError for a folder that
    holds the features of something else.
    """
    if (path / "features.json").is_file():
        folder = open_features(path)
        _check_same(folder, scoring.settings)
        if pictures is None:
            return folder
    paths = {"sae": _relative(str(sae), path), "captures": _relative(captures, path)}
    settings = asdict(scoring.settings)
    with complete_file(path / "images.jsonl") as beside, beside.open("w", encoding="utf-8", newline="\n") as lines:
        rows = image_rows(scoring, captures, pictures)
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if (path / "features.json").is_file():
        return open_features(path)
    described = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "paths": paths,
        "versions": versions("torch"),
    }
    write_json(path / "features.json", {**described, "stages": {}})
    return open_features(path)


def _check_same(found: FeatureFolder, asked: FeatureSettings) -> None:
    folder_settings, asked_settings = asdict(found.settings), asdict(asked)
    words = {"weights": "autoencoder (other weights)", "captures": "collection (other content of the captures)"}
    for name, value in asked_settings.items():
        if folder_settings[name] != value:
            raise FluxIRError(
                f"{found.path} holds features with another {words.get(name, name)}: {folder_settings[name]}, "
                f"not {value}",
                hint="name another folder with --name, or delete that one",
            )


def _relative(where: str, folder: Path) -> str:
    """A path relative to the folder, so that both may be moved together; a URL stays as it is."""
    if "://" in where:
        return where
    try:
        return Path(os.path.relpath(Path(where).resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return Path(where).resolve().as_posix()


def image_rows(scoring: Scoring, captures: str, pictures: Path | None) -> Iterator[dict[str, Any]]:
    """A row of images.jsonl for every generation. Raises FluxIRError if `pictures` holds none of their pictures."""
    source, steps, with_picture = scoring.source, scoring.settings.steps, 0
    folder = Path(captures) if Path(captures).is_dir() else Path(captures).parent
    for run in source.runs:
        used: Sequence[int | None] = [None] * len(run)
        if scoring.site is not None:
            used = source.read_run(run, half_of(scoring.site, scoring.settings.streams[0]), steps[0], range(1)).used_txt
        for index, used_txt in zip(run, used, strict=True):
            generation = source.generations[index]
            drawn = source.drawn(index) if isinstance(source, DrawnSource) else Drawn(None, None, None, None)
            picture = drawn.picture
            if pictures is not None and (pictures / generation.id).is_file():
                picture, with_picture = pictures / generation.id, with_picture + 1
            row = {"index": index, "id": generation.id, "prompt": generation.prompt, "seed": drawn.seed}
            row |= {"width": drawn.width, "height": drawn.height, "grid": _grid(scoring, drawn)}
            row |= {"picture": None if picture is None else _relative(str(picture), folder), "used_txt": used_txt}
            yield row
    if pictures is not None and not with_picture:
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
    """What the numbers will lack, one sentence each, for notes."""
    scored, images = folder.settings, folder.images
    if scored.images == 1:
        yield "there is one image, so nothing can be said of what features mean: give more"
    if "txt" in scored.streams and (unknown := sum(row.used_txt is None for row in images)):
        yield f"of {unknown} of {scored.images} prompts it is not known where they end: their padding is counted too"
    if "img" not in scored.streams:
        return
    if scored.tokens["img"] == 1:
        yield "each image has one token, so there are no maps"
    elif any(row.grid is None for row in images):
        yield "it is not known where the tokens lie in their images, so centre, spread and place are left out"
    elif any(row.grid is not None and row.grid[0] * row.grid[1] > scored.tokens["img"] for row in images):
        yield "not all tokens of the images were kept, so maps have holes, and spatial numbers are of what is there"


# ---- The sample


def measure_sample(scoring: Scoring) -> Sample:
    """The mean of each step and stream, and how long tokens are around it."""
    settings = scoring.settings
    chosen = np.unique(np.linspace(0, settings.images - 1, SAMPLE_IMAGES).round().astype(int)).tolist()
    mean: dict[Stream, Tensor] = {}
    squares, count = 0.0, 0
    for stream in settings.streams:
        deviations = []
        for step in settings.steps:
            deviation = Deviation(settings.d_in)
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
    """Keep it: a run that is resumed must have the same edges and means."""
    means = {f"{stream}/mean": mean.numpy() for stream, mean in sample.mean.items()}
    write_tensors(folder.path / SAMPLE_FILE, {"edges": sample.edges, **means}, {"settings": folder.settings.digest})


def read_sample(folder: FeatureFolder) -> Sample | None:
    """The sample that was kept; None: there is none yet."""
    if not (folder.path / SAMPLE_FILE).is_file():
        return None
    tensors, metadata = read_tensors(folder.path / SAMPLE_FILE)
    if metadata.get("settings") != folder.settings.digest:
        return None
    means = {stream: torch.from_numpy(tensors[f"{stream}/mean"].copy()) for stream in folder.streams}
    return Sample(means, np.array(tensors["edges"]))
