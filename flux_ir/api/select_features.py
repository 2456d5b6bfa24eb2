"""Which features deserve a look: coherent and stable ones, those of a word or a region, those that move the output."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flux_ir.activations.blocks import SampledSource
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.captured_model import captured_model, scoring_of
from flux_ir.api.model_settings import ModelSettings
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.collection import weights_digest
from flux_ir.collecting.embeddings import embed_prompts
from flux_ir.errors import FluxIRError, counted
from flux_ir.features.coherence import coherence
from flux_ir.features.contents import Parts, digest_of
from flux_ir.features.contrast import (
    Sides,
    contrast_prompts,
    contrast_region,
    region_mask,
    sides_of,
    step_variance,
)
from flux_ir.features.decoder_view import best_cosine
from flux_ir.features.effect import SIGN_VECTORS, EffectMeter, add_generation, generations_for, why_not_run
from flux_ir.features.embeddings import (
    ClipEmbedder,
    Embedder,
    LatentEmbedder,
    SiteEmbedder,
    clip_digest,
    has_latents,
    make_embeddings,
    read_embeddings,
)
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.selection import Ranked, Selection, make_lists, write_lists
from flux_ir.features.significance import q_values
from flux_ir.models.clip import load_picture_tower, locate_clip, read_preprocessing
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.suite import Suite
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.files.formats import load_any, weights_file
from flux_ir.sites import Stream

MANY_OPERATIONS = 1e14
"""Operations in float64 from which on a note warns: half an hour and more of a CPU."""

Columns = dict[Stream, dict[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class SelectSettings(ModelSettings):
    """What is computed, and how. Raises FluxIRError for numbers out of range."""

    clip: str | None
    embeddings: Literal["site", "latents"]
    permutations: int
    other_sae: Path | None
    contrast: tuple[str, ...] | None
    region: tuple[float, ...] | None
    effect_images: int
    most: int
    examples_each: int
    significance: float
    seed: int
    model: str | None = None
    """None: the one that was captured."""

    def __post_init__(self) -> None:
        check_least(vars(self))
        if not 0 < self.significance < 1:
            raise FluxIRError(f"--significance must be between 0 and 1: got {self.significance}", hint="try 0.05")
        if self.clip is not None and self.embeddings != "site":
            raise FluxIRError("images are compared by one embedding: got --clip and --embeddings", hint="give one")


def select_features(
    features: str | Path | FeatureFolder,
    *,
    clip: str | None = None,
    embeddings: Literal["site", "latents"] = "site",
    permutations: int = 199,
    other_sae: str | Path | None = None,
    contrast: str | Sequence[str] | None = None,
    region: Sequence[float] | None = None,
    effect_images: int = 4,
    most: int = 50,
    examples_each: int = 8,
    significance: float = 0.05,
    seed: int = 0,
    model: str | None = None,
    dtype: DtypeWord = "float32",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    device: str | None = None,
    progress: Watch = unwatched,
) -> dict[Stream, list[Ranked]]:
    """Rank features by what makes them worth a look; columns that exist for these settings are not computed again.

    `features` is the folder that `score_features` left. Always: *coherence*, how alike the images are that a feature is
    active on (the monosemanticity score; z and p against permuted images), by the embeddings of `clip`, a CLIP of
    transformers, or the model's own, its site's mean token or its mean latent; and the variance over steps. With
    `other_sae`, trained with another seed, each feature's best cosine there. With `contrast`, one or two words or .txt
    lists of prompts, how far activations differ between these prompts; with `region` (left, top, right, bottom, from 0
    to 1) between this part of the picture and the rest. On `effect_images` generations, how far the velocity moves with
    a feature: that runs the captured model, or `model`, in `dtype`.

    The columns go to selection.safetensors, lists of at most `most` features to selection.json and into the result. A
    list that was tested has the features whose q (Benjamini-Hochberg) is at most `significance`.

    Raises FluxIRError for what a user can mend.
    """
    check_words(select_features, {"embeddings": embeddings, "dtype": dtype})
    settings = SelectSettings(
        clip=clip,
        embeddings=embeddings,
        permutations=permutations,
        other_sae=None if other_sae is None else Path(other_sae),
        contrast=(contrast,) if isinstance(contrast, str) else None if contrast is None else tuple(contrast),
        region=None if region is None else tuple(region),
        effect_images=effect_images,
        most=most,
        examples_each=examples_each,
        significance=significance,
        seed=seed,
        model=model,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        device=device,
    )
    folder = open_features(features)
    folder.check_done("score")
    return Selecting(folder, settings, progress).run()


class Selecting:
    """One selection: everything asked for is checked first, then computed group by group, each written at once."""

    def __init__(self, folder: FeatureFolder, settings: SelectSettings, progress: Watch) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.selection = Selection(folder)
        self.machine = settings.settle_machine()
        self.device = torch.device(self.machine.placement.transformer)
        self.scoring = scoring_of(folder, self.device, progress)
        self.sides = None if settings.contrast is None else sides_of(folder.images, settings.contrast)
        if settings.region is not None:
            self._check_region(settings.region)
        self.other = None if settings.other_sae is None else self._other(settings.other_sae)

    def run(self) -> dict[Stream, list[Ranked]]:
        """Every group that is asked for, then the lists."""
        folder, settings = self.folder, self.settings
        if folder.settings.images < 2:
            self.progress(Note("note: there is one image, so features cannot be coherent"))
        else:
            self._coherence()
        if len(folder.steps) > 1:
            self._put("steps", {}, lambda stream: {"step_variance": step_variance(self._parts(stream), self.d_sae)})
        if self.other is not None:
            self._stability()
        if self.sides is not None:
            self._contrast(self.sides)
        if settings.region is not None:
            self._region(settings.region)
        if settings.effect_images:
            self._effect()
        return self._lists()

    @property
    def d_sae(self) -> int:
        return self.folder.settings.d_sae

    def _put(self, group: str, settings: dict[str, Any], compute: Callable[[Stream], dict[str, NDArray[Any]]]) -> None:
        """Compute one group of columns for all streams, unless it exists for these settings."""
        if not self.selection.has(group, settings):
            streams = follow(self.progress, group, self.folder.streams, total=len(self.folder.streams))
            self.selection.put(group, settings, {stream: compute(stream) for stream in streams})

    def _parts(self, stream: Stream) -> Parts:
        return lambda: self.folder.scores(stream)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed)

    # Checked before anything is computed

    def _check_region(self, region: Sequence[float]) -> None:
        grids = {row.grid for row in self.folder.images} - {None}
        if "img" not in self.folder.streams or not grids:
            raise FluxIRError(
                f"a region needs image tokens on a grid: {self.folder.path} has none", hint="leave --region out"
            )
        for grid in grids:
            if grid is not None:
                region_mask(region, *grid)

    def _other(self, path: Path) -> SparseAutoencoder:
        other, own = load_any(path), self.scoring.sae.config
        if other.config.d_in != own.d_in:
            raise FluxIRError(
                f"autoencoders can be compared if they take activations of one width: got {own.d_in} and "
                f"{other.config.d_in} of {path}",
                hint="name one that was trained on the same site with another seed",
            )
        if torch.equal(other.W_dec, self.scoring.sae.W_dec.cpu()):
            raise FluxIRError(
                f"{path} is the autoencoder itself, in which every feature is found again",
                hint="name one that was trained with another seed",
            )
        if other.config.site != own.site:
            self.progress(Note(f"note: {path} is of {other.config.site}, and these features of {own.site}"))
        return other

    # Groups

    def _coherence(self) -> None:
        settings = self.settings
        embedder = self._embedder()
        depends_on = {**embedder.described(), "permutations": settings.permutations, "seed": settings.seed}
        if self.selection.has("coherence", depends_on):
            return
        for _ in follow(self.progress, "embed", make_embeddings(self.folder, embedder), total=self.folder.parts):
            pass
        rows = read_embeddings(self.folder, embedder)
        self._note_work(rows.shape[1])

        def compute(stream: Stream) -> dict[str, NDArray[Any]]:
            result = coherence(
                self._parts(stream),
                rows,
                self.d_sae,
                permutations=settings.permutations,
                generator=self._generator(),
                device=self.device,
            )
            return {
                "coherence": result.score.numpy(),
                "coherence_z": result.z.numpy(),
                "coherence_p": result.p.numpy(),
                "coherence_q": q_values(result.p.numpy()),
            }

        self._put("coherence", depends_on, compute)

    def _note_work(self, width: int) -> None:
        """Say so where permutations over embeddings of this width will take long: they are most of the work."""
        scored, settings = self.folder.settings, self.settings
        operations = 2.0 * scored.images * self.d_sae * width * settings.permutations * len(self.folder.streams)
        if self.device.type == "cpu" and operations > MANY_OPERATIONS:
            self.progress(
                Note(
                    f"note: {settings.permutations} permutations of {scored.images} images take {operations:.1g} "
                    "operations, much for a CPU: with --permutations 0 there is no p, and z is what it is"
                )
            )

    def _embedder(self) -> Embedder:
        folder, settings = self.folder, self.settings
        announce = lambda text: self.progress(Note(text))  # noqa: E731
        if settings.clip is not None:
            where = locate_clip(settings.clip, announce=announce)
            tower = load_picture_tower(where, self.device, torch.float32)
            return ClipEmbedder(folder, tower, read_preprocessing(where), clip_digest(where))
        if settings.embeddings == "site":
            return SiteEmbedder(self.scoring, "img" if "img" in folder.streams else folder.streams[0])
        shards = [generation.path for generation in self.scoring.source.generations]
        if has_latents(folder, shards):
            return LatentEmbedder(folder, shards, None)
        with self._model(autoencoder=True, text=False).autoencoder() as autoencoder:
            return LatentEmbedder(folder, shards, autoencoder)

    def _stability(self) -> None:
        settings = self.settings
        assert self.other is not None
        assert settings.other_sae is not None
        depends_on = {"weights": hashlib.sha256(weights_file(settings.other_sae).read_bytes()).hexdigest()}
        if self.selection.has("stability", depends_on):
            return
        cosine, number = best_cosine(self.scoring.sae.W_dec, self.other.W_dec.to(self.device))
        self._put(
            "stability", depends_on, lambda stream: {"stability": cosine.numpy(), "stability_feature": number.numpy()}
        )

    def _contrast(self, sides: Sides) -> None:
        settings = self.settings
        if sides.left_out:
            self.progress(
                Note(f"note: {counted(sides.left_out, 'image')} with both, or without a partner, are left out")
            )

        def compute(stream: Stream) -> dict[str, NDArray[Any]]:
            result = contrast_prompts(
                self._parts(stream),
                sides,
                self.d_sae,
                permutations=settings.permutations,
                generator=self._generator(),
            )
            silent = ~self.folder.table(stream).alive  # not tested: each test would make the q of the others larger
            p = np.where(silent, np.nan, result.p)
            return {
                "contrast": np.where(silent, np.nan, result.score),
                "contrast_difference": np.where(silent, np.nan, result.difference),
                "contrast_p": p,
                "contrast_q": q_values(p),
            }

        depends_on = {"name": sides.name, "sides": digest_of([[*map(list, pair)] for pair in sides.deltas])}
        self._put("contrast", {**depends_on, "permutations": settings.permutations, "seed": settings.seed}, compute)

    def _region(self, region: Sequence[float]) -> None:
        images = self.folder.images

        def mask_of(image: int) -> NDArray[np.bool_] | None:
            grid = images[image].grid
            return None if grid is None else region_mask(region, *grid)

        def compute(stream: Stream) -> dict[str, NDArray[Any]]:
            if stream == "txt":
                return {"region": np.full(self.d_sae, np.nan)}
            return {"region": contrast_region(self._parts(stream), mask_of, self.d_sae)}

        self._put("region", {"region": list(region)}, compute)

    def _effect(self) -> None:
        """The effect on the velocity: one forward and `SIGN_VECTORS` gradients at each step of each generation."""
        folder, settings, source = self.folder, self.settings, self.scoring.source
        if (why := why_not_run(folder, source, settings.model)) is not None:
            self.progress(Note(f"note: {why}, so effects are not measured"))
            return
        assert isinstance(source, SampledSource)
        suite = self._model(autoencoder=False, text=True)
        images = generations_for(folder, settings.effect_images)
        depends_on = {
            "weights": weights_digest(suite.source, autoencoder=False),
            "images": images,
            "sign_vectors": SIGN_VECTORS,
            "dtype": settings.dtype,
            "seed": settings.seed,
        }
        if self.selection.has("effect", depends_on):
            return
        prompts = list(dict.fromkeys(source.sampling(image).prompt for image in images))
        with phase(self.progress, "text"), suite.text_encoders() as encoders:
            embedded = dict(zip(prompts, embed_prompts(encoders, prompts), strict=True))
        suite.free_text_encoders()
        meters = {stream: EffectMeter(self.scoring.sae.W_dec) for stream in folder.streams}
        draw = self._generator()
        with suite.transformer() as model:
            for image in follow(self.progress, "effect", images, total=len(images)):
                text = embedded[source.sampling(image).prompt].text
                add_generation(meters, model, folder, source, image, text, draw)
        columns: Columns = {
            stream: {"effect": meter.everywhere(), "effect_active": meter.where_active()}
            for stream, meter in meters.items()
        }
        self.selection.put("effect", depends_on, columns)

    def _model(self, *, autoencoder: bool, text: bool) -> Suite:
        return captured_model(
            self.folder,
            self.settings,
            self.machine,
            without="--effect_images 0",
            autoencoder=autoencoder,
            text=text,
            progress=self.progress,
        )

    def _lists(self) -> dict[Stream, list[Ranked]]:
        folder, settings = self.folder, self.settings
        depends_on = {
            "most": settings.most,
            "examples_each": settings.examples_each,
            "significance": settings.significance,
        }
        self.selection.write()
        lists = {
            stream: make_lists(
                self.selection,
                stream,
                most=settings.most,
                significance=settings.significance,
                each=settings.examples_each,
            )
            for stream in folder.streams
        }
        write_lists(folder.path, lists, depends_on)
        if settings.permutations:
            self._note_power(lists)
        after = [stage for stage in ("score", "examples") if stage in folder.stages]
        folder.mark_done(
            "select", {"groups": dict(sorted(self.selection.groups.items())), "lists": depends_on}, after=after
        )
        return lists

    def _note_power(self, lists: dict[Stream, list[Ranked]]) -> None:
        """Say so where a tested list is empty for want of permutations, and not of features."""
        least = 1 / (1 + self.settings.permutations)
        for stream, some in lists.items():
            for column in {one.column for one in some if one.q is not None and not one.features}:
                p = self.selection.column(stream, f"{column}_p")
                tested, lowest = int((~np.isnan(p)).sum()), int((p <= least * 1.01).sum())
                if lowest and least * tested / lowest > self.settings.significance:
                    needed = int(tested / (lowest * self.settings.significance))
                    self.progress(
                        Note(
                            f"note: {lowest} of {tested} {stream} features have the smallest p that "
                            f"{self.settings.permutations} permutations can give: {needed} would do for a list"
                        )
                    )
