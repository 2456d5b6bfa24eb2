"""Attention maps of one picture: all of `attention_maps`, from the prompt to the contact sheet.

Maps of a step are written when the step is done, so memory does not grow with the steps.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.capture import DEFAULT_PROMPT, SEEDS
from flux_ir.api.model_settings import BegunPictureSettings, Machine, SettledPicture, provenance_of
from flux_ir.api.progress import Begun, Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, versions, write_json
from flux_ir.layout import new_generation_id
from flux_ir.maps.attention import GROUPS, AttentionSink, BlockMaps, MapTargets, attention_sites, block_names
from flux_ir.maps.words import PromptTokens, prompt_tokens
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.recorder import Recorder
from flux_ir.sampling.generate import check_steps, decode, noise_for, prepare, sample
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.pictures import PictureGiven
from flux_ir.shapes import PackedLatent
from flux_ir.steering.regions import Grid
from flux_ir.visualize.heatmap import overlay
from flux_ir.visualize.sheet import SheetColumn, SheetRow, draw_sheet

SHEET_PX = 192
"""The longer side of a picture on the contact sheet."""
DIRECTIONS = {"to_words": "what the image gives to", "from_words": "what the image gets from"}
_NAME = "step_{step}.safetensors"


@dataclass(frozen=True, kw_only=True)
class MapSettings(BegunPictureSettings):
    """What maps are asked for; see `attention_maps`."""

    prompt: str | None = None
    words: str | Sequence[str] | None = None
    patches: Sequence[int] = ()
    blocks: str | Sequence[str] | None = None
    steps: Iterable[int] | None = None
    heads: bool = False
    seed: int | None = None
    output_dir: str | Path = "maps"

    def to_json(self) -> dict[str, Any]:
        """The settings by name, as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | self.given_as_json()
        values["model"] = self.spec.name
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


class AttentionMaps(NamedTuple):
    """What `attention_maps` has written, and the means over the steps."""

    folder: Path
    picture: Path
    sheet: Path
    """Words down, groups of blocks across: means over the steps, over the picture."""
    numbers: Path
    """maps.json: words and their tokens, and how attention is divided among groups of tokens."""
    steps: list[Path]
    """A file of maps for each step: `double.3/to_words` is [words, rows, columns], and so on."""
    words: list[str]
    mean: dict[str, dict[str, Tensor]]
    """Means over steps, heads and the blocks of a group: mean["all"]["to_words"] is [words, rows, columns]."""
    mass: dict[str, dict[str, float]]
    """The image's attention on each group of tokens, by block; "all" is the mean over blocks."""


class MapJob(NamedTuple):
    """The work with every open question answered that can be without the tokenizer."""

    settings: MapSettings
    prompt: str
    machine: Machine
    picture: SettledPicture
    seed: int
    blocks: list[str]
    kept_steps: list[int]


def attention_maps(
    prompt: str | None = None,
    *,
    words: str | Sequence[str] | None = None,
    patches: Sequence[int] = (),
    blocks: str | Sequence[str] | None = None,
    steps: Iterable[int] | None = None,
    heads: bool = False,
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
    `red#1` and `red#2`. `patches` are image tokens, counted row by row from 0, whose attention over the image is mapped
    as well. `blocks` are names or patterns (`double.3`, `single.*`), None all of them; `heads` keeps the maps of every
    head apart, else they are averaged. The probabilities are those of the network's own softmax, after norm and
    rotation, and the picture has the bits it has without maps.

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
    sites = attention_sites(job.blocks)
    for note in (f"{suite.spec.name} on {job.machine}, seed {job.seed}", *job.machine.notes(sites)):
        progress(Note(note))
    for note in job.picture.given.notes(job.picture.timesteps):
        progress(Note(note))
    tokens, text = embed(suite, job, progress)
    targets = MapTargets(tokens.choose(_names(settings.words)), tuple(settings.patches), tokens.end, tokens.padding)
    progress(Begun(generation_id))
    for part in follow(progress, "load", suite.parts, total=len(suite.parts)):
        suite.load_part(part)
    means = Means(job, folder)
    latent = sample_mapped(suite, job, text, targets, means, progress)
    with phase(progress, "picture"), suite.autoencoder() as autoencoder:
        grid = job.picture.grid
        pixels = decode(autoencoder, latent, grid.height, grid.width, suite.dtype)
    result = AttentionMaps(
        folder=folder,
        picture=folder / "picture.jpg",
        sheet=folder / "sheet.png",
        numbers=folder / "maps.json",
        steps=means.files,
        words=[word.name for word in targets.words],
        mean=means.by_group(),
        mass=means.masses(),
    )
    with complete_file(result.picture) as beside:
        beside.write_bytes(jpeg_bytes(pixels, model=suite.spec.name, prompt=job.prompt))
    with complete_file(folder / "mean.safetensors") as beside:
        flat = {f"{group}/{name}": value for group, maps in result.mean.items() for name, value in maps.items()}
        save_file({name: value.contiguous() for name, value in flat.items()}, beside)
    with phase(progress, "contact sheet"):
        draw(result, job, Image.fromarray(pixels[0].numpy()))
    described = {
        "model": suite.spec.name,
        "prompt": job.prompt,
        "seed": job.seed,
        "size": list(job.picture.grid),
        "grid": [job.picture.grid.rows, job.picture.grid.columns],
        "timesteps": job.picture.timesteps,
        "steps": job.kept_steps,
        "blocks": job.blocks,
        "words": [{"word": word.name, "tokens": list(word.tokens)} for word in targets.words],
        "patches": list(targets.patches),
        "mass": result.mass,
        "options": settings.to_json(),
        **provenance_of(suite, job.machine),
        "versions": versions("torch", "tokenizers"),
    }
    write_json(result.numbers, described)
    return result


def settle(settings: MapSettings) -> MapJob:
    """Answer every question that is left open. Raises FluxIRError for what a user can mend."""
    check_words(MapSettings, vars(settings))
    check_least(vars(settings))
    spec, picture, machine = settings.spec, settings.settle_picture(), settings.settle_machine()
    tokens = picture.grid.tokens
    for patch in settings.patches:
        if not 0 <= patch < tokens:
            raise FluxIRError(
                f"a patch is one of the {tokens} image tokens, counted from 0: got {patch}",
                hint=f"they stand in {picture.grid.rows} rows of {picture.grid.columns}",
            )
    return MapJob(
        settings=settings,
        prompt=DEFAULT_PROMPT if settings.prompt is None else settings.prompt,
        machine=machine,
        picture=picture,
        seed=secrets.randbelow(SEEDS) if settings.seed is None else settings.seed,
        blocks=block_names(_names(settings.blocks), spec.flux.depth, spec.flux.depth_single_blocks),
        kept_steps=check_steps(settings.steps, picture.num_steps, picture.first_step),
    )


def _names(names: str | Sequence[str] | None) -> list[str] | None:
    """Names one by one: of a text with commas between them, or of several texts."""
    if names is None:
        return None
    return [name.strip() for text in ([names] if isinstance(names, str) else names) for name in text.split(",")]


def embed(suite: Suite, job: MapJob, progress: Watch) -> tuple[PromptTokens, TextEmbedding]:
    """The prompt's words and its embedding. Raises FluxIRError for a word that is not there before encoders run."""
    with phase(progress, "text"), suite.text_encoders() as encoders:
        tokens = prompt_tokens(encoders.t5.tokenizer, job.prompt, encoders.t5.max_tokens)
        tokens.choose(_names(job.settings.words))
        for note in dict.fromkeys(encoders.t5.notes(job.prompt) + encoders.clip.notes(job.prompt)):
            progress(Note(f"note: {suite.spec.name}: {note}"))
        return tokens, encode(encoders.t5, encoders.clip, [job.prompt])


def sample_mapped(
    suite: Suite, job: MapJob, text: TextEmbedding, targets: MapTargets, means: "Means", progress: Watch
) -> PackedLatent:
    """Walk to the finished latent; the maps of every step that is kept go to `means`, and from there to its file."""
    (width, height), machine, picture = job.picture.grid, job.machine, job.picture
    noise = noise_for([job.seed], height, width, machine.placement.transformer, machine.compute.dtype)
    inputs = prepare(noise, text, height, width)
    if picture.given.given():
        with suite.autoencoder() as autoencoder:
            inputs = picture.given.encoded(autoencoder, picture.timesteps).put_into(inputs)
    latent, first_step = inputs.img, picture.first_step
    sites = attention_sites(job.blocks, cond=picture.given.cond_tokens > 0)
    sink = AttentionSink(suite.spec.flux.num_heads, targets, means.take, keep_heads=job.settings.heads)
    with (
        suite.transformer() as model,
        Recorder(model, sites, sink, steps=job.kept_steps, first_step=first_step),
    ):
        steps = sample(model, inputs, picture.timesteps, picture.guidance, first_step=first_step)
        for step in follow(progress, "sample", steps, total=picture.num_steps - first_step):
            latent = step.after
            if step.number in job.kept_steps:
                means.write_step(step.number)
    return latent


class Means:
    """Maps as they come: those of one step are kept until they are written, and sums over the steps of each block."""

    def __init__(self, job: MapJob, folder: Path) -> None:
        self.job, self.folder, self.files = job, folder, list[Path]()
        self._step: dict[str, Tensor] = {}
        self._sums: dict[str, BlockMaps] = {}

    def take(self, step: int, block: str, maps: BlockMaps) -> None:
        """One block of a step."""
        self._step |= {f"{block}/{name}": value for name, value in self._on_grid(maps).items()}
        if self.job.settings.heads:
            maps = BlockMaps(*(value.mean(dim=0) for value in maps))
        before = self._sums.get(block)
        self._sums[block] = maps if before is None else BlockMaps(*map(torch.add, before, maps))

    def write_step(self, step: int) -> None:
        """All blocks of a step as one file."""
        path = self.folder / _NAME.format(step=step)
        kept = {name: value.contiguous() for name, value in self._step.items() if value.numel()}
        metadata = {"groups": ", ".join(GROUPS), "step": str(step)}
        with complete_file(path) as beside:
            save_file(kept, beside, metadata)
        self.files.append(path)
        self._step = {}

    def _on_grid(self, maps: BlockMaps) -> dict[str, Tensor]:
        grid: Grid = self.job.picture.grid
        return {
            name: value if name == "mass" else value.unflatten(-1, (grid.rows, grid.columns))
            for name, value in maps._asdict().items()
        }

    def by_group(self) -> dict[str, dict[str, Tensor]]:
        """Means over steps and over the blocks of each group."""
        steps, means = len(self.job.kept_steps), {}
        for group, blocks in block_groups(self.job.blocks).items():
            summed = [self._sums[block] for block in blocks]
            means[group] = self._on_grid(
                BlockMaps(*(sum(parts) / (steps * len(blocks)) for parts in zip(*summed, strict=True)))
            )
        return means

    def masses(self) -> dict[str, dict[str, float]]:
        """How the image's attention is divided, mean over the steps: by block, and over all."""
        of_block = {block: sums.mass / len(self.job.kept_steps) for block, sums in self._sums.items()}
        every = {"all": torch.stack(list(of_block.values())).mean(dim=0)} | of_block
        return {block: dict(zip(GROUPS, mass.tolist(), strict=True)) for block, mass in every.items()}


def block_groups(blocks: Sequence[str]) -> dict[str, list[str]]:
    """All blocks, and the first and second half of each kind: `double 0-9`, `double 10-18`."""
    groups = {"all": list(blocks)}
    for kind in ("double", "single"):
        of_kind = [block for block in blocks if block.startswith(kind)]
        half = (len(of_kind) + 1) // 2
        for part in (of_kind[:half], of_kind[half:]):
            if part:
                numbers = [block.split(".")[1] for block in part]
                groups[f"{kind} {numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")] = part
    return groups


def draw(result: AttentionMaps, job: MapJob, picture: Image.Image) -> None:
    """The contact sheet, and each of its pictures as a file of its own."""
    picture = picture.copy()
    picture.thumbnail((SHEET_PX, SHEET_PX))
    plain = result.folder / "overlays" / "picture.png"
    _save(picture, plain)
    rows = []
    for direction, number, label in _rows(result, job):
        cells: list[Path | None] = [plain]
        for group, maps in result.mean.items():
            values = maps[direction][number].double().numpy()
            least, most = values.min(), values.max()
            scaled = (values - least) / (most - least) if most > least else np.zeros_like(values)
            path = result.folder / "overlays" / f"{direction}_{number}" / f"{group.replace(' ', '_')}.png"
            _save(overlay(picture, scaled, 1.0, smooth=True), path)
            cells.append(path)
        rows.append(SheetRow(label, cells))
    columns = [SheetColumn(name, name) for name in ("picture", *result.mean)]
    subtitle = f"{job.settings.spec.name}, seed {job.seed}: attention, mean over steps, each from its least to its most"
    draw_sheet(job.prompt, subtitle, columns, rows or [SheetRow("no words", [plain])], result.sheet)


def _rows(result: AttentionMaps, job: MapJob) -> Iterator[tuple[str, int, str]]:
    for number, word in enumerate(result.words):
        yield "to_words", number, f"image > {word}"
        yield "from_words", number, f"{word} > image"
    for number, patch in enumerate(job.settings.patches):
        yield "from_patches", number, f"patch {patch} > image"


def _save(picture: Image.Image, path: Path) -> None:
    with complete_file(path) as beside:
        picture.save(beside, "PNG")
