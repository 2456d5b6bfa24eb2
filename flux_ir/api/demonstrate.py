"""Which features do something: each turned down and up beside a random direction, scored, and the failures shown too.

    done = demonstrate("features/mine", number=20)
    done.sheets[0]      all of them by how far they are above their random directions
    done.summary        how many are above it, and how many would be by chance

Every picture is kept as soon as it is made, below `steering` in the folder of features: the same call goes on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from flux_ir.activations.blocks import SampledSource, Sampling
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.captured_model import captured_model, scoring_of
from flux_ir.api.model_settings import ModelSettings, SettledPicture, identity_of_pictures
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.embeddings import embed_prompts
from flux_ir.errors import FluxIRError
from flux_ir.features.effect import why_not_run
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.scoring import Scoring
from flux_ir.files import read_json, versions, write_json
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.sites import Stream
from flux_ir.steering.apply import Steering
from flux_ir.steering.demonstrations import (
    DRAWS,
    FOLDER,
    Demonstration,
    Distance,
    Summary,
    draw_overview,
    draw_strips,
    features_in,
    ranked,
    scene_of,
    symmetric,
    write_numbers,
)
from flux_ir.steering.dose import Made, Painter, Variant, price, random_directions
from flux_ir.steering.edits import Edit
from flux_ir.steering.folder import SteeringFolder
from flux_ir.steering.perceptual import Lpips, find_lpips
from flux_ir.steering.regions import Grid
from flux_ir.steering.table import EDIT, RANDOM, UNSTEERED, Run

Statistic = Literal["frequency", "share", "images", "mean_active", "max_active"]


class Demonstrated(NamedTuple):
    """What was demonstrated, and where it is."""

    folder: Path
    features: list[Demonstration]
    """By how far they are above their random directions."""
    summary: Summary
    sheets: list[Path]
    """All features; more than 24 take several sheets."""
    strips: list[Path]
    """One for each feature, in their order."""
    numbers: Path
    table: Path
    """CSV, a line per feature."""
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class DemonstrateSettings(ModelSettings):
    """Which features, on what, how far. Raises FluxIRError for what contradicts itself."""

    feature: tuple[int, ...]
    by: Statistic
    window: tuple[float, float]
    number: int
    prompt: tuple[str, ...]
    examples: int
    strength: tuple[float, ...]
    controls: int
    seed: int | None
    batch_size: int
    model: str | None = None
    """None: the one that was captured."""

    def __post_init__(self) -> None:
        check_least(vars(self), controls=1, number=1)
        if self.controls > DRAWS:
            raise FluxIRError(f"--controls must be at most {DRAWS}: got {self.controls}", hint="20 are many")
        if not all(prompt.strip() for prompt in self.prompt):
            raise FluxIRError("--prompt is empty", hint="leave it out for the prompts of each feature's own examples")


def demonstrate(
    features: str | Path | FeatureFolder,
    *,
    feature: int | Sequence[int] = (),
    by: Statistic = "frequency",
    window: Sequence[float] = (70.0, 95.0),
    number: int = 20,
    prompt: str | Sequence[str] | None = None,
    examples: int = 2,
    strength: Sequence[float] = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
    controls: int = 1,
    seed: int | None = None,
    batch_size: int = 8,
    model: str | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    device: str | None = None,
    progress: Watch = unwatched,
) -> Demonstrated:
    """Turn features down and up, beside random directions that move every token as far, and score what it does.

    `features` is the folder that `score_features` left. Turned are `number` features, evenly spaced through a `window`
    of percentiles of a number of the table (`by`), or those that `feature` names. Each is added at every `strength`, in
    its own maxima, to the pictures of its `examples` strongest images, from their own noise, or to those of `prompt`,
    one or several. The score is defined in `steering.demonstrations`: by LPIPS where it is installed, else by the
    finished latent. `controls` random directions have the same score; a feature is above them or has failed.

    steering/ in the folder gets a strip and the numbers of each feature, a sheet of all of them, demonstrations.json
    and demonstrations.csv; `explore_features` shows the strips. Pictures that are there are not made again. Raises
    FluxIRError for what a user can mend.
    """
    check_words(demonstrate, {"dtype": dtype, "by": by})
    settings = DemonstrateSettings(
        feature=(feature,) if isinstance(feature, int) else tuple(dict.fromkeys(feature)),
        by=by,
        window=_window(window),
        number=number,
        prompt=(prompt,) if isinstance(prompt, str) else tuple(dict.fromkeys(prompt or ())),
        examples=examples,
        strength=symmetric(strength),
        controls=controls,
        seed=seed,
        batch_size=batch_size,
        model=model,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        device=device,
    )
    folder = open_features(features)
    folder.check_done("score")
    if not settings.prompt:
        folder.check_done("examples")
    return _Demonstrating(folder, settings, progress).run()


def _window(window: Sequence[float]) -> tuple[float, float]:
    if len(window) != 2 or not 0 <= window[0] < window[1] <= 100:
        raise FluxIRError(
            f"--window is two percentiles, the lower one first: got {','.join(f'{one:g}' for one in window)}",
            hint="--window 70,95",
        )
    return float(window[0]), float(window[1])


class _SceneJob(NamedTuple):
    """One feature on one prompt: all its pictures, and where they are kept."""

    feature: int
    sampling: Sampling
    """Of which prompt and seed are those that are asked for."""
    steering: Steering
    folder: SteeringFolder

    @property
    def grid(self) -> Grid:
        """Of its pictures."""
        return Grid(self.sampling.width, self.sampling.height)

    def variants(self, text: TextEmbedding | None, strengths: Sequence[float], controls: int) -> list[Variant]:
        """The unsteered picture, then every strength of the feature, then every strength of each random direction."""

        def variant(row: str, strength: float, steering: Steering | None) -> Variant:
            return Variant(row, strength, self.sampling.seed, text, steering)  # type: ignore[arg-type]  # to be read

        turned = {strength: self.steering.at(strength) for strength in strengths if strength}
        variants = [variant(UNSTEERED, 0.0, None)]
        variants += [variant(EDIT, strength, steering) for strength, steering in turned.items()]
        for number in range(controls):
            along = random_directions(self.steering, DRAWS * self.feature + number)
            variants += [variant(f"{RANDOM}_{number}", s, steering.along(along)) for s, steering in turned.items()]
        return variants


class _Demonstrating:
    """One call. Features, prompts and files are settled before anything is computed."""

    def __init__(self, folder: FeatureFolder, settings: DemonstrateSettings, progress: Watch) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.path = folder.path / FOLDER
        self.stream: Stream = "img" if "img" in folder.streams else folder.streams[0]
        self.notes: list[str] = []
        self.machine = settings.settle_machine()
        self.scoring: Scoring = scoring_of(folder, torch.device(self.machine.placement.transformer), progress)
        if (why := why_not_run(folder, self.scoring.source, settings.model)) is not None:
            raise FluxIRError(
                f"features of {folder.path} cannot be turned: {why}", hint="--model names the model, where it can run"
            )
        self.maxima = self._maxima()
        self.chosen = self._chosen()

    def run(self) -> Demonstrated:
        """The pictures of one feature after the other, its numbers and strips, then what all have in common."""
        folder, settings = self.folder, self.settings
        suite = captured_model(
            folder, settings, self.machine, without="collect with flux-ir collect", progress=self.progress
        )
        scenes = {feature: self._scenes(feature, suite) for feature in self.chosen}
        lpips = self._lpips([one.grid for some in scenes.values() for one in some])
        about = f"{suite.spec.name}, {folder.settings.site}"
        with ExitStack() as stack:
            networks: tuple[Transformer, AutoEncoder] | None = None
            texts: Mapping[str, TextEmbedding] = {}
            if self._missing([one for some in scenes.values() for one in some]):
                texts = self._texts(suite, [one.sampling.prompt for some in scenes.values() for one in some])
                networks = stack.enter_context(suite.transformer()), stack.enter_context(suite.autoencoder())
            found = []
            for feature in follow(self.progress, "features", self.chosen, total=len(self.chosen)):
                for one in self._missing(scenes[feature]):
                    assert networks is not None
                    self._make(one, *networks, texts[one.sampling.prompt], suite.dtype)
                found.append(self._demonstration(feature, scenes[feature], lpips))
                self._keep(found[-1], about)
        found = ranked(found)
        with phase(self.progress, "sheets"):
            sheets = draw_overview(self.path, about, found)
        said = settings.other_choices() | {
            "scores": folder.settings.digest,
            "model": suite.spec.name,
            "dtype": str(suite.dtype),
        }
        numbers, table = write_numbers(self.path, said, found, versions("torch"))
        after = [stage for stage in ("score", "examples") if stage in folder.stages]
        folder.mark_done("demonstrate", said, after=after)
        strips = [self.path / f"{one.feature}.png" for one in found]
        return Demonstrated(self.path, found, Summary.of(found), sheets, strips, numbers, table, self.notes)

    # Which features

    def _maxima(self) -> np.ndarray:
        """The largest activation of each feature: in training, or on the scored images where that is not known."""
        sae, table = self.scoring.sae, self.folder.table(self.stream)
        if sae.max_active is None:
            self._note(
                "note: the autoencoder's folder does not say how strongly its features are active: strengths are in "
                "their maxima on the scored images"
            )
            sae.max_active = torch.from_numpy(np.array(table.max_active, np.float32)).to(sae.W_dec.device)
        return np.asarray(sae.max_active.cpu(), np.float64)

    def _chosen(self) -> list[int]:
        """The features to turn. Those that cannot be turned are noted; raises FluxIRError where none is left."""
        settings, table, d_sae = self.settings, self.folder.table(self.stream), self.folder.settings.d_sae
        has_maximum = self.maxima > 0
        usable = has_maximum & np.asarray(table.alive)
        if not settings.feature:
            chosen = features_in(
                np.asarray(getattr(table, settings.by), np.float64), usable, settings.window, settings.number
            )
            if not usable.all():
                self._note(
                    f"note: {d_sae - usable.sum()} of {d_sae} features are dead, here or in training: the percentiles "
                    "are those of the others"
                )
            if chosen and len(chosen) < settings.number:
                self._note(f"note: the window holds {len(chosen)} features: all of them are turned")
        else:
            if unknown := [feature for feature in settings.feature if not 0 <= feature < d_sae]:
                raise FluxIRError(f"features are numbered 0 to {d_sae - 1}: got {unknown[0]}", hint="name others")
            chosen = []
            for feature in settings.feature:
                if not has_maximum[feature]:
                    self._note(
                        f"note: feature {feature} is left out: it was never active in training, so it has no maximum "
                        "to measure strengths by"
                    )
                elif not usable[feature] and not settings.prompt:
                    self._note(
                        f"note: feature {feature} is left out: it is dead on these images, so it has no prompts of "
                        "its own; --prompt names some"
                    )
                else:
                    chosen.append(feature)
        if not chosen:
            raise FluxIRError("there is no feature to turn: all that were asked for are dead", hint="name others")
        return chosen

    # On what

    def _scenes(self, feature: int, suite: Suite) -> list[_SceneJob]:
        source, settings = self.scoring.source, self.settings
        assert isinstance(source, SampledSource)  # `why_not_run` has looked
        if settings.prompt:
            first = source.sampling(0)
            samplings = [first._replace(prompt=prompt, seed=settings.seed or 0) for prompt in settings.prompt]
        else:
            strongest = self.folder.examples(self.stream).top[feature].tolist()
            images = [image for image in strongest if image >= 0][: settings.examples]
            samplings = [source.sampling(image) for image in images]
            if settings.seed is not None:
                samplings = [sampling._replace(seed=settings.seed) for sampling in samplings]
        return [self._scene(feature, sampling, suite) for sampling in samplings]

    def _scene(self, feature: int, sampling: Sampling, suite: Suite) -> _SceneJob:
        folder, sae = self.folder, self.scoring.sae
        edit = Edit(sae=folder.sae, feature=feature, sites=folder.settings.site if sae.config.site is None else None)
        picture = SettledPicture(Grid(sampling.width, sampling.height), list(sampling.timesteps), sampling.guidance)
        steering = Steering(
            [edit],
            suite.spec,
            grid=picture.grid,
            num_steps=picture.num_steps,
            device=self.machine.placement.transformer,
            loaded={str(folder.sae): sae},
        )
        identity = {
            **identity_of_pictures(suite, picture),
            "prompt": sampling.prompt,
            "edits": steering.described(with_strength=False),
            "maximum": float(self.maxima[feature]),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        kept = SteeringFolder(self.path / "pictures" / f"{feature}_{digest}", identity, [edit])
        return _SceneJob(feature, sampling, steering, kept)

    def _texts(self, suite: Suite, prompts: Sequence[str]) -> dict[str, TextEmbedding]:
        distinct = list(dict.fromkeys(prompts))
        with phase(self.progress, "text"), suite.text_encoders() as encoders:
            embedded = embed_prompts(encoders, distinct)
        suite.free_text_encoders()
        return {prompt: one.text for prompt, one in zip(distinct, embedded, strict=True)}

    # The pictures

    def _variants(self, scene: _SceneJob, text: TextEmbedding | None = None) -> list[Variant]:
        return scene.variants(text, self.settings.strength, self.settings.controls)

    def _missing(self, scenes: Sequence[_SceneJob]) -> list[_SceneJob]:
        return [one for one in scenes if not all(map(one.folder.has, self._variants(one)))]

    def _make(
        self, scene: _SceneJob, flux: Transformer, autoencoder: AutoEncoder, text: TextEmbedding, dtype: torch.dtype
    ) -> None:
        """Makes what is missing of one scene, and keeps each picture as soon as it is made."""
        sampling = scene.sampling
        painter = Painter(
            flux,
            autoencoder,
            scene.grid,
            sampling.timesteps,
            sampling.guidance,
            dtype,
            meter=None,
            batch=self.settings.batch_size,
        )
        first, *others = self._variants(scene, text)
        missing = [variant for variant in others if not scene.folder.has(variant)]
        unsteered: Made | None = None
        for made in painter.make([first, *missing]):
            variant = made.variant
            unsteered = made if unsteered is None else unsteered
            paid = None if variant.row == UNSTEERED else price(made, unsteered, None, scene.grid)
            run = Run(
                variant.row, variant.strength, variant.seed, activation=None, carried=None, moved=None, price=paid
            )
            scene.folder.keep(run, made)

    def _lpips(self, grids: Sequence[Grid]) -> Lpips | None:
        """One distance for all: LPIPS where the user has it, and the smallest picture is large enough."""
        lpips = find_lpips(self.machine.placement.transformer, min(grids, key=min))
        if isinstance(lpips, str):
            self._note(lpips)
            return None
        return lpips

    def _demonstration(self, feature: int, scenes: Sequence[_SceneJob], lpips: Lpips | None) -> Demonstration:
        """The numbers of one feature whose pictures are all there."""
        strengths, controls = self.settings.strength, self.settings.controls
        distance: Distance = "latent" if lpips is None else "lpips"
        found = []
        for one in scenes:
            variants = self._variants(one)
            if lpips is None:
                runs = [one.folder.read(variant) for variant in variants]
            else:
                runs = list(one.folder.add_lpips(variants, lpips, None, one.grid))
            pictures = one.folder.path.relative_to(self.path).as_posix()
            found.append(scene_of(one.sampling.prompt, pictures, runs, strengths, controls, distance))
        return Demonstration(feature, float(self.maxima[feature]), strengths, distance, tuple(found))

    def _keep(self, one: Demonstration, about: str) -> None:
        """Draw its strips, then write its numbers: where these are there already, so are those."""
        numbers = self.path / f"{one.feature}.json"
        said = json.loads(json.dumps(one.to_json()))
        if not numbers.is_file() or read_json(numbers) != said:
            draw_strips(self.path, about, one)
            write_json(numbers, said)

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self.progress(Note(line))
