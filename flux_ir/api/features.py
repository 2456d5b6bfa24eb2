"""What the features of an autoencoder mean: one run of all stages, on this page, and its result for a notebook.

The run is `analyse_features`: scores, examples, selection, labels, pictures, pages. Every stage is a file of its own
here in `api`, and can be run again by itself in the folder that they share.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux_ir.api.draw_features import draw_features
from flux_ir.api.explore_features import explore_features
from flux_ir.api.find_examples import find_examples
from flux_ir.api.label_features import label_features
from flux_ir.api.progress import Note, Watch, unwatched
from flux_ir.api.score_features import score_features
from flux_ir.api.select_features import select_features
from flux_ir.distributed import joined, wait_for_all
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.labels import read_labels
from flux_ir.features.words import read_words
from flux_ir.sites import Site, Stream

ExampleKind = Literal["top", "quantile", "random", "silent"]


class Stage(NamedTuple):
    """A stage after scoring. What it has computed before for the same settings it does not compute again."""

    name: str
    run: Callable[[FeatureFolder, Watch], object]
    shared: bool = False
    """Whether all processes of a job share its work; else the first does it and the others wait."""


def _pages(folder: FeatureFolder, progress: Watch) -> None:
    """The pages; without pictures they show maps and prompts alone, and a note says so."""
    has_pictures = any(row.picture is not None for row in folder.images) and "://" not in folder.captures
    if not has_pictures:
        progress(Note("note: these captures have no pictures, so the pages show maps and prompts alone"))
    explore_features(folder, pictures=has_pictures, progress=progress)


STAGES = (
    Stage("examples", lambda folder, progress: find_examples(folder, progress=progress), shared=True),
    Stage("select", lambda folder, progress: select_features(folder, progress=progress)),
    Stage("labels", lambda folder, progress: label_features(folder, progress=progress)),
    Stage("draw", lambda folder, progress: draw_features(folder, progress=progress)),
    Stage("pages", _pages),
)
"""In the order they run, with the defaults of their functions."""


def analyse_features(
    sae: str | Path,
    captures: str | Path,
    *,
    site: str | Site | None = None,
    steps: Sequence[int] | None = None,
    pictures: str | Path | None = None,
    name: str | None = None,
    output_dir: str | Path = "features",
    device: str | None = None,
    progress: Watch = unwatched,
) -> FeatureFolder:
    """Score the features of an autoencoder and find out what they mean: every stage, as far as its results are missing.

    The arguments are those of `score_features`. Every other stage is a function too, with settings of its own; here
    they have their defaults. The result is one folder, which `read_features` and `flux-ir explore-features` show. Under
    torchrun all processes call this alike.

    Raises FluxIRError for what a user can mend.
    """
    with joined() as ranks:
        folder = score_features(
            sae,
            captures,
            site=site,
            steps=steps,
            pictures=pictures,
            name=name,
            output_dir=output_dir,
            device=device,
            progress=progress,
        )
        for stage in STAGES:
            if stage.shared or ranks.is_first:
                stage.run(open_features(folder.path), progress if ranks.is_first else unwatched)
            wait_for_all(ranks)
        return open_features(folder.path)


def read_features(features: str | Path | FeatureFolder, stream: Stream | None = None) -> "Features":
    """Read the features of one stream, image tokens by default if there are any, for a notebook.

    Raises FluxIRError for a folder that holds no features, is not scored, or lacks the stream.
    """
    folder = open_features(features)
    return Features(folder, stream or folder.streams[0])


class ExampleImage(NamedTuple):
    """An image that shows what a feature responds to, or does not respond to."""

    image: int
    """Its number in the source."""
    value: float
    """The largest activation on it; on a silent look-alike, its likeness to the strongest images: a cosine."""
    token: int | None
    """The position of that activation in its stream."""
    step: int | None
    prompt: str


class Features:
    """The features of one stream of an autoencoder. Files are read when they are first needed."""

    def __init__(self, folder: FeatureFolder, stream: Stream) -> None:
        self.folder, self.stream = folder, stream
        self._scores = folder.table(stream)

    def __repr__(self) -> str:
        scored, alive = self.folder.settings, int(self._scores.alive.sum())
        where = f"{scored.site or 'an array'}" + (f" of {scored.model}" if scored.model else "")
        return f"<Features of {where}, {self.stream} tokens: {alive} of {scored.d_sae} alive, {scored.images} images>"

    def __len__(self) -> int:
        return self.folder.settings.d_sae

    @cached_property
    def table(self) -> Mapping[str, NDArray[Any]]:
        """Every number of every feature by its name, [d_sae] or [d_sae, ...]; also those of later stages."""
        columns = self.folder.columns("table.safetensors", self.stream)
        columns |= {name: getattr(self._scores, name) for name in ("alive", "density", "means_place")}
        for file in ("selection.safetensors", "decoder.safetensors"):
            if (self.folder.path / file).is_file():
                columns |= self.folder.columns(file, self.stream)
        return columns

    def to_pandas(self) -> Any:
        """A DataFrame with a row per feature; what has a value per step becomes a column per step.

        Raises FluxIRError without pandas.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise FluxIRError("a DataFrame needs pandas", hint="pip install 'flux-ir[analysis]'") from error
        return pandas.DataFrame(flat_columns(self.folder, self.table))

    def examples(self, feature: int, kind: ExampleKind = "top") -> list[ExampleImage]:
        """The images of one kind.

        They are its strongest ones, or some of each equal share from strong to weak, or some of all it fires on, or
        look-alikes on which it is silent.
        """
        self._check(feature)
        table = self.folder.examples(self.stream)
        images, values = getattr(table, kind)[feature].ravel(), getattr(table, f"{kind}_value")[feature].ravel()
        unknown = np.full(len(images), -1)  # silent images have no token and step
        tokens, steps = (getattr(table, f"{kind}_{name}", None) for name in ("token", "step"))
        token = unknown if tokens is None else tokens[feature].ravel()
        step = unknown if steps is None else steps[feature].ravel()
        return [
            ExampleImage(
                int(images[row]),
                float(values[row]),
                int(token[row]) if token[row] >= 0 else None,
                int(step[row]) if step[row] >= 0 else None,
                self.folder.images[int(images[row])].prompt,
            )
            for row in np.flatnonzero(images >= 0)
        ]

    def scores(self, feature: int) -> NDArray[np.float32]:
        """S of every image, [images]: its largest activation there, 0 where it is silent."""
        self._check(feature)
        images, values = self.folder.scores_of(feature, self.stream)
        every = np.zeros(self.folder.settings.images, np.float32)
        every[images] = values
        return every

    def map(self, feature: int, image: int) -> dict[int, NDArray[np.float32]]:
        """The activation on every patch of an image, [rows, columns] by step; NaN where no token was kept."""
        self._check(feature)
        return dict(zip(self.folder.steps, self.folder.map(feature, image, self.stream), strict=True))

    @cached_property
    def labels(self) -> Mapping[int, str]:
        """The label of every feature that has one. Raises FluxIRError if `label_features` has not been run."""
        rows = read_labels(self.folder, self.stream)
        if rows is None:
            self.folder.check_done("labels")
        return {feature: str(row["text"]) for feature, row in (rows or {}).items()}

    def words(self, feature: int) -> list[tuple[str, float, int]]:
        """The words that lift a feature, the smallest p first: word, PMI [bits], prompts with it and a strong image."""
        self._check(feature)
        if self._words is None:
            self.folder.check_done("labels")
        return (self._words or [])[feature]

    @cached_property
    def _words(self) -> list[list[tuple[str, float, int]]] | None:
        return read_words(self.folder, self.stream)

    def picture(self, image: int) -> Image.Image:
        """The picture of a generation. Raises FluxIRError if none was kept."""
        path = self.folder.picture(image)
        if path is None:
            raise FluxIRError(
                f"there is no picture of image {image} beside {self.folder.captures}",
                hint="collect with --save_images, or capture whole runs",
            )
        return Image.open(path)

    def _check(self, feature: int) -> None:
        if not 0 <= feature < len(self):
            raise FluxIRError(f"features are numbered 0 to {len(self) - 1}: got {feature}", hint="name another")


def flat_columns(folder: FeatureFolder, table: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The table as columns of one value per feature: `step_mean_5` is that of step 5. Histograms are left out."""
    flat: dict[str, NDArray[Any]] = {"feature": np.arange(folder.settings.d_sae)}
    for name, column in table.items():
        if column.ndim == 1 and len(column) == folder.settings.d_sae:
            flat[name] = column
        elif name.startswith("step_"):
            flat |= {f"{name}_{step}": column[:, at] for at, step in enumerate(folder.steps)}
    return flat
