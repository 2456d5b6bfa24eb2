"""Attention maps of one picture: all of `attention_maps`, from the prompt to the contact sheet.

Maps of a step are written when the step is done, so memory does not grow with the steps.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.capture import DEFAULT_PROMPT, SEEDS
from flux_ir.api.map_files import MapSheet, Means
from flux_ir.api.model_settings import BegunPictureSettings, Machine, SettledPicture, provenance_of
from flux_ir.api.progress import Begun, Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.explorer.map_page import write_map_page
from flux_ir.files import complete_file, versions, write_json
from flux_ir.layout import new_generation_id
from flux_ir.maps.attention import AttentionMapper, MapTargets, attention_sites, block_names
from flux_ir.maps.concepts import ConceptMapper, default_blocks
from flux_ir.maps.words import PromptTokens, prompt_tokens
from flux_ir.models.architecture import Transformer
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.sampling.generate import check_size, check_steps, decode, noise_for, prepare, sample
from flux_ir.sampling.generate import encode as encode_picture
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import TOKEN_PX
from flux_ir.sampling.pictures import GivenPicture, PictureGiven, read_given
from flux_ir.shapes import PackedLatent


@dataclass(frozen=True, kw_only=True)
class MapSettings(BegunPictureSettings):
    """What maps are asked for; see `attention_maps`."""

    prompt: str | None = None
    words: str | Sequence[str] | None = None
    patches: Sequence[int] = ()
    blocks: str | Sequence[str] | None = None
    steps: Iterable[int] | None = None
    heads: bool = False
    concepts: str | Sequence[str] | None = None
    concept_blocks: Sequence[int] | None = None
    image: PictureGiven | None = None
    seed: int | None = None
    output_dir: str | Path = "maps"

    def to_json(self) -> dict[str, Any]:
        """The settings by name, as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | self.given_as_json()
        values["model"] = self.spec.name
        if isinstance(self.image, Image.Image | Tensor):
            values["image"] = "given"
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


class AttentionMaps(NamedTuple):
    """What `attention_maps` has written, and the means over the steps."""

    folder: Path
    picture: Path
    """The picture that was sampled, or the one that was given, in the size it was looked at."""
    sheet: Path
    """Words down, groups of blocks across: means over the steps, over the picture."""
    page: Path
    """maps.html: every map of every word over the picture, by block and step, in a browser."""
    numbers: Path
    """maps.json: words and their tokens, and how attention is divided among groups of tokens."""
    steps: list[Path]
    """A file of maps for each step: `double.3/to_words` is [words, rows, columns], and so on."""
    words: list[str]
    mean: dict[str, dict[str, Tensor]]
    """Means over steps, heads and the blocks of a group: `mean["all"]["to_words"]` is [words, rows, columns]."""
    mass: dict[str, dict[str, float]]
    """The image's attention on each group of tokens, by block; "all" is the mean over blocks."""
    concepts: list[str]
    concept_map: Tensor | None
    """[concepts, rows, columns]: mean over steps and blocks of the softmax over the concepts; None: none were named."""
    concept_sheet: Path | None
    """Concepts across: the same over the picture, all by one scale."""


class MapJob(NamedTuple):
    """The work with every open question answered that can be without the tokenizer."""

    settings: MapSettings
    prompt: str
    machine: Machine
    picture: SettledPicture
    image: GivenPicture | None
    """A picture that is looked at as it is, in the size of the run; None: one is sampled."""
    image_given: str | None
    """Its size as it was given, where that is another."""
    seed: int
    blocks: list[str]
    kept_steps: list[int]
    concepts: list[str]
    concept_blocks: list[int]

    def image_notes(self) -> list[str]:
        """What is worth knowing of a picture that is looked at."""
        if self.image is None:
            return []
        times = ", ".join(f"{self.picture.timesteps[step]:.3g}" for step in self.kept_steps)
        notes = [f"a picture of {self.image.size} is looked at with noise of t {times}"]
        if self.image_given is not None:
            notes.append(f"note: it was scaled from {self.image_given} (--width and --height ask for another size)")
        return notes


class Embedded(NamedTuple):
    """What the text encoders made of a prompt and of the concepts."""

    tokens: PromptTokens
    text: TextEmbedding
    concepts: Tensor | None
    """[1, concepts, d]: the first token of each, encoded alone."""


def attention_maps(
    prompt: str | None = None,
    *,
    words: str | Sequence[str] | None = None,
    patches: Sequence[int] = (),
    blocks: str | Sequence[str] | None = None,
    steps: Iterable[int] | None = None,
    heads: bool = False,
    concepts: str | Sequence[str] | None = None,
    concept_blocks: Sequence[int] | None = None,
    image: PictureGiven | None = None,
    model: str | Suite = "flux-schnell",
    width: int | None = None,
    height: int | None = None,
    seed: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    init_image: PictureGiven | None = None,
    strength: float | None = None,
    reference_image: PictureGiven | None = None,
    keep_reference_size: bool = False,
    device: str | None = None,
    multi_gpu: MultiGpuWord = False,
    offload: OffloadWord = False,
    compile: bool = False,
    attention: AttentionWord = "auto",
    vram_gb: float | None = None,
    memory_gb: float | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_strength: float | Sequence[float] | None = None,
    quantize: Method | None = None,
    output_dir: str | Path = "maps",
    progress: Watch = unwatched,
) -> AttentionMaps:
    """Sample one picture and say, in every block at every step, how much image and words look at each other.

    `words` are words or phrases of the prompt (None: every word); one that comes again has a map for each place,
    `red#1` and `red#2`. Of each there are three maps: what share of its attention the image gives to the word, how much
    it is given for that (the norm of the value-weighted sum), and where the word itself looks. `patches` are image
    tokens, counted row by row from 0, whose attention over the image is mapped as well. `blocks` are names or patterns
    (`double.3`, `single.*`), None all of them; `heads` keeps the maps of every head apart, else they are averaged. The
    probabilities are those of the network's own softmax, after norm and rotation, and the picture has the bits it has
    without maps.

    `concepts` are any words, in the prompt or not: maps of ConceptAttention say for each image token which of them it
    is most like, in `concept_blocks`, numbers of double blocks (None: the last fifth). They are a choice among those
    that are named, so name what else there is (`background`).

    `image` is a real picture, which is looked at instead of one that is sampled: it is encoded, and at each of `steps`
    (None: the second half of the schedule) mixed with as much noise as a sampled one has there, (1 - t) picture + t
    noise, for one forward of the network. It is scaled to `width` and `height`; None: to the multiples of 16 px nearest
    to its own size, or, where it has more pixels than the model's pictures have, to their number of them. `prompt` is
    then what the picture shows (None: nothing is said of it).

    All other arguments are those of `capture`. Everything goes into a new folder below `output_dir`. Raises FluxIRError
    for what a user can mend: a word that is not in the prompt, a block or a patch that is not there.
    """
    settings = MapSettings(
        prompt=prompt,
        words=words,
        patches=patches,
        blocks=blocks,
        steps=steps,
        heads=heads,
        concepts=concepts,
        concept_blocks=concept_blocks,
        image=image,
        model=model,
        width=width,
        height=height,
        seed=seed,
        num_steps=num_steps,
        guidance=guidance,
        init_image=init_image,
        strength=strength,
        reference_image=reference_image,
        keep_reference_size=keep_reference_size,
        device=device,
        multi_gpu=multi_gpu,
        offload=offload,
        compile=compile,
        attention=attention,
        vram_gb=vram_gb,
        memory_gb=memory_gb,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
        lora=lora,
        lora_strength=lora_strength,
        quantize=quantize,
        output_dir=output_dir,
    )
    return run_maps(settings, progress)


def run_maps(settings: MapSettings, progress: Watch = unwatched) -> AttentionMaps:
    """One picture and its maps, as `attention_maps` describes them, with the settings in one object."""
    job = settle(settings)
    suite = settings.suite(job.machine, progress)
    generation_id = new_generation_id()
    folder = Path(settings.output_dir) / generation_id
    notes = job.machine.notes(attention_sites(job.blocks))
    for note in (f"{suite.spec.name} on {job.machine}, seed {job.seed}", *notes):
        progress(Note(note))
    for note in (*job.picture.given.notes(job.picture.timesteps), *job.image_notes()):
        progress(Note(note))
    embedded = embed(suite, job, progress)
    tokens = embedded.tokens
    targets = MapTargets(tokens.choose(_names(settings.words)), tuple(settings.patches), tokens.end, tokens.padding)
    progress(Begun(generation_id))
    for part in follow(progress, "load", suite.parts, total=len(suite.parts)):
        suite.load_part(part)
    means = Means(
        folder,
        job.picture.grid,
        job.kept_steps,
        heads=settings.heads,
        concept_blocks=len(job.concept_blocks),
    )
    latent = walk(suite, job, embedded, targets, means, progress)
    with phase(progress, "picture"), suite.autoencoder() as autoencoder:
        grid = job.picture.grid
        pixels = decode(autoencoder, latent, grid.height, grid.width, suite.dtype)
    if job.image is not None:
        pixels = job.image.pixels
    result = AttentionMaps(
        folder=folder,
        picture=folder / "picture.jpg",
        sheet=folder / "sheet.png",
        page=folder / "maps.html",
        numbers=folder / "maps.json",
        steps=means.files,
        words=[word.name for word in targets.words],
        mean=means.by_group(),
        mass=means.masses(),
        concepts=job.concepts,
        concept_map=means.concept_map(),
        concept_sheet=folder / "concepts.png" if job.concepts else None,
    )
    with complete_file(result.picture) as beside:
        beside.write_bytes(jpeg_bytes(pixels, model=suite.spec.name, prompt=job.prompt))
    with complete_file(folder / "mean.safetensors") as beside:
        kept = result.mean | means.by_block()
        flat = {f"{blocks}/{name}": value for blocks, maps in kept.items() for name, value in maps.items()}
        flat |= {} if result.concept_map is None else {"concepts": result.concept_map}
        save_file({name: value.contiguous() for name, value in flat.items() if value.numel()}, beside)
    with phase(progress, "contact sheet"):
        picture = Image.fromarray(pixels[0].numpy())
        page = MapSheet(folder, picture, job.prompt, f"{suite.spec.name}, seed {job.seed}")
        page.draw_words(result.sheet, result.mean, result.words, targets.patches)
        if result.concept_map is not None and result.concept_sheet is not None:
            page.draw_concepts(result.concept_sheet, result.concept_map, job.concepts, job.concept_blocks)
    described = {
        "model": suite.spec.name,
        "prompt": job.prompt,
        "seed": job.seed,
        "size": list(job.picture.grid),
        "grid": [job.picture.grid.rows, job.picture.grid.columns],
        "timesteps": job.picture.timesteps,
        "steps": job.kept_steps,
        "image": None if job.image is None else job.image.described(),
        "blocks": job.blocks,
        "words": [{"word": word.name, "tokens": list(word.tokens)} for word in targets.words],
        "patches": list(targets.patches),
        "concepts": job.concepts,
        "concept_blocks": job.concept_blocks,
        "mass": result.mass,
        "registers": means.register_counts(),
        "options": settings.to_json(),
        **provenance_of(suite, job.machine),
        "versions": versions("torch", "tokenizers"),
    }
    write_json(result.numbers, described)
    with phase(progress, "page"):
        write_map_page(folder)
    return result


def settle(settings: MapSettings) -> MapJob:
    """Answer every question that is left open. Raises FluxIRError for what a user can mend."""
    check_words(MapSettings, vars(settings))
    check_least(vars(settings))
    settings, image, image_given = with_image(settings)
    spec, picture, machine = settings.spec, settings.settle_picture(), settings.settle_machine()
    tokens = picture.grid.tokens
    for patch in settings.patches:
        if not 0 <= patch < tokens:
            raise FluxIRError(
                f"a patch is one of the {tokens} image tokens, counted from 0: got {patch}",
                hint=f"they stand in {picture.grid.rows} rows of {picture.grid.columns}",
            )
    concepts = _names(settings.concepts) or []
    if concepts and (len(set(concepts)) < max(2, len(concepts)) or "" in concepts):
        raise FluxIRError(
            f"concepts are two words or more, each once: got {', '.join(concepts)}",
            hint="add what else is in the picture, such as background",
        )
    depth = spec.flux.depth
    concept_blocks = default_blocks(depth) if settings.concept_blocks is None else sorted(set(settings.concept_blocks))
    for block in concept_blocks or [-1]:
        if not 0 <= block < depth:
            raise FluxIRError(
                f"concepts are mapped in double blocks, of which this model has {depth}: got {block}",
                hint=f"pass numbers from 0 to {depth - 1}",
            )
    return MapJob(
        settings=settings,
        prompt=(DEFAULT_PROMPT if image is None else "") if settings.prompt is None else settings.prompt,
        machine=machine,
        picture=picture,
        image=image,
        image_given=image_given,
        seed=secrets.randbelow(SEEDS) if settings.seed is None else settings.seed,
        blocks=block_names(_names(settings.blocks), spec.flux.depth, spec.flux.depth_single_blocks),
        kept_steps=steps_to_map(settings, picture),
        concepts=concepts,
        concept_blocks=concept_blocks,
    )


def with_image(settings: MapSettings) -> tuple[MapSettings, GivenPicture | None, str | None]:
    """The settings with the size of the picture that is looked at; the picture in that size, and its own size in words
    where it is another. Raises FluxIRError for what is no picture, and for a run that samples as well.
    """
    if settings.image is None:
        return settings, None, None
    if settings.init_image is not None:
        raise FluxIRError(
            "--image is looked at as it is, and --init_image is what another picture is sampled from: got both",
            hint="leave one of them out",
        )
    given = read_given(settings.image, "image")
    shrink = min(1.0, settings.spec.default_side_px / sqrt(given.width * given.height))
    own = (max(TOKEN_PX, round(side * shrink / TOKEN_PX) * TOKEN_PX) for side in (given.width, given.height))
    asked = (settings.width, settings.height)
    width, height = (side if side is not None else like for side, like in zip(asked, own, strict=True))
    check_size(height, width)
    fitted = given.resized(width, height)
    return replace(settings, width=width, height=height), fitted, None if fitted is given else given.size


def steps_to_map(settings: MapSettings, picture: SettledPicture) -> list[int]:
    """The steps whose maps are kept: all that are run; of a given picture the second half, where it can be seen.

    Raises FluxIRError for steps that are not there, and for one that shows nothing of a given picture.
    """
    if settings.image is None:
        return check_steps(settings.steps, picture.num_steps, picture.first_step)
    second_half = range((picture.num_steps + 1) // 2, picture.num_steps)
    steps = check_steps(second_half if settings.steps is None else settings.steps, picture.num_steps)
    if 0 in steps or not steps:
        raise FluxIRError(
            f"at step 0 there is noise alone and nothing of --image: got {', '.join(map(str, steps)) or 'one step'}",
            hint="choose later --steps, or more --num_steps",
        )
    return steps


def _names(names: str | Sequence[str] | None) -> list[str] | None:
    """Names one by one: of a text with commas between them, or of several texts."""
    if names is None:
        return None
    return [name.strip() for text in ([names] if isinstance(names, str) else names) for name in text.split(",")]


def embed(suite: Suite, job: MapJob, progress: Watch) -> Embedded:
    """The prompt's words and its embedding. Raises FluxIRError for a word that is not there before encoders run."""
    with phase(progress, "text"), suite.text_encoders() as encoders:
        tokens = prompt_tokens(encoders.t5.tokenizer, job.prompt, encoders.t5.max_tokens)
        tokens.choose(_names(job.settings.words))
        notes = encoders.t5.notes(job.prompt) + encoders.clip.notes(job.prompt)
        notes += [note for concept in job.concepts for note in encoders.t5.notes(concept)]
        for concept, numbers in zip(job.concepts, encoders.t5.tokenizer.numbers(job.concepts), strict=True):
            if len(numbers) > 2:  # its piece and the end
                notes.append(f"{concept!r} has several pieces in T5, and a concept is the first of them")
        for note in dict.fromkeys(notes):
            progress(Note(f"note: {suite.spec.name}: {note}"))
        with torch.no_grad():
            concepts = encoders.t5(job.concepts)[:, 0][None] if job.concepts else None
        return Embedded(tokens, encode(encoders.t5, encoders.clip, [job.prompt]), concepts)


def walk(
    suite: Suite, job: MapJob, embedded: Embedded, targets: MapTargets, means: Means, progress: Watch
) -> PackedLatent:
    """Walk to the finished latent; the maps of every step that is kept go to `means`, and from there to its file.

    Of a picture that is given its latent: each step begins with it, so none depends on another.
    """
    (width, height), machine, picture = job.picture.grid, job.machine, job.picture
    noise = noise_for([job.seed], height, width, machine.placement.transformer, machine.compute.dtype)
    inputs = prepare(noise, embedded.text, height, width)
    latent = inputs.img
    if picture.given.given() or job.image is not None:
        with suite.autoencoder() as autoencoder:
            inputs = picture.given.encoded(autoencoder, picture.timesteps).put_into(inputs)
            latent = inputs.img if job.image is None else encode_picture(autoencoder, job.image.pixels)
    times, guidance = picture.timesteps, picture.guidance
    with suite.transformer() as model:
        if job.image is None:
            with mappers(model, job, embedded, targets, means, job.kept_steps, picture.first_step):
                steps = sample(model, inputs, times, guidance, first_step=picture.first_step)
                for step in follow(progress, "sample", steps, total=picture.num_steps - picture.first_step):
                    latent = step.after
                    if step.number in job.kept_steps:
                        means.write_step(step.number)
            return latent
        for number in follow(progress, "look", job.kept_steps, total=len(job.kept_steps)):
            noisy = inputs.begun_with(latent, times[number])
            with mappers(model, job, embedded, targets, means, [number], number):
                next(sample(model, noisy, times, guidance, first_step=number))
            means.write_step(number)
    return latent


@contextmanager
def mappers(
    model: Transformer,
    job: MapJob,
    embedded: Embedded,
    targets: MapTargets,
    means: Means,
    steps: Sequence[int],
    first_step: int,
) -> Iterator[None]:
    """What makes the maps of these steps, while this lasts."""
    attend = partial(AttentionMapper, steps=steps, first_step=first_step, keep_heads=job.settings.heads)
    with ExitStack() as stack:
        stack.enter_context(attend(model, job.blocks, targets, means.take))
        if embedded.concepts is not None:
            choose = partial(ConceptMapper, steps=steps, first_step=first_step, blocks=job.concept_blocks)
            stack.enter_context(choose(model, embedded.concepts, means.take_concepts))
        yield
