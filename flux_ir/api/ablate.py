"""The atlas of a model's blocks: everything of `ablate`, from the prompts to the table, the picture and the page.

    settle      every open question answered; nothing is loaded or written
    Workshop    one unit of work: a batch of pictures, unedited or with one block edited in every way
    conclude    the units' files -> rows with intervals -> atlas.json, .csv, .png, .html

A unit's numbers are kept in a file of their own, named by a digest of all they depend on: the same call goes on, and
processes take units in turns.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.model_settings import Machine, PictureSettings, SettledPicture, identity_of_pictures
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.collecting.batches import CPU_BATCH, batches_under_way, borrowed, replicas
from flux_ir.collecting.prompts import WorkList, read_prompts
from flux_ir.collecting.storage import LocalStorage, one_job_at
from flux_ir.demo.captions import captions
from flux_ir.distributed import Ranks, arrivals, joined
from flux_ir.errors import FluxIRError
from flux_ir.explorer.atlas_page import PAGE, write_atlas_page
from flux_ir.files import versions, write_json
from flux_ir.maps.attention import block_names
from flux_ir.models.architecture import Transformer
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.steering.dose import windows
from flux_ir.steering.perceptual import Lpips, find_lpips
from flux_ir.studies.atlas import (
    KIND_TITLES,
    KINDS,
    PATCHES,
    Ablation,
    AblationKind,
    Batch,
    Bench,
    Run,
    ablations_of,
    judge_of,
    measured,
    sites_of,
)
from flux_ir.studies.atlas_folder import FORMAT, OTHER_PROMPT, UNEDITED, AtlasFolder, Unit, units_of
from flux_ir.studies.atlas_table import AtlasRow, as_table, draw_atlas, row_of
from flux_ir.tables import write_rows
from flux_ir.threads import in_order

CAPTIONS, CAPTION_SEED = 16, 5
"""Prompts, where none are given: captions of flux-tiny's world, of the part that is for reports alone."""
KindWord = Literal[AblationKind, "none"]
RESULT, TABLE, DRAWN = "atlas.json", "atlas.csv", "atlas.png"


@dataclass(frozen=True, kw_only=True)
class AblateSettings(PictureSettings):
    """The arguments of `ablate`, which says what they mean."""

    prompts: str | Path | Sequence[str] | None = None
    max_prompts: int | None = None
    repeats: int = 1
    seed: int = 0
    blocks: str | Sequence[str] | None = None
    kinds: Sequence[KindWord] = KINDS
    window_kinds: Sequence[KindWord] = ("skip",)
    control_kinds: Sequence[KindWord] = KINDS
    shift: int | None = None
    pictures: int = 3
    batch_size: int = 8
    name: str | None = None
    output_dir: str | Path = "atlas"


class Atlas(NamedTuple):
    """What `ablate` has written, and the rows of its table."""

    folder: Path
    rows: list[AtlasRow]
    """By block, kind and window: rows of the controls behind those of their kind."""
    anchors: list[AtlasRow]
    """What distances are to be held against: pictures of other prompts from the same noise, where there are any."""
    blocks: list[str]
    table: Path
    picture: Path
    page: Path
    notes: list[str]

    def row(self, block: str, ablation: Ablation) -> AtlasRow:
        """One row. Raises KeyError for one that was not asked for."""
        return {(row.block, row.ablation): row for row in self.rows}[block, ablation]


def ablate(
    prompts: str | Path | Sequence[str] | None = None,
    *,
    max_prompts: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    blocks: str | Sequence[str] | None = None,
    kinds: KindWord | Sequence[KindWord] = KINDS,
    window_kinds: KindWord | Sequence[KindWord] = ("skip",),
    control_kinds: KindWord | Sequence[KindWord] = KINDS,
    shift: int | None = None,
    pictures: int = 3,
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
    output_dir: str | Path = "atlas",
    progress: Watch = unwatched,
) -> Atlas:
    """Say what each block is for: edit one at a time, in several ways, and measure what becomes of the pictures.

    Each of `kinds` is done at all steps; those of `window_kinds` also in the early, middle and late third of them;
    beside those of `control_kinds` stands a random direction that moves every token as far. "none" is no kind. `skip`
    passes over the block, `img_update` and `txt_update` leave one stream as it was, `attn` and `mlp` are without one
    branch, `rotary` shifts the positions of image keys by `shift` patches (None: a quarter of the shorter side), and
    `patch_img`, `patch_txt`, `patch_update` take what the block put out, or added, from the run of the next prompt.

    `prompts` is a list, or a .txt, .jsonl or .csv file (None: 16 captions of flux-tiny's world), of which the first
    `max_prompts` are taken; each is sampled `repeats` times from noise that follows from `seed`. Captions of
    flux-tiny's world are judged: what was right in the unedited picture and is wrong in the edited one is lost. Of the
    first `pictures` all edited pictures are kept. `blocks` are names or patterns. The same call goes on where it
    stopped; under torchrun all processes call this alike and share the work.

    Raises FluxIRError for what a user can mend, before anything is loaded where that is possible.
    """
    settings = AblateSettings(
        prompts=prompts,
        max_prompts=max_prompts,
        repeats=repeats,
        seed=seed,
        blocks=blocks,
        kinds=_several(kinds),
        window_kinds=_several(window_kinds),
        control_kinds=_several(control_kinds),
        shift=shift,
        pictures=pictures,
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
    return run_ablation(settings, progress)


def _several(kinds: KindWord | Sequence[KindWord]) -> tuple[KindWord, ...]:
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def run_ablation(settings: AblateSettings, progress: Watch = unwatched) -> Atlas:
    """`ablate`, with its arguments in one object."""
    with joined() as ranks:
        watch = progress if ranks.is_first else unwatched
        job = settle(settings, ranks, watch)
        with one_job_at(LocalStorage(job.folder.path, rank=ranks.rank), ranks):
            own = job.units[ranks.rank :: ranks.world_size]
            missing = [unit for unit in own if job.folder.missing(unit, job.ablations)]
            notes: list[str] = []
            if missing:
                with ExitStack() as stack:
                    workshop = Workshop(job, stack, watch)
                    for _ in follow(watch, "blocks", workshop.work(missing), len(missing)):
                        pass
                    notes = workshop.notes
            for _ in arrivals("ablations are done", ranks):
                pass
            atlas = conclude(job, notes)
            if ranks.is_first:
                with phase(watch, "table"):
                    write(job, atlas)
            return atlas


# ---- What is asked for


class AblationJob(NamedTuple):
    """The work with every open question answered."""

    settings: AblateSettings
    suite: Suite
    machine: Machine
    picture: SettledPicture
    prompts: list[str]
    blocks: list[str]
    ablations: list[Ablation]
    units: list[Unit]
    folder: AtlasFolder
    shift: int
    batch_size: int


def settle(settings: AblateSettings, ranks: Ranks, progress: Watch) -> AblationJob:
    """Answer every question that is left open, and find the files. Raises FluxIRError for what a user can mend."""
    check_words(AblateSettings, vars(settings))
    check_least(vars(settings), pictures=0, shift=0)
    spec, picture = settings.spec, settings.settle_picture()
    names = settings.blocks.split(",") if isinstance(settings.blocks, str) else settings.blocks
    blocks = block_names(names, spec.flux.depth, spec.flux.depth_single_blocks)
    steps = {"all": range(picture.num_steps), **windows(picture.num_steps)}
    kinds, of_windows, of_controls = (
        [kind for kind in some if kind != "none"]
        for some in (settings.kinds, settings.window_kinds, settings.control_kinds)
    )
    ablations = ablations_of(kinds, of_windows, of_controls, steps)
    if not ablations:
        raise FluxIRError("at least one kind of edit is needed: got none", hint=f"--kinds {','.join(KINDS[:4])}")
    prompts = _prompts(settings.prompts)[: settings.max_prompts or None]
    patches = [one.kind for one in ablations if one.kind in PATCHES]
    if patches and len(set(prompts)) < 2:
        raise FluxIRError(
            f"{patches[0]} takes what another prompt's run computed: got one prompt",
            hint="give more prompts, or leave the patches out of --kinds, --window_kinds and --control_kinds",
        )
    machine = settings.settle_machine(ranks=ranks)
    suite = settings.suite(machine, progress)
    shift = min(picture.grid.rows, picture.grid.columns) // 4 if settings.shift is None else settings.shift
    on_cpu = torch.device(machine.placement.transformer).type == "cpu"
    batch_size = CPU_BATCH if on_cpu else settings.batch_size
    work = WorkList(prompts, repeats=settings.repeats, seed=settings.seed)
    items = work.items(0, len(work))
    identity = identity_of_pictures(suite, picture) | {"shift": shift}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(settings.output_dir) / (settings.name or f"{spec.name}_{digest}")
    kept = [item.id for item in items[: settings.pictures]]
    progress(Note(f"{spec.name} on {machine}: {len(items)} pictures, {len(blocks)} blocks, {len(ablations)} edits"))
    return AblationJob(
        settings,
        suite,
        machine,
        picture,
        prompts,
        blocks,
        ablations,
        units_of(items, blocks, batch_size),
        AtlasFolder(folder, identity, kept),
        shift,
        batch_size,
    )


def _prompts(given: str | Path | Sequence[str] | None) -> list[str]:
    if given is None:
        return captions(CAPTIONS, CAPTION_SEED, "C")
    if isinstance(given, str | Path):
        return read_prompts(Path(given))
    if not given or not all(prompt.strip() for prompt in given):
        raise FluxIRError("prompts are texts that are not empty: got none, or an empty one", hint="leave it out")
    return [prompt.strip() for prompt in given]


# ---- The work


class Workshop:
    """What it takes to do units: the texts, encoded once, the model, and a network for each thread."""

    def __init__(self, job: AblationJob, stack: ExitStack, progress: Watch) -> None:
        self.job, self.suite, self.notes = job, job.suite, list[str]()
        with phase(progress, "text"), self.suite.text_encoders() as encoders:
            prompts = dict.fromkeys(job.prompts)
            self.texts = {one: encode(encoders.t5, encoders.clip, [one]) for one in prompts}
        self.network = stack.enter_context(self.suite.transformer())
        picture, dtype = job.picture, job.machine.compute.dtype
        autoencoder = stack.enter_context(self.suite.autoencoder())
        self.bench = Bench(autoencoder, picture.grid, picture.timesteps, picture.guidance, dtype, job.shift)
        lpips = find_lpips(job.machine.placement.transformer, picture.grid)
        if isinstance(lpips, str):
            self.notes.append(lpips)
            progress(Note(lpips))
        self.lpips = lpips if isinstance(lpips, Lpips) else None

    def work(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Does units of work, as many at once as there are networks; yields each when it is kept."""
        count = batches_under_way(self.network)
        networks = replicas(self.network, count)
        on_cpu = self.network.img_in.weight.device.type == "cpu"
        for _, group in groupby(units, key=lambda unit: unit.items):
            # A batch is begun with its unedited run, which every edit of it needs: by one thread, as all the others.
            some, threads = list(group), 1 if on_cpu else None
            (plain,) = in_order(partial(self._unedited, networks), some[:1], 1, torch_threads=threads)
            yield from in_order(partial(self._do, networks, plain), some, count, torch_threads=threads)

    def _unedited(self, networks: "SimpleQueue[Transformer]", unit: Unit) -> Run:
        with borrowed(networks) as network:
            return self.bench.unedited(network, self._batch(unit))

    def _do(self, networks: "SimpleQueue[Transformer]", plain: Run, unit: Unit) -> Unit:
        """What of a unit is missing: made, measured, and kept edit by edit."""
        job, batch = self.job, self._batch(unit)
        wanted = job.folder.missing(unit, job.ablations)
        judge = judge_of([item.prompt for item in unit.items], unit.others, job.picture.grid)
        with borrowed(networks) as network:
            for name, run in self._runs(network, unit, batch, plain, wanted):
                job.folder.keep(unit, name, measured(run, plain, judge, self.lpips), run.pictures)
        return unit

    def _runs(
        self, network: Transformer, unit: Unit, batch: Batch, plain: Run, wanted: Sequence[str]
    ) -> Iterator[tuple[str, Run]]:
        """The runs of these names, one after the other."""
        if unit.block is None:
            yield UNEDITED, plain
            if batch.other_text is not None:
                yield OTHER_PROMPT, self.bench.other(network, batch)[0]
            return
        ablations = [one for one in self.job.ablations if one.name in wanted]
        patched = [one.kind for one in ablations if one.kind in PATCHES]
        sites = sorted({site for kind in patched for site in sites_of(kind, unit.block)})
        other = self.bench.other(network, batch, sites)[1] if sites else None
        for ablation in ablations:
            yield ablation.name, self.bench.edited(network, batch, plain, unit.block, ablation, other)

    def _batch(self, unit: Unit) -> Batch:
        own = self._text([item.prompt for item in unit.items])
        other = None if unit.others is None else self._text(unit.others)
        return Batch(tuple(item.seed for item in unit.items), own, other)

    def _text(self, prompts: Sequence[str]) -> TextEmbedding:
        parts = zip(*(self.texts[prompt] for prompt in prompts), strict=True)
        return TextEmbedding(*(torch.cat(part) for part in parts))


# ---- What came of it


def conclude(job: AblationJob, notes: list[str]) -> Atlas:
    """The rows of all that was asked for, from the files of the units."""
    units = {unit: job.folder.read(unit) for unit in job.units}
    prompts = [item.prompt for unit in job.units if unit.block is None for item in unit.items]

    def numbers(block: str | None, name: str) -> list[dict[str, Any]]:
        return [one for unit, cells in units.items() if unit.block == block for one in cells[name]]

    plain = numbers(None, UNEDITED)
    rows = [
        row_of(block, ablation, numbers(block, ablation.name), plain, prompts)
        for block in job.blocks
        for ablation in job.ablations
    ]
    anchors = []
    if len(set(prompts)) > 1:
        anchors.append(row_of("other prompt", Ablation("patch_img"), numbers(None, OTHER_PROMPT), plain, prompts))
    some = [row for row in rows if row.lpips is None]
    if some and len(some) < len(rows):
        notes.append(f"note: {len(rows) - len(some)} of {len(rows)} rows have LPIPS: the others were made without it")
    folder = job.folder.path
    return Atlas(folder, rows, anchors, job.blocks, folder / TABLE, folder / DRAWN, folder / PAGE, notes)


def write(job: AblationJob, atlas: Atlas) -> None:
    """The table, the picture, the page, and all numbers."""
    spec, items = job.suite.spec, [item for unit in job.units if unit.block is None for item in unit.items]
    steps = {"all": range(job.picture.num_steps), **windows(job.picture.num_steps)}
    result = {
        "format": FORMAT,
        "model": spec.name,
        "identity": job.folder.identity,
        "shift": job.shift,
        "batch_size": job.batch_size,
        "windows": {name: list(some) for name, some in steps.items()},
        "kinds": {one.kind: KIND_TITLES[one.kind] for one in job.ablations},
        "blocks": job.blocks,
        "prompts": len(set(job.prompts)),
        "pictures": [
            {"id": item.id, "prompt": item.prompt, "seed": item.seed, "kept": item.id in job.folder.kept}
            for item in items
        ],
        "anchors": [row.to_json() for row in atlas.anchors],
        "rows": [row.to_json() for row in atlas.rows],
        "versions": versions("torch"),
    }
    write_rows(atlas.table, as_table(atlas.rows))
    subtitle = f"{len(items)} pictures of {len(set(job.prompts))} prompts, {job.picture.num_steps} steps"
    draw_atlas(atlas.picture, job.blocks, atlas.rows, f"What is each block of {spec.name} for?", subtitle)
    write_atlas_page(atlas.folder, result)
    write_json(atlas.folder / RESULT, result)  # last: where it is, all else is
