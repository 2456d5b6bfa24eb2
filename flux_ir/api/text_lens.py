"""The text's own lens: pictures from earlier layers of the text encoders or from some tokens: all of `text_lens`.

Prompts come one after the other: each is encoded, every reading of it is drawn, and every picture is kept as soon as it
is made. A picture is named by a digest of what the transformer was told and by its seed, so that the same call goes on
where it was stopped, and memory is that of one prompt.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.capture import DEFAULT_PROMPT
from flux_ir.api.model_settings import Machine, PictureSettings, SettledPicture, identity_of_pictures, provenance_of
from flux_ir.api.progress import Note, Progress, Watch, phase, unwatched
from flux_ir.collecting.prompts import read_prompts
from flux_ir.demo.judge import find_objects
from flux_ir.demo.scenes import Scene, parse_caption
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import versions, write_json
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.plots.grids import number_grid
from flux_ir.steering.dose import Painter, Variant
from flux_ir.steering.folder import claim, keep_picture
from flux_ir.studies.text_lens import (
    ASPECTS,
    AspectScore,
    JudgedPicture,
    PooledSource,
    Selection,
    Settled,
    Swap,
    TextMix,
    TokenGroup,
    TokenSource,
    choose_layers,
    read_layers,
    read_swap,
    score,
    select,
    settling,
    words_of_prompt,
)
from flux_ir.tables import write_rows
from flux_ir.visualize.sheet import SheetColumn, SheetRow, draw_sheet


@dataclass(frozen=True, kw_only=True)
class TextLensSettings(PictureSettings):
    """What is read, and of which prompts; see `text_lens`."""

    prompt: str | None = None
    prompts: str | Path | Sequence[str] | None = None
    layers: str | Sequence[str] | None = None
    tokens: Sequence[TokenGroup] = ("all",)
    words: str | Sequence[str] | None = None
    rest: TokenSource = "empty"
    other_prompt: str | Sequence[str] | None = None
    swap: str | Sequence[str] | None = None
    pooled: PooledSource = "prompt"
    judge: bool = False
    seed: int = 0
    seeds: int = 4
    batch_size: int = 8
    name: str | None = None
    output_dir: str | Path = "text_lens"


class TextLensRow(NamedTuple):
    """One reading of one prompt."""

    prompt: int
    """The number of the prompt among all."""
    layer: str
    """t5.embeddings, t5.12, clip.7."""
    tokens: str
    """Which tokens of T5 come from the prompt: all, words, end, padding, or words that were asked for."""
    digest: str
    """16 hex digits that stand for what the transformer was told."""
    pictures: dict[int, Path]
    """By seed."""


class TextLensResult(NamedTuple):
    """What `text_lens` has written."""

    folder: Path
    sheets: list[Path]
    """One for each prompt: readings down, seeds across."""
    rows: list[TextLensRow]
    numbers: Path
    """text_lens.json: everything that was asked for and found."""
    scores: list[AspectScore]
    """With `judge`: how often each aspect is right, by tokens and layer."""
    settled: list[Settled]
    """With `judge`: from which layer on it stays right."""
    table: Path | None
    """scores.csv."""
    chart: Path | None
    """scores.png."""


class PromptPlan(NamedTuple):
    """What is read of one prompt."""

    number: int
    prompt: str
    other: str | None
    selections: list[Selection]
    mix: TextMix


class TextLensJob(NamedTuple):
    """The work with every open question answered that can be without the tokenizer."""

    settings: TextLensSettings
    prompts: list[str]
    others: list[str | None]
    scenes: list[Scene]
    """Of the prompts, where they are judged."""
    layers: list[str]
    machine: Machine
    picture: SettledPicture

    @property
    def seeds(self) -> range:
        """One for each noise."""
        return range(self.settings.seed, self.settings.seed + self.settings.seeds)


def text_lens(
    prompt: str | None = None,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    tokens: TokenGroup | Sequence[TokenGroup] = ("all",),
    words: str | Sequence[str] | None = None,
    rest: TokenSource = "empty",
    other_prompt: str | Sequence[str] | None = None,
    swap: str | Sequence[str] | None = None,
    pooled: PooledSource = "prompt",
    judge: bool = False,
    seed: int = 0,
    seeds: int = 4,
    model: str | Suite = "flux-schnell",
    width: int | None = None,
    height: int | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
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
    batch_size: int = 8,
    name: str | None = None,
    output_dir: str | Path = "text_lens",
    progress: Watch = unwatched,
) -> TextLensResult:
    """Draw a prompt, or several, from earlier layers of the text encoders, or from some tokens alone.

    `layers` are names or patterns: t5.embeddings, t5.12, t5.*, clip.7 (None: all of T5). A layer of T5 stands in place
    of T5's last, a layer of CLIP in place of CLIP's; each is read through the norm behind the last layer. The last
    layer with all tokens gives the picture of a plain run, bit for bit.

    `tokens` says which of T5's tokens come from the prompt: all, words (all of the text), end (its end mark), padding;
    several are drawn one after the other. In their place `words` names words or phrases, each drawn by itself (`red`,
    `red circle`, `red+square`). The `rest` of the tokens comes from the empty prompt, is zeros, is removed, or comes
    from the last layer or from `other_prompt`, by position. `swap` has words told as those of `other_prompt`
    (`red=blue`). `pooled` is where CLIP's vector comes from. Several prompts may have an `other_prompt` each.

    `prompts` is a list or a file of several. With `judge` all are captions of flux-tiny's world, and what the judge
    sees is held against them; a CPU makes them `batch_size` at a time, which is faster and gives other last bits.
    `seeds` noises are drawn from, counted up from `seed`.

    All other arguments are those of `capture`. Goes into a folder below `output_dir`, named by `name` or by the
    settings; the same call again, also with more layers, tokens or seeds, goes on with what is there. Raises
    FluxIRError for what a user can mend: a layer that is not there, a word that is not in the prompt.
    """
    settings = TextLensSettings(
        prompt=prompt,
        prompts=prompts,
        layers=layers,
        tokens=(tokens,) if isinstance(tokens, str) else tuple(tokens),
        words=words,
        rest=rest,
        other_prompt=other_prompt,
        swap=swap,
        pooled=pooled,
        judge=judge,
        seed=seed,
        seeds=seeds,
        model=model,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
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
        batch_size=batch_size,
        name=name,
        output_dir=output_dir,
    )
    return run_text_lens(settings, progress)


def run_text_lens(settings: TextLensSettings, progress: Watch = unwatched) -> TextLensResult:
    """The same, with its settings in one object."""
    job = settle(settings)
    suite = settings.suite(job.machine, progress)
    for note in (f"{suite.spec.name} on {job.machine}", *job.machine.notes()):
        progress(Note(note))
    plans = plan_prompts(job, suite, progress)
    identity = identity_of(job, suite)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(settings.output_dir) / (settings.name or f"{suite.spec.name}_{digest}")
    claim(folder, identity, "a text lens")
    rows: list[TextLensRow] = []
    judged: list[JudgedPicture] = []
    total = sum(len(plan.selections) for plan in plans) * len(job.layers) * len(job.seeds)
    progress(Progress("pictures", 0, total))
    for plan in plans:
        readings = readings_of(job, suite, plan, folder)
        before = len(rows) * len(job.seeds)
        for there in make_missing(job, suite, readings):
            progress(Progress("pictures", before + there, total))
        found = [reading.row for reading in readings]
        draw(job, suite, plan, found, _sheet(folder, plan))
        judged += look(found) if job.scenes else []
        rows += found
    others = [parsed(other) for other in job.others]
    scores = score(judged, job.scenes, others) if judged else []
    settled = settling(judged, job.scenes) if judged else []
    result = TextLensResult(
        folder=folder,
        sheets=[_sheet(folder, plan) for plan in plans],
        rows=rows,
        numbers=folder / "text_lens.json",
        scores=scores,
        settled=settled,
        table=folder / "scores.csv" if scores else None,
        chart=folder / "scores.png" if scores else None,
    )
    if result.table is not None and result.chart is not None:
        write_rows(result.table, [one._asdict() for one in scores])
        draw_scores(
            result.chart,
            scores,
            f"{suite.spec.name}: {counted(len(plans), 'prompt')} from {counted(settings.seeds, 'seed')}",
        )
    write_json(result.numbers, identity | described(job, suite, plans, result))
    return result


# ---- What is asked for


def settle(settings: TextLensSettings) -> TextLensJob:
    """Answer every question that is left open. Raises FluxIRError for what a user can mend."""
    check_words(TextLensSettings, {name: getattr(settings, name) for name in ("tokens", "rest", "pooled")})
    check_least(vars(settings))
    layers = choose_layers(settings.layers, settings.spec)
    prompts = prompts_of(settings)
    if settings.words is not None and tuple(settings.tokens) != ("all",):
        raise FluxIRError("--words are some of the tokens: got --tokens as well", hint="leave one of them out")
    if not settings.tokens:
        raise FluxIRError("there is nothing to draw: got no --tokens", hint="--tokens all,words,padding")
    clip = next((layer for layer in layers if layer.startswith("clip")), None)
    if settings.pooled == "zeros" and clip is not None:
        raise FluxIRError(
            f"with --pooled zeros nothing of {clip} is read", hint="leave it out, or read layers of T5 (--layers t5.*)"
        )
    return TextLensJob(
        settings=settings,
        prompts=prompts,
        others=others_of(settings, prompts),
        scenes=scenes_of(prompts, settings.settle_picture()) if settings.judge else [],
        layers=layers,
        machine=settings.settle_machine(),
        picture=settings.settle_picture(),
    )


def prompts_of(settings: TextLensSettings) -> list[str]:
    """Every prompt, each once. Raises FluxIRError where they are given twice, or not at all."""
    if settings.prompts is None:
        return [DEFAULT_PROMPT if settings.prompt is None else settings.prompt]
    if settings.prompt is not None:
        raise FluxIRError("--prompts has every prompt: got --prompt as well", hint="leave one of them out")
    given = settings.prompts
    prompts = read_prompts(Path(given)) if isinstance(given, str | Path) else list(given)
    if not prompts or len(set(prompts)) < len(prompts):
        raise FluxIRError(
            f"--prompts must be different prompts, one or more: got {len(prompts)}", hint="name each once"
        )
    return prompts


def others_of(settings: TextLensSettings, prompts: Sequence[str]) -> list[str | None]:
    """For each prompt the other one that something comes from. Raises FluxIRError if one is lacking, or not used."""
    given = settings.other_prompt
    uses = [flag for flag, used in _uses_of_other(settings) if used]
    if given is None:
        if uses:
            raise FluxIRError(f"{uses[0]} takes something of another prompt: got none", hint="add --other_prompt")
        return [None] * len(prompts)
    if not uses:
        raise FluxIRError(
            "nothing is taken from --other_prompt", hint="add --swap red=blue, --rest other or --pooled other"
        )
    others = [given] * len(prompts) if isinstance(given, str) else list(given)
    if len(others) != len(prompts):
        raise FluxIRError(
            f"there must be one other prompt for all, or one for each of {len(prompts)}: got {len(others)}",
            hint="pass as many as there are prompts",
        )
    return list(others)


def _uses_of_other(settings: TextLensSettings) -> list[tuple[str, bool]]:
    return [
        ("--swap", settings.swap is not None),
        ("--rest other", settings.rest == "other"),
        ("--pooled other", settings.pooled == "other"),
    ]


def scenes_of(prompts: Sequence[str], picture: SettledPicture) -> list[Scene]:
    """The scenes of captions. Raises FluxIRError for other prompts, and for pictures that are not square."""
    width, height = picture.grid
    if width != height:
        raise FluxIRError(f"the judge looks at square pictures: got {width} x {height} px", hint="leave out --judge")
    scenes = []
    for prompt in prompts:
        scene = parsed(prompt)
        if scene is None:
            raise FluxIRError(
                f"the judge knows the captions of flux-tiny's world: got {prompt!r}",
                hint='"a large red circle on the left on a white background" is one; or leave out --judge',
            )
        scenes.append(scene)
    return scenes


def parsed(caption: str | None) -> Scene | None:
    """The scene of a caption; None for any other text, or none."""
    try:
        return None if caption is None else parse_caption(caption)
    except ValueError:
        return None


def _names(names: str | Sequence[str] | None) -> list[str]:
    """Names one by one: of a text with commas between them, or of several texts."""
    texts = [names] if isinstance(names, str) else names or []
    return [name.strip() for text in texts for name in text.split(",")]


def plan_prompts(job: TextLensJob, suite: Suite, progress: Watch) -> list[PromptPlan]:
    """Which tokens are meant. Raises FluxIRError for words that are not there, before a prompt is encoded."""
    settings, plans = job.settings, []
    with phase(progress, "words"), suite.text_encoders() as encoders:
        notes: dict[str, None] = {}
        for number, (prompt, other) in enumerate(zip(job.prompts, job.others, strict=True)):
            known, length = words_of_prompt(encoders, prompt), encoders.t5.max_tokens
            selections = select(known, settings.tokens, _names(settings.words), length)
            if settings.rest == "removed" and (none := [one.name for one in selections if not one.tokens]):
                raise FluxIRError(
                    f"there is no text left of {prompt!r}: it has no {none[0]}, and the rest is removed",
                    hint="leave these --tokens out, or pass --rest empty",
                )
            swaps: tuple[Swap, ...] = ()
            if settings.swap is not None and other is not None:
                others = words_of_prompt(encoders, other)
                swaps = tuple(read_swap(text, known, others) for text in _names(settings.swap))
            plans.append(PromptPlan(number, prompt, other, selections, TextMix(swaps, settings.rest, settings.pooled)))
            for text in (prompt, other or ""):
                notes |= dict.fromkeys(encoders.t5.notes(text) + encoders.clip.notes(text))
    for note in notes:
        progress(Note(f"note: {suite.spec.name}: {note}"))
    return plans


def identity_of(job: TextLensJob, suite: Suite) -> dict[str, Any]:
    """What the readings depend on, but for layers, tokens and seeds, of which more may be asked for later."""
    settings = job.settings
    return identity_of_pictures(suite, job.picture) | {
        "prompts": job.prompts,
        "other_prompts": job.others,
        "rest": settings.rest,
        "swap": _names(settings.swap),
        "pooled": settings.pooled,
        "judge": settings.judge,  # judged pictures have other last bits: see `text_lens`
    }


# ---- The pictures


class Reading(NamedTuple):
    """A row, and what the transformer is told for it."""

    row: TextLensRow
    text: TextEmbedding


def readings_of(job: TextLensJob, suite: Suite, plan: PromptPlan, folder: Path) -> list[Reading]:
    """Every layer with every selection of tokens, of one prompt: selections down, and in each the layers by depth."""
    mix = plan.mix
    is_filled = mix.rest == "empty" and any(selection.name != "all" for selection in plan.selections)
    with suite.text_encoders() as encoders:
        prompt = read_layers(encoders, plan.prompt, job.layers)
        empty = read_layers(encoders, "", job.layers) if is_filled or mix.pooled == "empty" else None
        other = None if plan.other is None else read_layers(encoders, plan.other, job.layers)
    readings = []
    for selection in plan.selections:
        for layer in job.layers:
            text = mix.embedding(layer, selection, prompt, empty, other)
            digest = text.digest()
            pictures = {seed: folder / "pictures" / f"{digest}_seed_{seed}.png" for seed in job.seeds}
            readings.append(Reading(TextLensRow(plan.number, layer, selection.name, digest, pictures), text))
    return readings


def make_missing(job: TextLensJob, suite: Suite, readings: Sequence[Reading]) -> Iterator[int]:
    """Makes the pictures that are not there, keeps each as soon as it is made, and yields how many are there."""
    wanted = {path: (reading.text, seed) for reading in readings for seed, path in reading.row.pictures.items()}
    missing = {path: one for path, one in wanted.items() if not path.is_file()}
    there = len(readings) * len(job.seeds) - len(missing)
    yield there
    if not missing:
        return
    # Texts of one length at a time: those of a batch are stacked.
    variants = [Variant(str(path), 1.0, seed, text, None) for path, (text, seed) in missing.items()]
    variants.sort(key=lambda variant: variant.text.txt.shape[1])
    with suite.transformer() as model, suite.autoencoder() as autoencoder:
        picture = job.picture
        painter = Painter(
            model,
            autoencoder,
            picture.grid,
            picture.timesteps,
            picture.guidance,
            suite.dtype,
            meter=None,
            batch=job.settings.batch_size,
            cpu_batch=job.settings.batch_size if job.scenes else 1,
        )
        for _, group in groupby(variants, lambda variant: variant.text.txt.shape[1]):
            for made in painter.make(list(group)):
                keep_picture(Path(made.variant.row), made.picture.numpy())
                there += 1
                yield there


def look(rows: Sequence[TextLensRow]) -> Iterator[JudgedPicture]:
    """What the judge sees on every picture."""
    for row in rows:
        for seed, path in row.pictures.items():
            with Image.open(path) as picture:
                sight, _ = find_objects(np.asarray(picture))
            yield JudgedPicture(row.prompt, row.tokens, row.layer, seed, sight)


# ---- What is written


def draw(job: TextLensJob, suite: Suite, plan: PromptPlan, rows: Sequence[TextLensRow], path: Path) -> None:
    """The contact sheet of a prompt: readings down, seeds across."""
    several = len(plan.selections) > 1 or job.settings.words is not None
    lines = [
        SheetRow(f"{row.tokens}, {row.layer}" if several else row.layer, list(row.pictures.values())) for row in rows
    ]
    columns = [SheetColumn(f"seed {seed}", str(seed)) for seed in job.seeds]
    draw_sheet(plan.prompt, f"{suite.spec.name}: {said(job, plan)}", columns, lines, path)


def said(job: TextLensJob, plan: PromptPlan) -> str:
    """What stands in place of what, in a few words."""
    settings = job.settings
    parts = ["each layer as if it were the last"]
    if settings.swap is not None:
        parts.append(f"swapped {', '.join(_names(settings.swap))} of {plan.other!r}")
    if settings.words is not None or tuple(settings.tokens) != ("all",):
        rest = {"empty": "of the empty prompt", "last": "of the last layer", "other": f"of {plan.other!r}"}
        parts.append(f"other tokens {rest.get(settings.rest, settings.rest)}")
    if settings.pooled != "prompt":
        pooled = {"empty": "of the empty prompt", "other": f"of {plan.other!r}"}
        parts.append(f"pooled vector {pooled.get(settings.pooled, settings.pooled)}")
    return "; ".join(parts)


def draw_scores(path: Path, scores: Sequence[AspectScore], subtitle: str) -> None:
    """The share of pictures in which each aspect is right: readings down, aspects across."""
    lines = list(dict.fromkeys((one.tokens, one.layer) for one in scores))
    right = {(one.tokens, one.layer, one.aspect): one.right for one in scores}
    aspects = [aspect for aspect in ASPECTS if any(one.aspect == aspect for one in scores)]
    values = [[right.get((*line, aspect)) for aspect in aspects] for line in lines]
    names = [f"{tokens}, {layer}" for tokens, layer in lines]
    number_grid(path, names, aspects, values, "right in the picture", subtitle=subtitle, low=0.0, high=1.0)


def described(job: TextLensJob, suite: Suite, plans: Sequence[PromptPlan], result: TextLensResult) -> dict[str, Any]:
    """What text_lens.json says beside the identity."""
    return {
        "layers": job.layers,
        "seeds": list(job.seeds),
        "tokens": [{one.name: list(one.tokens) for one in plan.selections} for plan in plans],
        "rows": [
            row._asdict()
            | {"pictures": {seed: path.relative_to(result.folder).as_posix() for seed, path in row.pictures.items()}}
            for row in result.rows
        ],
        "sheets": [path.name for path in result.sheets],
        "scores": [one._asdict() for one in result.scores],
        "settled": [one._asdict() for one in result.settled],
        **provenance_of(suite, job.machine),
        "versions": versions("torch", "tokenizers"),
    }


def _sheet(folder: Path, plan: PromptPlan) -> Path:
    return folder / f"sheet_{plan.number}.png"
