"""Two models on the same prompts and noise: how far apart every block's output is at every step.

The second model is fed in three ways, because differences accumulate. Free-running, each follows its own trajectory.
Forced, the second is evaluated at the first one's states. Block alone, each of its blocks is given what the
first one's block was given. Next: `model_comparison`, the folder that is left.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.capture import DEFAULT_PROMPT
from flux_ir.api.compare_captures import compare_captures
from flux_ir.api.compared_runs import ComparedRuns
from flux_ir.api.lens import lens_weights
from flux_ir.api.model_comparison import (
    ITSELF,
    SEED,
    STATE,
    VELOCITY,
    ComparedModels,
    ComparisonFolder,
    Generated,
    check_blocks,
)
from flux_ir.api.model_settings import PictureSettings, identity_of_pictures
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.prompts import read_prompts
from flux_ir.errors import FluxIRError
from flux_ir.features.contents import digest_of
from flux_ir.files import versions
from flux_ir.lens.measures import json_number, psnr_db, relative_distance
from flux_ir.models.architecture import Transformer
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.placement import OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.sampling.denoise import Step
from flux_ir.sampling.generate import decode, noise_for, prepare
from flux_ir.shapes import Tokens
from flux_ir.studies.likeness import Table, measure
from flux_ir.studies.paired_runs import REFERENCE, PairedRun, PairedRuns

Mode = Literal["free", "forced", "block"]
MODES: tuple[Mode, ...] = ("free", "forced", "block")
OTHER_NOISE = 1_000_003
"""From the seed of a generation to that of its yardstick: far from the seeds that people try."""
NAME_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class CompareModelsSettings(PictureSettings):
    """What is compared; see `compare_models`."""

    prompt: str | None = None
    prompts: str | Path | None = None
    max_prompts: int | None = None
    repeats: int = 1
    seed: int = 0
    other_model: str | Suite | None = None
    other_checkpoint: str | Path | None = None
    other_lora: str | Path | Sequence[str | Path] | None = None
    other_lora_strength: float | Sequence[float] | None = None
    other_quantize: Method | None = None
    other_guidance: float | None = None
    captures: str | Path | None = None
    other_captures: str | Path | None = None
    modes: Sequence[Mode] = MODES
    cka_tokens: int = 1024
    lens_pictures: bool = True
    name: str | None = None
    output_dir: str | Path = "model_comparisons"

    def other(self) -> "CompareModelsSettings":
        """The same settings for the second model: what is not named of it is as for the first, if it has its name."""
        alike = self.other_model is None
        loras = self.other_lora, self.other_lora_strength
        if loras == (None, None) and alike:
            loras = self.lora, self.lora_strength
        elif self.other_lora is None and alike:
            loras = self.lora, self.other_lora_strength
        return replace(
            self,
            model=self.model if self.other_model is None else self.other_model,
            checkpoint=self.other_checkpoint or (self.checkpoint if alike else None),
            lora=loras[0],
            lora_strength=loras[1],
            quantize=self.other_quantize or (self.quantize if alike else None),
        )


def compare_models(
    prompt: str | None = None,
    *,
    prompts: str | Path | None = None,
    max_prompts: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    model: str | Suite = "flux-schnell",
    other_model: str | Suite | None = None,
    other_checkpoint: str | Path | None = None,
    other_lora: str | Path | Sequence[str | Path] | None = None,
    other_lora_strength: float | Sequence[float] | None = None,
    other_quantize: Method | None = None,
    other_guidance: float | None = None,
    captures: str | Path | None = None,
    other_captures: str | Path | None = None,
    modes: Sequence[Mode] = MODES,
    cka_tokens: int = 1024,
    lens_pictures: bool = True,
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    device: str | None = None,
    offload: OffloadWord = False,
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    quantize: Method | None = None,
    name: str | None = None,
    output_dir: str | Path = "model_comparisons",
    progress: Watch = unwatched,
) -> ComparedModels:
    """How far apart two models are, by block and step, on the same prompts and noise.

    The first model is named as for `capture`; `other_*` say in what the second differs: another model or checkpoint,
    LoRAs, quantisation, guidance. What is not named is as for the first, but with `other_model` its weights are its
    own. Text, schedule and autoencoder are the first one's for both. `prompt` is one, `prompts` a file of them; each
    is drawn `repeats` times, from the seeds that follow `seed`.

    `modes`: free, each model follows its own trajectory; forced, the second is evaluated at the first one's states;
    block, each of its blocks is given what the first one's was given. Beside them stands `seed`, the first model from
    other noise: what two pictures of one prompt differ in. Of the image and of the text tokens of each block there are
    the relative distance, the cosine, and debiased linear CKA on `cka_tokens` tokens per picture (0: none); of the
    finished pictures PSNR and latent distance. With `lens_pictures` both runs of the first generation are captured and
    decoded, at eight steps or fewer, into runs/.

    Or `captures` and `other_captures` are given, each a run, a folder of runs or a collection: what they hold of the
    same prompts and noise is compared, free-running, and no model is run.

    Everything lies in `output_dir`/`name`; the same call goes on where it stopped, and more prompts are added to those
    that are there. Memory is that of both models and of one step's outputs. Raises FluxIRError for what a user can
    mend: models whose blocks do not match, captures of other prompts.
    """
    settings = CompareModelsSettings(
        prompt=prompt,
        prompts=prompts,
        max_prompts=max_prompts,
        repeats=repeats,
        seed=seed,
        model=model,
        other_model=other_model,
        other_checkpoint=other_checkpoint,
        other_lora=other_lora,
        other_lora_strength=other_lora_strength,
        other_quantize=other_quantize,
        other_guidance=other_guidance,
        captures=captures,
        other_captures=other_captures,
        modes=tuple(modes),
        cka_tokens=cka_tokens,
        lens_pictures=lens_pictures,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        device=device,
        offload=offload,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        quantize=quantize,
        name=name,
        output_dir=output_dir,
    )
    return run_model_comparison(settings, progress)


def run_model_comparison(settings: CompareModelsSettings, progress: Watch = unwatched) -> ComparedModels:
    """The same, with its settings in one object."""
    check_words(CompareModelsSettings, vars(settings))
    check_least(vars(settings))
    if (settings.captures is None) != (settings.other_captures is None):
        raise FluxIRError(
            "--captures and --other_captures go together: got one of them",
            hint="name two runs, folders of runs or collections; or leave both out, and name two models",
        )
    if settings.captures is not None and settings.other_captures is not None:
        return compare_captures(
            settings.captures,
            settings.other_captures,
            cka_tokens=settings.cka_tokens,
            name=settings.name,
            output_dir=Path(settings.output_dir),
            progress=progress,
        )
    if not settings.modes:
        raise FluxIRError("models are compared in one mode or more: got none", hint="leave --modes out for all")
    return _Comparing(settings, progress).run()


class _Comparing:
    """One comparison of two models: all questions are answered before a weight is read."""

    def __init__(self, settings: CompareModelsSettings, progress: Watch) -> None:
        self.settings, self.progress = settings, progress
        others = settings.other()
        spec, other_spec = settings.spec, others.spec
        check_blocks(spec.name, spec.flux, other_spec.name, other_spec.flux)
        if settings.other_guidance is not None and not other_spec.flux.guidance_embed:
            raise FluxIRError(
                f"--other_guidance is for models that are told a guidance strength: {other_spec.name} is not",
                hint="leave it out, or compare flux-dev",
            )
        self.picture = settings.settle_picture()
        self.other_guidance = self.picture.guidance if settings.other_guidance is None else settings.other_guidance
        self.generations = list(generations(settings))
        machine, other_machine = settings.settle_machine(), others.settle_machine()
        if machine.compute.dtype != other_machine.compute.dtype:
            raise FluxIRError(
                f"both models compute in one dtype: got {machine.compute.name} and {other_machine.compute.name}",
                hint="load both with the same --dtype",
            )
        self.first = settings.suite(machine, progress)
        self.same_weights = others.choices_made() == settings.choices_made() and others.model == settings.model
        self.other = self.first
        if not self.same_weights:
            self.other = others.suite(other_machine, progress, text=False, autoencoder=False)
        for note in (f"{spec.name} and {other_spec.name} on {machine}", *machine.notes()):
            progress(Note(note))
        if self.same_weights and self.other_guidance == self.picture.guidance:
            progress(Note("note: both models are the same one: every distance should be 0"))
        identity = self._identity()
        default = f"{spec.name}-{other_spec.name}-{digest_of([identity])[:NAME_DIGITS]}"
        self.folder = ComparisonFolder(Path(settings.output_dir) / (settings.name or default), identity)
        self.folder.check()

    def run(self) -> ComparedModels:
        """Every generation that is not there yet, then the whole."""
        todo = self.folder.missing(self.generations)
        if len(todo) < len(self.generations):
            self.progress(Note(f"{len(self.generations) - len(todo)} generations were measured before"))
        if todo:
            texts = self._texts(todo)
            with ExitStack() as stack:
                networks = [stack.enter_context(suite.transformer()) for suite in (self.first, self.other)]
                total = len(todo) * self.picture.num_steps
                for _ in follow(self.progress, "sample", self._measured(todo, texts, networks), total=total):
                    pass
        with phase(self.progress, "files"):
            return self.folder.finish(self.generations, range(self.picture.num_steps))

    def _identity(self) -> dict[str, Any]:
        """What every number depends on, but prompts and noise."""
        guidances = self.picture.guidance, self.other_guidance
        sides = [
            {
                "model": suite.spec.name,
                "weights": lens_weights(suite.source),
                "checkpoint": None if given is None else str(given),
                "loras": [lora.to_json() for lora in suite.source.loras],
                "quantize": suite.source.quantize,
                "guidance": guidance if suite.spec.flux.guidance_embed else None,
            }
            for suite, guidance, given in zip(
                (self.first, self.other),
                guidances,
                (self.settings.checkpoint, self.settings.other().checkpoint),
                strict=True,
            )
        ]
        made = identity_of_pictures(self.first, self.picture)
        return {
            "first": sides[0],
            "other": sides[1],
            "modes": [mode for mode in MODES if mode in self.settings.modes],
            "cka_tokens": self.settings.cka_tokens,
            **{name: made[name] for name in ("size", "timesteps", "dtype", "device")},
            "text_and_autoencoder": made["weights"],
            "versions": versions("torch"),
        }

    def _texts(self, todo: Sequence[Generated]) -> dict[str, TextEmbedding]:
        """What the first model's text encoders make of each prompt, in host memory; both models are told this."""
        prompts = list(dict.fromkeys(one.prompt for one in todo))
        texts = {}
        with self.first.text_encoders() as encoders, torch.no_grad():
            for prompt in follow(self.progress, "text", prompts, total=len(prompts)):
                for note in dict.fromkeys(encoders.t5.notes(prompt) + encoders.clip.notes(prompt)):
                    self.progress(Note(f"note: {self.first.spec.name}: {note}"))
                text = encode(encoders.t5, encoders.clip, [prompt])
                texts[prompt] = TextEmbedding(*(part.cpu() for part in text))
        return texts

    def _measured(
        self, todo: Sequence[Generated], texts: Mapping[str, TextEmbedding], networks: Sequence[Transformer]
    ) -> Iterator[Mapping[str, Step]]:
        """Every step of every generation; each generation is kept when it is done."""
        for one in todo:
            table, last = Table(), None
            lens = self._lens(one, texts[one.prompt], networks)
            for last in self._steps(one, texts[one.prompt], networks, table, lens):
                if lens is not None:
                    with self.first.autoencoder() as autoencoder:
                        lens.draw(autoencoder, last)
                yield last
            assert last is not None
            pictures = self._pictures(last)
            if lens is not None:
                with self.first.autoencoder() as autoencoder:
                    lens.finish(autoencoder, last, table)
            self.folder.keep(one, table, pictures)

    def _lens(self, one: Generated, text: TextEmbedding, networks: Sequence[Transformer]) -> ComparedRuns | None:
        """What decodes the blocks of both models, for the first generation."""
        follows = next((mode for mode in ("free", "forced") if mode in self.settings.modes), None)
        if not self.settings.lens_pictures or one != self.generations[0] or follows is None:
            return None
        sides = [self.folder.identity["first"], self.folder.identity["other"]]
        guidances = self.picture.guidance, self.other_guidance
        return ComparedRuns(self.folder, one, follows, networks, sides, guidances, text, self.picture)

    def _steps(
        self,
        one: Generated,
        text: TextEmbedding,
        networks: Sequence[Transformer],
        table: Table,
        lens: ComparedRuns | None,
    ) -> Iterator[Mapping[str, Step]]:
        """The steps of all runs of one generation; what they put out is measured into the table."""
        first, other = networks
        (width, height), modes, guidance = self.picture.grid, self.settings.modes, self.picture.guidance
        assert one.other_seed is not None
        inputs, other_noise = (
            prepare(
                noise_for([seed], height, width, self.first.placement.transformer, self.first.dtype),
                text,
                height,
                width,
            )
            for seed in (one.seed, one.other_seed)
        )
        runs = [
            PairedRun(mode, other, inputs, self.other_guidance, forced=mode == "forced")
            for mode in ("free", "forced")
            if mode in modes
        ]
        runs.append(PairedRun(SEED, first, other_noise, guidance))
        if one == self.generations[0]:
            runs.append(PairedRun(ITSELF, first, inputs, guidance, forced=True))
        txt_tokens, cka_tokens = text.txt.shape[1], self.settings.cka_tokens

        def take(run: str, block: str, a: Tokens, b: Tokens) -> None:
            row = block.replace("_blocks", "")
            table.add(run, "img", row, measure(a[0, txt_tokens:], b[0, txt_tokens:], cka_tokens))
            table.add(run, "txt", row, measure(a[0, :txt_tokens], b[0, :txt_tokens], cka_tokens))
            if lens is not None:
                lens.take(run, block, a[:, txt_tokens:], b[:, txt_tokens:])

        alone = other if "block" in modes else None
        paired = PairedRuns(first, inputs, self.picture.timesteps, guidance, runs, take, alone=alone)
        for done in paired.steps():
            for run in runs:
                a, b = done[REFERENCE], done[run.name]
                table.add(run.name, "img", STATE, measure(a.before[0], b.before[0], cka_tokens))
                table.add(run.name, "img", VELOCITY, measure(a.velocity[0], b.velocity[0], cka_tokens))
            yield done

    def _pictures(self, last: Mapping[str, Step]) -> dict[str, Any]:
        """How far the finished pictures of the runs with trajectories of their own are from the reference's."""
        (width, height), found = self.picture.grid, {}
        reference = last[REFERENCE].after
        names = [name for name in ("free", SEED) if name in last]
        with self.first.autoencoder() as autoencoder:
            latents = torch.cat([reference, *(last[name].after for name in names)])
            pixels = decode(autoencoder, latents, height, width, self.first.dtype)
        for number, name in enumerate(names, start=1):
            likeness = psnr_db(pixels[number : number + 1], pixels[:1])
            found[name] = {
                "psnr_db": json_number(likeness),
                "equal": likeness is None,
                "latent_distance": relative_distance(last[name].after, reference),
            }
        return found


def generations(settings: CompareModelsSettings) -> Iterator[Generated]:
    """What both models are shown: every prompt from every noise, and the noise of the yardstick."""
    if settings.prompts is not None and settings.prompt is not None:
        raise FluxIRError("--prompt is one prompt and --prompts a file of them: got both", hint="leave one out")
    prompts = [DEFAULT_PROMPT if settings.prompt is None else settings.prompt]
    if settings.prompts is not None:
        prompts = list(dict.fromkeys(read_prompts(Path(settings.prompts))))[: settings.max_prompts]
    for prompt in prompts:
        for seed in range(settings.seed, settings.seed + settings.repeats):
            yield Generated(prompt, seed, (seed + OTHER_NOISE) % 2**63)
