"""Everything the page does, without a page: pictures with and without edits, what each block believed, features, edits.

    studio = open_studio(PlaySettings(model="flux-tiny", sae=("saes/mine",)))
    before = studio.generate("a red circle", seed=7)
    before.picture; studio.beliefs(before, step=3); studio.features(before, token=27, step=5)
    edits = studio.edits([Turned(0, 12, 2.0)], region=[26, 27, 34, 35])
    after = studio.generate("a red circle", seed=7, edits=edits)
    studio.command(after)

A picture is made exactly as `flux-ir capture` makes it, so the command that is shown gives the same bytes. The networks
stay loaded. Next: `page`, which shows all of this.
"""

import hashlib
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.model_settings import PictureSettings, note_trained_on_others
from flux_ir.api.models import load_model
from flux_ir.api.progress import Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file
from flux_ir.lens.readout import velocity_at
from flux_ir.models.architecture import Transformer
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.playing.dictionaries import ActiveFeature, Dictionary, open_dictionaries
from flux_ir.recording.recorder import Recorder, StepContext
from flux_ir.sampling.denoise import clean_estimate, per_sample
from flux_ir.sampling.generate import decode, noise_for, prepare, sample
from flux_ir.sampling.latents import TOKEN_PX
from flux_ir.sampling.schedule import schedule_of
from flux_ir.shapes import Conditioning, PackedLatent
from flux_ir.sites import Site, block_outputs
from flux_ir.steering.apply import Steering, steered
from flux_ir.steering.dose import Made, Picture, Price, Variant, price
from flux_ir.steering.edits import Edit, EditKind, save_edits
from flux_ir.steering.regions import Grid, Region
from flux_ir.steering.table import EDIT, UNSTEERED

MOST_TURNED = 4
"""Features that can be turned together: as many sliders are on the page."""
LARGEST_SEED = 2**63 - 1
PlayKind = Literal["add", "clamp", "ablate"]


@dataclass(frozen=True, kw_only=True)
class PlaySettings(PictureSettings):
    """What a page is asked for; see `flux_ir.play`. What is None is settled by the model or the machine."""

    sae: tuple[str | Path, ...] | None = None
    features: tuple[str | Path, ...] | None = None
    port: int = 7860
    output_dir: str | Path = "play"


class Turned(NamedTuple):
    """A feature that is turned."""

    dictionary: int
    """Which of the page's autoencoders it is of."""
    feature: int
    strength: float
    """In the unit of its autoencoder; ablate takes none."""


@dataclass(frozen=True)
class Generation:
    """One picture, and what was heard while it was made."""

    prompt: str
    seed: int
    num_steps: int
    edits: tuple[Edit, ...]
    steering: Steering
    """The edits as they were done."""
    made: Made
    believed: Mapping[int, Mapping[Site, PackedLatent]]
    """By step and block: the latent of the finished image that the block points at."""
    tokens: Mapping[tuple[int, Site], Tensor]
    """By step and the site of an autoencoder: the image tokens [tokens, d], as the edits left them."""
    notes: tuple[str, ...]
    """What the text encoders cannot make sense of, and edits that change nothing."""
    seconds: float

    @property
    def picture(self) -> Picture:
        """The pixels [height, width, 3]."""
        return self.made.picture


class Studio:
    """One loaded model with its autoencoders. One thing is done at a time, whichever threads ask."""

    def __init__(self, suite: Suite, dictionaries: Sequence[Dictionary], settings: PlaySettings) -> None:
        spec = suite.spec
        self.suite, self.dictionaries, self.settings = suite, list(dictionaries), settings
        picture = settings.settle_picture()
        self.grid, self.num_steps, self.guidance = picture.grid, picture.num_steps, picture.guidance
        self.blocks = block_outputs(spec.flux.depth, spec.flux.depth_single_blocks)
        self.blocks = [site for site in self.blocks if site.stream != "txt"]
        self.folder, self.device = Path(settings.output_dir), suite.placement.transformer
        self._loaded = {dictionary.folder: dictionary.sae for dictionary in dictionaries}
        self._text: tuple[str, TextEmbedding, tuple[str, ...]] | None = None
        self._lock, self._threads = Lock(), torch.get_num_threads()

    # ---- Pictures

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        edits: Sequence[Edit] = (),
        progress: Watch = unwatched,
    ) -> Generation:
        """Sample one picture. Raises FluxIRError for a seed or edits that cannot be, before anything is sampled.

        What `progress` raises ends the work between two steps, and leaves no hook behind.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        check_least({"seed": seed, "num_steps": num_steps})
        if seed > LARGEST_SEED:
            raise FluxIRError(f"--seed must be at most {LARGEST_SEED}: got {seed}", hint="choose a smaller one")
        with self._alone():
            begun = time.perf_counter()
            text, notes = self._embedding(prompt)
            steering = self._steering(edits, num_steps)
            timesteps = schedule_of(self.suite.spec, num_steps, self.grid.tokens)
            latent, sink = self._sample(text, seed, timesteps, steering, progress)
            with phase(progress, "picture"):
                (picture,) = self._decode(latent)
            variant = Variant(EDIT if edits else UNSTEERED, 0.0, seed, text, steering)
            made = Made(variant, latent[0].float().cpu(), picture, None)
            notes += tuple(steering.notes())
            seconds = time.perf_counter() - begun
        return Generation(
            prompt, seed, num_steps, tuple(edits), steering, made, sink.believed, sink.tokens, notes, seconds
        )

    def beliefs(self, generation: Generation, step: int) -> list[tuple[Site, Picture]]:
        """The finished image that each block points at, at one step, by depth (the x0 lens)."""
        latents = generation.believed[_known_step(generation, step)]
        with self._alone():
            return list(zip(latents, self._decode(torch.cat(list(latents.values()))), strict=True))

    def _embedding(self, prompt: str) -> tuple[TextEmbedding, tuple[str, ...]]:
        if self._text is None or self._text[0] != prompt:
            with torch.no_grad(), self.suite.text_encoders() as encoders:
                notes = dict.fromkeys(encoders.t5.notes(prompt) + encoders.clip.notes(prompt))
                said = tuple(f"note: {self.suite.spec.name}: {note}" for note in notes)
                self._text = prompt, encode(encoders.t5, encoders.clip, [prompt]), said
        return self._text[1:]

    def _steering(self, edits: Sequence[Edit], num_steps: int) -> Steering:
        loaded = dict(self._loaded)
        return Steering(edits, self.suite.spec, grid=self.grid, num_steps=num_steps, device=self.device, loaded=loaded)

    @torch.no_grad()
    def _sample(
        self, text: TextEmbedding, seed: int, timesteps: list[float], steering: Steering, progress: Watch
    ) -> tuple[PackedLatent, "_Heard"]:
        width, height, device, dtype = *self.grid, self.device, self.suite.dtype
        inputs = prepare(noise_for([seed], height, width, device, dtype), text, height, width)
        latent, read = inputs.img, {dictionary.site for dictionary in self.dictionaries}
        with self.suite.transformer() as model:
            heard = _Heard(model, timesteps, self.guidance, set(self.blocks), read)
            with steered(model, [steering]), Recorder(model, sorted({*self.blocks, *read}), heard):
                steps = sample(model, inputs, timesteps, self.guidance)
                for step in follow(progress, "sample", steps, total=len(timesteps) - 1):
                    latent = step.after
        return latent, heard

    def _decode(self, latents: PackedLatent) -> Tensor:
        with self.suite.autoencoder() as autoencoder:
            return decode(autoencoder, latents, self.grid.height, self.grid.width, self.suite.dtype)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hooks of two runs must not meet, and sums on another number of threads may have other bits."""
        with self._lock:
            torch.set_num_threads(self._threads)
            yield

    # ---- Features

    def features(self, generation: Generation, *, token: int, step: int, most: int = 8) -> list[ActiveFeature]:
        """The strongest features of one patch at one step, of every autoencoder, each one's strongest first."""
        step = _known_step(generation, step)
        if not 0 <= token < self.grid.tokens:
            raise FluxIRError(
                f"the picture has {self.grid.tokens} patches, from 0 to {self.grid.tokens - 1}: got {token}",
                hint=f"they are numbered along the rows, {TOKEN_PX} px each",
            )
        return [
            feature
            for number, dictionary in enumerate(self.dictionaries)
            for feature in dictionary.active(number, generation.tokens[step, dictionary.site][token], most=most)
        ]

    def activity(self, generation: Generation, dictionary: int, feature: int, step: int) -> Tensor:
        """A feature on every patch [rows, columns], in its own maximum where that is known."""
        chosen = self.dictionaries[dictionary]
        chosen.check_feature(feature)
        tokens = generation.tokens[_known_step(generation, step), chosen.site]
        with torch.no_grad():
            values = chosen.sae.encode(tokens.float())[:, feature].cpu()
        largest = chosen.share(feature, 1.0)
        return (values if largest is None else values * largest).reshape(self.grid.rows, self.grid.columns)

    # ---- Edits

    def edits(
        self,
        turned: Sequence[Turned],
        *,
        kind: PlayKind = "add",
        region: Sequence[int] = (),
        steps: Sequence[int] | None = None,
    ) -> tuple[Edit, ...]:
        """The edits that turn these features: one for each autoencoder. `region` are patches; none: all of them.

        A region becomes a mask, a picture in the studio's folder. Raises FluxIRError for features that there are not.
        """
        check_words(_play_kind, {"kind": kind})
        if not turned:
            raise FluxIRError("no feature is turned", hint="click a patch of the picture, then one of its features")
        if len(turned) > MOST_TURNED:
            raise FluxIRError(
                f"{MOST_TURNED} features can be turned together: got {len(turned)}", hint="leave some of them out"
            )
        if len({one[:2] for one in turned}) < len(turned):
            raise FluxIRError("a feature is turned once: got one twice", hint="leave one of them out")
        mask = self._mask(region) if region else None
        edits = []
        for number, dictionary in enumerate(self.dictionaries):
            mine = [one for one in turned if one.dictionary == number]
            for one in mine:
                dictionary.check_feature(one.feature)
            if mine:
                strengths = () if kind == "ablate" else tuple(one.strength for one in mine)
                edits.append(self._edit(dictionary, [one.feature for one in mine], strengths, kind, mask, steps))
        return tuple(edits)

    def _edit(
        self,
        dictionary: Dictionary,
        features: Sequence[int],
        strengths: Sequence[float],
        kind: EditKind,
        mask: Path | None,
        steps: Sequence[int] | None,
    ) -> Edit:
        edit = Edit(
            kind=kind,
            sae=dictionary.folder,
            feature=tuple(features),
            unit=dictionary.unit,
            region=None if mask is None else Region(image=mask),
            steps=None if steps is None else tuple(steps),
        )
        return replace(edit, strength=tuple(strengths)) if strengths else edit

    def _mask(self, region: Sequence[int]) -> Path:
        """White where the edit holds. Its name follows from its content."""
        tokens = np.zeros(self.grid.tokens, np.uint8)
        tokens[list(region)] = 255
        pixels = tokens.reshape(self.grid.rows, self.grid.columns).repeat(TOKEN_PX, axis=0).repeat(TOKEN_PX, axis=1)
        path = self.folder / f"region_{hashlib.sha256(tokens.tobytes()).hexdigest()[:8]}.png"
        if not path.is_file():
            with complete_file(path) as beside:
                Image.fromarray(pixels).save(beside, format="PNG")
        return path

    def compare(self, after: Generation, before: Generation) -> Price:
        """How far a steered picture is from the unsteered one, inside the region and outside of it."""
        return price(after.made, before.made, after.steering.region_of_image(), self.grid)

    # ---- The same from the command line

    def save(self, edits: Sequence[Edit]) -> Path:
        """Write edits into the studio's folder, as `--edit` takes them. The name follows from the content."""
        text = json.dumps([edit.to_json() for edit in edits], sort_keys=True)
        path = self.folder / f"edit_{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
        if not path.is_file():
            save_edits(edits, path)
        return path

    def command(self, generation: Generation) -> str:
        """What is typed to make the very same picture, where the page was started. The edits' file is written."""
        words = ["capture", *self._picture_flags(generation), "--seed", str(generation.seed)]
        if generation.edits:
            words += ["--edit", str(self.save(generation.edits))]
        return shlex.join(["flux-ir", *words])

    def price_command(self, generation: Generation) -> str | None:
        """What is typed to see what the edit costs, beside random directions; None: `steer` has no such form of it.

        It gives all features one strength.
        """
        strengths = {strength for edit in generation.edits for strength in edit.strengths}
        if len(strengths) != 1:
            return None
        (strength,) = strengths
        words = ["steer", *self._picture_flags(generation), "--seed", str(generation.seed)]
        words += ["--edit", str(self.save(generation.edits)), *_flag_words("strength", f"{strength:g}")]
        return shlex.join(["flux-ir", *words])

    def _picture_flags(self, generation: Generation) -> list[str]:
        settings, spec = self.settings, self.suite.spec
        given: dict[str, Any] = {"model": spec.name, "prompt": generation.prompt}
        given |= {"width": self.grid.width, "height": self.grid.height} if self.grid != _own_grid(self.suite) else {}
        given |= {"num_steps": generation.num_steps} if generation.num_steps != spec.default_steps else {}
        given |= {"guidance": self.guidance} if self.guidance != spec.default_guidance else {}
        given |= {name: value for name, value in settings.choices_made().items() if name != "dtype"}
        if settings.dtype != "auto" or isinstance(settings.model, Suite):
            given["dtype"] = str(self.suite.dtype).removeprefix("torch.")
        return [word for name, value in given.items() for word in _flag_words(name, value)]


class _Heard:
    """A sink that keeps what the page shows: what each block believes in, and the tokens that autoencoders read.

    Whole block outputs would be gigabytes of FLUX.1; the latents they are read out to are a hundredth of that.
    """

    def __init__(
        self, model: Transformer, timesteps: Sequence[float], guidance: float, blocks: set[Site], read: set[Site]
    ) -> None:
        self.model, self.timesteps, self.guidance, self.blocks, self.read = model, timesteps, guidance, blocks, read
        self.believed: dict[int, dict[Site, PackedLatent]] = {}
        self.tokens: dict[tuple[int, Site], Tensor] = {}
        self._context: tuple[StepContext, Conditioning] | None = None

    def begin_step(self, step: int, context: StepContext) -> None:
        model, img = self.model, context.img
        guidance = None if model.guidance_in is None else per_sample(self.guidance, img)
        vec = model.conditioning(per_sample(self.timesteps[step], img), context.y, guidance)
        self._context = context, vec
        self.believed[step] = {}

    def write(self, step: int, site: Site, value: Tensor) -> None:
        assert self._context is not None
        context, vec = self._context
        txt_tokens = context.txt_tokens if site.stream is None else 0
        if site in self.blocks:
            velocity = velocity_at(self.model, value, vec, txt_tokens=txt_tokens)
            self.believed[step][site] = clean_estimate(context.img, velocity, self.timesteps[step])
        if site in self.read:
            self.tokens[step, site] = value[0, txt_tokens:].to(context.img.device, copy=True)


def open_studio(settings: PlaySettings, progress: Watch = unwatched) -> Studio:
    """Check what is asked for, from the cheapest on, then load the model.

    Raises FluxIRError for what a user can mend.
    """
    check_words(PlaySettings, {"dtype": settings.dtype})
    check_least({"num_steps": settings.num_steps})
    spec, grid, device = settings.spec, settings.settle_picture().grid, settings.settle_machine().placement.transformer
    dictionaries = open_dictionaries(settings.sae or (), settings.features or (), spec, grid, device)
    if isinstance(settings.model, Suite):
        suite = settings.model
    else:
        suite = load_model(spec.name, **settings.model_choices(), progress=progress)
    note_trained_on_others({f"the autoencoder {one.folder}": one.sae for one in dictionaries}, suite, progress)
    return Studio(suite, dictionaries, settings)


def _known_step(generation: Generation, step: int) -> int:
    if step not in generation.believed:
        raise FluxIRError(
            f"this picture has the steps 0 to {generation.num_steps - 1}: got {step}", hint="choose another step"
        )
    return step


def _play_kind(kind: PlayKind) -> None:
    """Declares the kinds of edits on the page, for `check_words`."""


def _own_grid(suite: Suite) -> Grid:
    return Grid(suite.spec.default_side_px, suite.spec.default_side_px)


def _flag_words(name: str, value: object) -> list[str]:
    if value is True:
        return [f"--{name}"]
    # A value that starts with a hyphen would be taken for a flag.
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
