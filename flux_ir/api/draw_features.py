"""Features as pictures: contact sheets with maps, the neighbours of each in the dictionary, and what each draws."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flux_ir.activations.blocks import SampledSource
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.captured_model import captured_model, scoring_of
from flux_ir.api.model_settings import ModelSettings
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.collection import weights_digest
from flux_ir.collecting.embeddings import embed_prompts
from flux_ir.errors import FluxIRError, nearest
from flux_ir.features.contents import ScorePart, digest_of
from flux_ir.features.decoder_view import Active, active_together, encoder_decoder_cosine, nearest_by_cosine
from flux_ir.features.drawings import UNTOUCHED, Canvas, Studio, draw_missing, is_drawn, token_length
from flux_ir.features.effect import why_not_run
from flux_ir.features.folder import FeatureFolder, open_features, read_tensors, write_tensors
from flux_ir.features.heatmaps import draw_overlay, scale_of, sheet_line
from flux_ir.features.labels import read_labels
from flux_ir.features.scoring import Scoring, half_of
from flux_ir.features.selection import Ranked, Selection, ranked, read_lists
from flux_ir.files import complete_file
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.text import TextEmbedding
from flux_ir.sites import Site, Stream
from flux_ir.visualize.feature_sheet import SheetPicture, draw_feature_sheet
from flux_ir.visualize.heatmap import OPACITY

DECODER = "decoder.safetensors"
SHEETS, DRAWS, OVERLAYS = "sheets", "draws", "overlays"
LINES = 24
"""Features of a sheet; more go to the next."""
TABLE = ("share", "frequency", "images", "max_active")
"""The columns of the table by which features may be chosen, besides the lists of `select_features`."""


class DrawnFeatures(NamedTuple):
    """What was drawn, and where it is."""

    features: list[int]
    sheets: list[Path]
    draws: list[Path]
    """One for each feature, in their order; empty where no model was run."""
    overlays: list[Path]


@dataclass(frozen=True, kw_only=True)
class DrawSettings(ModelSettings):
    """Which features, and how they are drawn. Raises FluxIRError for numbers out of range."""

    numbers: tuple[int, ...] | None
    by: str | None
    top: int
    examples: int
    cell_px: int
    percentile: float
    opacity: float
    smooth: bool
    plain: bool
    overlays: bool
    draws: bool
    strength: float
    batch_size: int
    seed: int
    model: str | None = None
    """None: the one that was captured."""

    def __post_init__(self) -> None:
        check_least(vars(self))
        for name, low, high in (("percentile", 0, 100), ("opacity", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise FluxIRError(
                    f"--{name} must be above {low} and at most {high}: got {getattr(self, name)}", hint="leave it out"
                )
        if self.numbers is not None and self.by is not None:
            raise FluxIRError("features are chosen in one way: got --numbers and --by", hint="give one")


def draw_features(
    features: str | Path | FeatureFolder,
    *,
    numbers: Sequence[int] | None = None,
    by: str | None = None,
    top: int = 24,
    examples: int = 8,
    cell_px: int = 128,
    percentile: float = 100.0,
    opacity: float = OPACITY,
    smooth: bool = False,
    plain: bool = False,
    overlays: bool = False,
    draws: bool = True,
    strength: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    model: str | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    device: str | None = None,
    progress: Watch = unwatched,
) -> DrawnFeatures:
    """Draw features: their strongest pictures with maps over them, their neighbours, and what each draws by itself.

    `features` is the folder that `find_examples` left. Drawn are the `top` features of a list of `select_features`, or
    by a number of the table (share, frequency, images, max_active), as `by` says; None is the list distinct where there
    is one, else share. Or it is the features with these `numbers`.

    sheets/ gets contact sheets with `examples` pictures of each, from stored maps: one scale for each feature, up to
    its largest value or a `percentile` of those above 0; with `overlays` each picture is written by itself too.
    decoder.safetensors gets the neighbours of all features by direction and by activity. With `draws` the captured
    model, or `model`, is run: draws/ gets for each feature what its direction reads out as, and beside it its icon, the
    empty prompt with `strength` x k x the mean activation x the direction in place of what the block adds.

    The model does not draw a picture in draws/ again that is there for the same settings; sheets and overlays are drawn
    each time, since they need no model. Raises FluxIRError for what a user can mend.
    """
    check_words(draw_features, {"dtype": dtype})
    settings = DrawSettings(
        numbers=None if numbers is None else tuple(numbers),
        by=by,
        top=top,
        examples=examples,
        cell_px=cell_px,
        percentile=percentile,
        opacity=opacity,
        smooth=smooth,
        plain=plain,
        overlays=overlays,
        draws=draws,
        strength=strength,
        batch_size=batch_size,
        seed=seed,
        model=model,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        device=device,
    )
    folder = open_features(features)
    for stage in ("score", "examples"):
        folder.check_done(stage)
    return Drawing(folder, settings, progress).run()


class Drawing:
    """One drawing of some features. Which ones is settled before anything is computed."""

    def __init__(self, folder: FeatureFolder, settings: DrawSettings, progress: Watch) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.stream: Stream = "img" if "img" in folder.streams else folder.streams[0]
        self.chosen = choose(folder, self.stream, settings)
        self.machine = settings.settle_machine()
        self.device = torch.device(self.machine.placement.transformer)

    def run(self) -> DrawnFeatures:
        """Neighbours, then what each feature draws, then the sheets, which show both."""
        folder, features = self.folder, self.chosen.features
        scoring = scoring_of(folder, self.device, self.progress)
        self._neighbours(scoring)
        draws = self._draws(scoring)
        sheets, overlays = list[Path](), list[Path]()
        if self._has_pictures():
            sheets = self._sheets(draws)
            overlays = self._overlays() if self.settings.overlays else []
        drawn = [draws[feature] for feature in features if feature in draws]
        after = [stage for stage in ("score", "examples", "select", "labels") if stage in folder.stages]
        folder.mark_done("draw", _recorded(self.settings), after=after)
        return DrawnFeatures(features, sheets, drawn, overlays)

    # Neighbours

    def _neighbours(self, scoring: Scoring) -> None:
        """Write decoder.safetensors, unless it is there for these scores."""
        folder, path = self.folder, self.folder.path / DECODER
        if path.is_file() and read_tensors(path)[1].get("scores") == folder.settings.digest:
            return
        sae = scoring.sae
        columns: dict[str, NDArray[Any]] = {}
        with phase(self.progress, "neighbours"):
            nearest_ones = nearest_by_cosine(sae.W_dec)
            aligned = encoder_decoder_cosine(sae.encoder, sae.W_dec)
            for stream in folder.streams:
                together = active_together(
                    lambda stream=stream: map(_active, folder.scores(stream)),  # type: ignore[misc]
                    sae.config.d_sae,
                    device=self.device,
                )
                columns |= {
                    f"{stream}/nearest": nearest_ones.feature.numpy(),
                    f"{stream}/nearest_cosine": nearest_ones.likeness.numpy(),
                    f"{stream}/together": together.feature.numpy(),
                    f"{stream}/together_jaccard": together.likeness.numpy(),
                    f"{stream}/encoder_decoder_cosine": aligned.numpy(),
                }
        write_tensors(path, columns, {"scores": folder.settings.digest})

    # What each draws

    def _draws(self, scoring: Scoring) -> dict[int, Path]:
        """The picture of each feature, by its number; none where there is no model to run."""
        folder, settings = self.folder, self.settings
        if not settings.draws or not self.chosen.features:
            return {}
        if (why := why_not_run(folder, scoring.source, settings.model)) is not None:
            self.progress(Note(f"note: {why}, so nothing is drawn by it"))
            return {}
        assert isinstance(scoring.source, SampledSource)
        suite = captured_model(folder, settings, self.machine, without="--draws False", progress=self.progress)
        sampling = scoring.source.sampling(0)
        canvas = Canvas(
            width=sampling.width,
            height=sampling.height,
            timesteps=sampling.timesteps,
            guidance=sampling.guidance,
            step=folder.steps[len(folder.steps) // 2],
            seed=settings.seed,
        )
        weights = weights_digest(suite.source, autoencoder=True)
        dtype = str(suite.dtype)
        digest = digest_of(
            [folder.settings.digest, weights, asdict(canvas), settings.strength, settings.batch_size, dtype]
        )
        target = folder.path / DRAWS
        pictures = [target / f"{name}.png" for name in (UNTOUCHED, *self.chosen.features)]
        if not all(is_drawn(path, digest) for path in pictures):
            with phase(self.progress, "text"), suite.text_encoders() as encoders:
                (empty,) = embed_prompts(encoders, [""])
            suite.free_text_encoders()
            with suite.transformer() as flux, suite.autoencoder() as autoencoder:
                studio = self._studio(scoring, flux, autoencoder, canvas, empty.text)
                batches = -(-len(self.chosen.features) // settings.batch_size)
                drawn = draw_missing(studio, target, self.chosen.features, settings.batch_size, digest)
                for _ in follow(self.progress, "draw", drawn, total=batches):
                    pass
        return dict(zip(self.chosen.features, pictures[1:], strict=True))

    def _studio(
        self, scoring: Scoring, model: Transformer, autoencoder: AutoEncoder, canvas: Canvas, empty: TextEmbedding
    ) -> Studio:
        folder, table = self.folder, self.folder.table(self.stream)
        site = half_of(Site.parse(str(folder.settings.site)), self.stream)
        assert site is not None
        active = folder.settings.k or float(table.frequency.sum())  # per token, on average
        amounts = self.settings.strength * active * np.asarray(table.mean_active, np.float64)
        return Studio(
            model=model,
            autoencoder=autoencoder,
            site=site,
            directions=scoring.sae.W_dec.detach(),
            amounts=torch.from_numpy(amounts).float(),
            mean=scoring.sae.b_dec.detach(),
            length=token_length(folder, self.stream),
            canvas=canvas,
            empty=empty,
        )

    # Pictures with maps

    def _has_pictures(self) -> bool:
        """Whether there are pictures to draw maps over; if not, a note says why."""
        folder = self.folder
        if (tokens := self._tokens_without_place()) is not None:
            self.progress(Note(f"note: features of {tokens} have no place in the pictures, so there are no sheets"))
            return False
        if not self.chosen.features:
            self.progress(Note("note: no feature is active on these images, so there are no sheets"))
            return False
        shown = {image for feature in self.chosen.features for image in self._images(feature)}
        if lacking := sum(folder.picture(image) is None for image in shown):
            self.progress(
                Note(
                    f"note: {lacking} of {len(shown)} images to be shown have no picture beside {folder.captures}, so "
                    "there are no sheets: collect with --save_images"
                )
            )
        return bool(shown) and not lacking

    def _tokens_without_place(self) -> str | None:
        """The tokens in words, where it is not known where they lie in the picture: a map of them would mislead.

        The one token of an image that CLIP has seen stands for the whole of it.
        """
        if self.stream == "txt":
            return "text tokens"
        on_grids = all(row.grid is not None for row in self.folder.images)
        return None if on_grids or self.folder.settings.tokens["img"] == 1 else "tokens that lie on no known grid"

    def _images(self, feature: int) -> list[int]:
        """The images a feature is shown by: its own of the list, if the list is made by them, else the strongest."""
        if self.chosen.images is not None:
            return self.chosen.images[self.chosen.features.index(feature)][: self.settings.examples]
        strongest = self.folder.examples(self.stream).top[feature].tolist()
        return [image for image in strongest if image >= 0][: self.settings.examples]

    def _sheets(self, draws: dict[int, Path]) -> list[Path]:
        folder, settings, chosen = self.folder, self.settings, self.chosen
        selection, labels = Selection(folder), read_labels(folder, self.stream) or {}
        name = re.sub(r"[^a-z0-9]+", "-", chosen.name.lower()).strip("-")
        scored = folder.settings
        where = f"{scored.model or 'a model'}, {scored.site or 'an array'}"
        steps = f"step{'s' if len(scored.steps) > 1 else ''} {', '.join(map(str, scored.steps))}"
        scale = "largest value" if settings.percentile == 100 else f"{settings.percentile:g}th percentile above 0"
        about = (
            f"{scored.d_sae:,} features, {scored.images:,} images, {steps}; the strongest images of different prompts; "
            f"colours up to the {scale} of each feature"
        )
        pages = [chosen.features[start : start + LINES] for start in range(0, len(chosen.features), LINES)]
        written = []
        for number, page in enumerate(follow(self.progress, "sheets", pages, total=len(pages)), start=1):
            lines = [
                sheet_line(
                    folder,
                    feature,
                    settings.examples,
                    percentile=settings.percentile,
                    label=f"{labels[feature]['text']} ({labels[feature]['score']:.2f})" if feature in labels else "",
                    selection=selection,
                    images=self._images(feature),
                    more=_panels(draws.get(feature)),
                )
                for feature in page
            ]
            written.append(folder.path / SHEETS / (f"{name}.png" if number == 1 else f"{name}_{number}.png"))
            title = f"{where}: {chosen.name}" + (f" ({number} of {len(pages)})" if len(pages) > 1 else "")
            draw_feature_sheet(
                title,
                about,
                lines,
                written[-1],
                cell_px=settings.cell_px,
                smooth=settings.smooth,
                opacity=settings.opacity,
                plain=settings.plain,
            )
        return written

    def _overlays(self) -> list[Path]:
        """Every example of every feature as a picture of its own, of its own size."""
        folder, settings, written = self.folder, self.settings, list[Path]()
        features = self.chosen.features
        for feature in follow(self.progress, "overlays", features, total=len(features)):
            top = scale_of(folder, feature, settings.percentile)
            for rank, image in enumerate(self._images(feature)):
                picture = draw_overlay(
                    folder, feature, image, top=top, smooth=settings.smooth, opacity=settings.opacity
                )
                written.append(folder.path / OVERLAYS / str(feature) / f"{rank:02d}_{folder.images[image].id}.png")
                encoded = BytesIO()
                picture.save(encoded, format="PNG")
                with complete_file(written[-1]) as beside:
                    beside.write_bytes(encoded.getbuffer())
        return written


def choose(folder: FeatureFolder, stream: Stream, settings: DrawSettings) -> Ranked:
    """The features to draw. Raises FluxIRError for unknown numbers, for an unknown list, and for an empty one."""
    if settings.numbers is not None:
        unknown = [number for number in settings.numbers if not 0 <= number < folder.settings.d_sae]
        if unknown:
            raise FluxIRError(
                f"features are numbered 0 to {folder.settings.d_sae - 1}: got {unknown[0]}", hint="name others"
            )
        return Ranked("chosen", "", list(dict.fromkeys(settings.numbers)), [], None)
    lists = {one.name: one for one in read_lists(folder, stream)}
    by = settings.by or ("distinct" if "distinct" in lists and lists["distinct"].features else "share")
    if by in TABLE:
        table = folder.table(stream)
        values = np.asarray(getattr(table, by), np.float64)
        chosen = ranked(by, by, values, settings.top, chosen=table.alive)
    elif by in lists:
        one = lists[by]
        images = None if one.images is None else one.images[: settings.top]
        chosen = one._replace(features=one.features[: settings.top], images=images)
    else:
        near = nearest(by, [*lists, *TABLE])
        raise FluxIRError(
            f"there is no list {by!r}: there are {', '.join([*lists, *TABLE])}",
            hint=f"did you mean {near!r}?" if near else "flux-ir select-features makes lists",
        )
    if not chosen.features and settings.by is not None:
        raise FluxIRError(
            f"no feature is in the list {by!r}: there is nothing to draw", hint="choose another with --by"
        )
    return chosen


def _active(part: ScorePart) -> Active:
    images, features = (torch.from_numpy(numbers.astype(np.int64)) for numbers in (part.image_of_rows(), part.feature))
    return Active(len(part.images), images, features)


def _panels(path: Path | None) -> list[SheetPicture]:
    """What a feature draws, as cells of the sheet: its file holds one picture, or two side by side."""
    if path is None:
        return []
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
    width, height = whole.size
    words = ["its icon"] if width < 2 * height * 0.99 else ["its direction read out", "its icon"]
    side = width // len(words)
    boxes = [(number * side, 0, (number + 1) * side, height) for number in range(len(words))]
    return [SheetPicture(whole.crop(box), None, word, "") for box, word in zip(boxes, words, strict=True)]


def _recorded(settings: DrawSettings) -> dict[str, Any]:
    """The settings that what is drawn depends on, as JSON has them."""
    return settings.other_choices() | {"dtype": settings.dtype}
