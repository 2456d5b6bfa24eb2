"""Transfer: what one prompt computes in a region, put into another prompt's picture by several methods, side by side.

    done = transfer("a large red circle on the left on a white background",
                    "a large blue circle on the left on a white background", sae="saes/mine", k=(1, 5, 20))
    done.table      a row per method, k and strength: how near to the edited prompt's picture, what the rest pays

Every picture is kept with its numbers as soon as it is made: the same call again makes what is missing.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.model_settings import (
    Machine,
    PictureSettings,
    SettledPicture,
    identity_of_pictures,
    note_trained_on_others,
)
from flux_ir.api.progress import Note, Watch, follow, phase, unwatched
from flux_ir.errors import FluxIRError, counted
from flux_ir.files import write_json
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.flux1.attention import AttentionWord
from flux_ir.models.placement import MultiGpuWord, OffloadWord
from flux_ir.models.quantisation import Method
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sampling.generate import check_steps
from flux_ir.sites import Site
from flux_ir.steering.dictionaries import saes_by_site
from flux_ir.steering.directions import tensors_digest
from flux_ir.steering.dose import Painter, Variant
from flux_ir.steering.pairs import Case, Pair, cases_of, read_pairs, region_of_case
from flux_ir.steering.regions import Grid, given_region
from flux_ir.steering.tradeoff import (
    EDITED,
    ORIGINAL,
    Area,
    TransferRow,
    TransferRun,
    areas,
    notes_of,
    score,
    tabulate_transfers,
)
from flux_ir.steering.transfer import METHODS, SWEPT, Difference, Reach, Values, compare_runs
from flux_ir.steering.transfer_folder import Setting, TransferFolder, described_case


@dataclass(frozen=True, kw_only=True)
class TransferSettings(PictureSettings):
    """What a transfer is asked for; see `transfer`. What is None is settled by the model, the machine or the pairs."""

    prompt: str | None = None
    edited_prompt: str | None = None
    sae: tuple[str | Path | SparseAutoencoder, ...] = ()
    pairs: str | Path | None = None
    k: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    strength: tuple[float, ...] = (0.5, 1.0, 2.0)
    values: Values = "spatial"
    region: tuple[int, ...] | None = None
    mask: str | Path | None = None
    above: float = 0.5
    steps: tuple[int, ...] | None = None
    seed: int = 0
    seeds: int = 4
    controls: int = 1
    batch_size: int = 8
    name: str | None = None
    output_dir: str | Path = "transfers"


class Transferred(NamedTuple):
    """What a transfer has written, and its numbers."""

    folder: Path
    table: list[TransferRow]
    areas: list[Area]
    """For each method the share of the plane that its points dominate; empty where the region is the whole picture."""
    numbers: Path
    csv: Path
    curve: Path | None
    """None: the region is the whole picture, so there is no rest to be moved."""
    pictures: Path
    notes: list[str]


class TransferJob(NamedTuple):
    """A transfer with every open question answered; nothing of the model is loaded yet."""

    settings: TransferSettings
    suite: Suite
    machine: Machine
    picture: SettledPicture
    steps: list[int]
    saes: dict[Site, SparseAutoencoder]
    pairs: list[Pair]


def transfer(
    prompt: str | None = None,
    edited_prompt: str | None = None,
    *,
    sae: str | Path | SparseAutoencoder | Sequence[str | Path | SparseAutoencoder],
    pairs: str | Path | None = None,
    model: str | Suite = "flux-schnell",
    k: int | Iterable[int] = (1, 2, 5, 10, 20, 40),
    strength: float | Iterable[float] = (0.5, 1.0, 2.0),
    values: Values = "spatial",
    region: Iterable[int] | None = None,
    mask: str | Path | None = None,
    above: float = 0.5,
    steps: Iterable[int] | None = None,
    seed: int = 0,
    seeds: int = 4,
    controls: int = 1,
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
    output_dir: str | Path = "transfers",
    progress: Watch = unwatched,
) -> Transferred:
    """Turn `prompt`'s picture into `edited_prompt`'s in a region, by the features of `sae` and by four other methods.

    Both are sampled from the same noise and read at the autoencoders' sites. The `k` features whose share in the region
    is larger in the original by most are subtracted, and the `k` whose share is larger in the edited run are added, at
    every `strength`. Beside them stand whole activations, neurons, the mean difference and `controls` draws of random
    features. `pairs` is a .jsonl file of many such prompts. The region is a rectangle, a `mask` (`above` a threshold),
    or, for captions of flux-tiny, where the judge finds the objects whose words differ.

    Goes into a folder below `output_dir`, named by `name` or by the settings; the same call again goes on with what is
    there. Raises FluxIRError for what a user can mend, before a weight is loaded where that is possible.
    """
    several = sae if isinstance(sae, Sequence) and not isinstance(sae, str) else (sae,)
    settings = TransferSettings(
        prompt=prompt,
        edited_prompt=edited_prompt,
        sae=tuple(several),
        pairs=pairs,
        model=model,
        k=_tuple(k),
        strength=_tuple(strength),
        values=values,
        region=None if region is None else _tuple(region),
        mask=mask,
        above=above,
        steps=None if steps is None else _tuple(steps),
        seed=seed,
        seeds=seeds,
        controls=controls,
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
    return run_transfer(settings, progress)


def run_transfer(settings: TransferSettings, progress: Watch = unwatched) -> Transferred:
    """The same, with its settings in one object."""
    job = settle(settings, progress)
    identity = identity_of(job)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = TransferFolder(Path(settings.output_dir) / (settings.name or f"{job.suite.spec.name}_{digest}"), identity)
    cases = list(cases_of(job.pairs, settings.seed, settings.seeds))
    wanted = settings_of(job)
    missing = [case for case in cases if not is_complete(folder, case, wanted)]
    if missing:
        texts = texts_of(job, missing, progress)
        with job.suite.transformer() as model, job.suite.autoencoder() as autoencoder:
            painter = Painter(
                model,
                autoencoder,
                job.picture.grid,
                job.picture.timesteps,
                job.picture.guidance,
                job.machine.compute.dtype,
                meter=None,
                batch=settings.batch_size,
            )
            total = len(missing) * (len(wanted) + 2)
            made = (run for case in missing for run in make_case(job, folder, painter, case, texts, wanted, progress))
            for _ in follow(progress, "pictures", made, total=total):
                pass
    runs = [folder.read(case.name, name) for case in cases for name in (ORIGINAL, EDITED, *(s.name for s in wanted))]
    return written(job, folder, cases, runs, progress)


# ---- What is asked for


def settle(settings: TransferSettings, progress: Watch) -> TransferJob:
    """Answer every question that is left open, and find the files. Raises FluxIRError for what a user can mend."""
    check_words(TransferSettings, {name: getattr(settings, name) for name in ("values", "dtype")})
    check_least(vars(settings))
    check_sweeps(settings)
    pairs = pairs_of(settings)
    spec, picture = settings.spec, settings.settle_picture()
    steps, machine = check_steps(settings.steps, picture.num_steps), settings.settle_machine()
    check_regions(settings, pairs, picture.grid)
    saes = saes_by_site(settings.sae, spec, machine.placement.transformer)
    texts = [str(site) for site in saes if site.stream == "txt"]
    if texts and any(pair.region is not None for pair in pairs):
        raise FluxIRError(
            f"a place on the picture is no region of text tokens: got an autoencoder of {texts[0]}",
            hint="leave out the region, or use autoencoders of image tokens",
        )
    suite = settings.suite(machine, progress)
    note_trained_on_others({f"the autoencoder of {site}": sae for site, sae in saes.items()}, suite, progress)
    for note in (f"{spec.name} on {machine}", *machine.notes(saes)):
        progress(Note(note))
    return TransferJob(settings, suite, machine, picture, steps, saes, pairs)


def check_sweeps(settings: TransferSettings) -> None:
    """Raises FluxIRError for a sweep of nothing, and for strengths that are no numbers or lead away."""
    for name in ("k", "strength", "sae"):
        if not getattr(settings, name):
            raise FluxIRError(f"a transfer has at least one {name}: got none", hint=f"--{name} says which")
    for strength in settings.strength:
        if not (math.isfinite(strength) and strength >= 0):
            raise FluxIRError(
                f"--strength must be finite and at least 0: got {strength}",
                hint="1 sets each unit to its value in the edited run",
            )


def pairs_of(settings: TransferSettings) -> list[Pair]:
    """The pairs that are meant. Raises FluxIRError where they are given twice, or not at all."""
    here = [name for name in ("prompt", "edited_prompt", "region", "mask") if getattr(settings, name) is not None]
    if settings.pairs is not None:
        if here:
            raise FluxIRError(
                f"--pairs says everything about the prompts: got --{here[0]} as well", hint="write it into the file"
            )
        return read_pairs(Path(settings.pairs))
    if settings.prompt is None or settings.edited_prompt is None:
        lacking = "prompt" if settings.prompt is None else "edited_prompt"
        raise FluxIRError(
            f"a transfer is from one prompt to another: got no --{lacking}",
            hint='--prompt "a red circle" --edited_prompt "a blue circle", or --pairs FILE.jsonl',
        )
    region = given_region(settings.region, settings.mask, settings.above)
    return [Pair(prompt=settings.prompt, edited_prompt=settings.edited_prompt, region=region)]


def check_regions(settings: TransferSettings, pairs: Sequence[Pair], grid: Grid) -> None:
    """Raises FluxIRError for a region that does not fit the picture or has no token, naming the pair."""
    for number, pair in enumerate(pairs, start=1):
        whose = "" if settings.pairs is None else f"pair {number}: "
        try:
            empty = pair.region is not None and not pair.region.mask("img", grid.tokens, grid).any()
        except FluxIRError as error:
            raise FluxIRError(f"{whose}{error.message}", hint=error.hint) from error
        if empty:
            raise FluxIRError(f"{whose}the region has no token", hint="raise the mask, or lower --above")


# ---- The pictures


def settings_of(job: TransferJob) -> list[Setting]:
    """Every point of every method."""
    settings = []
    for method in METHODS:
        ks = job.settings.k if method in SWEPT else (None,)
        draws = range(job.settings.controls if method == "random" else 1)
        settings += [Setting(method, k, s, draw) for k in ks for s in job.settings.strength for draw in draws]
    return list(dict.fromkeys(settings))


def is_complete(folder: TransferFolder, case: Case, wanted: Sequence[Setting]) -> bool:
    """Whether every picture of a case is there with its numbers."""
    return all(folder.has(case.name, name) for name in (ORIGINAL, EDITED, *(setting.name for setting in wanted)))


def texts_of(job: TransferJob, cases: Sequence[Case], progress: Watch) -> dict[str, TextEmbedding]:
    """What the transformer is told of each prompt. Prompts that are cut, or have unknown words, are noted."""
    prompts = dict.fromkeys(prompt for case in cases for prompt in (case.pair.prompt, case.pair.edited_prompt))
    with job.suite.text_encoders() as encoders:
        for prompt in prompts:
            for line in dict.fromkeys(note for encoder in encoders for note in encoder.notes(prompt)):
                progress(Note(f"note: {prompt[:40]!r}: {line}"))
        return {
            prompt: encode(encoders.t5, encoders.clip, [prompt])
            for prompt in follow(progress, "text", prompts, total=len(prompts))
        }


def make_case(
    job: TransferJob,
    folder: TransferFolder,
    painter: Painter,
    case: Case,
    texts: dict[str, TextEmbedding],
    wanted: Sequence[Setting],
    progress: Watch,
) -> Iterator[None]:
    """Makes what a case lacks, and keeps each picture with its numbers as soon as it is made; one None for each."""
    settings = job.settings
    original, edited = (
        Variant(row, 0.0, case.seed, texts[prompt], None)
        for row, prompt in ((ORIGINAL, case.pair.prompt), (EDITED, case.pair.edited_prompt))
    )
    before, after = painter.make([original, edited])
    judge = all(site.stream != "txt" for site in job.saes)
    inside, where = region_of_case(case, before, after, job.picture.grid, judge=judge)
    if where is not None:
        progress(Note(f"{case.name}: {where}"))
    reach = Reach(inside, frozenset(job.steps))
    difference = compare_runs(
        painter,
        original,
        edited,
        job.saes,
        reach,
        txt_tokens=original.text.txt.shape[1],
        most=max(settings.k),
        draws=settings.controls,
        key=f"{case.pair.prompt}\n{case.pair.edited_prompt}\n{case.seed}",
        values=settings.values,
    )
    write_json(folder.case(case.name) / "case.json", described_case(case, inside, where, difference))
    for row, made in ((ORIGINAL, before), (EDITED, after)):
        scored = score(made, before, after, inside, job.picture.grid)
        folder.keep(TransferRun(case.name, case.pair_number, row, None, None, 0.0, 0, scored), row, made)
        yield
    missing = [setting for setting in wanted if not folder.has(case.name, setting.name)]
    variants = [
        Variant(
            setting.method,
            setting.strength,
            case.seed,
            original.text,
            difference.edits(setting.method, setting.strength, setting.k, setting.draw),
        )
        for setting in missing
    ]
    for setting, made in zip(missing, painter.make(variants), strict=True):
        run = TransferRun(
            case.name,
            case.pair_number,
            setting.method,
            setting.k,
            used_units(difference, setting),
            setting.strength,
            setting.draw,
            score(made, before, after, inside, job.picture.grid),
        )
        folder.keep(run, setting.name, made)
        yield
    yield from [None] * (len(wanted) - len(missing))


def used_units(difference: Difference, setting: Setting) -> int | None:
    """How many units of each kind a point has moved, of the kind that has more."""
    if setting.k is None:
        return None
    chosen = difference.chosen[setting.method, setting.draw].first(setting.k)
    return max(len(chosen.subtracted), len(chosen.added))


# ---- What is written


def written(
    job: TransferJob, folder: TransferFolder, cases: Sequence[Case], runs: Sequence[TransferRun], progress: Watch
) -> Transferred:
    """The table, the curve and the sheet of what is there."""
    settings = job.settings
    rows, dominated = tabulate_transfers(runs), areas(runs)
    notes = notes_of(runs, len(cases))
    for note in notes:
        progress(Note(note))
    asked = {
        "pairs": [[pair.prompt, pair.edited_prompt] for pair in job.pairs],
        "seeds": [case.seed for case in cases],
        "k": list(settings.k),
        "strength": list(settings.strength),
    }
    with phase(progress, "figures"):
        folder.write_numbers(asked, runs, rows, dominated)
        first = job.pairs[0]
        title = (
            f"{first.prompt}: {first.edited_prompt}" if len(job.pairs) == 1 else f"{len(job.pairs)} pairs of prompts"
        )
        sites = ", ".join(map(str, job.saes))
        if drawn := any(row.outside is not None for row in rows):
            means = "mean and 95 % interval over " + (
                counted(settings.seeds, "noise") if len(job.pairs) == 1 else counted(len(job.pairs), "pair")
            )
            curve_title = "Transfer: near the edited prompt's picture, the rest left alone"
            folder.draw_curve(curve_title, f"{job.suite.spec.name}, {sites}; {means}", rows)
        labels = {
            f"seed {case.seed}" if len(job.pairs) == 1 else f"pair {case.pair_number}, seed {case.seed}": case.name
            for case in cases
        }
        folder.draw_pictures(title, labels, rows)
    curve = folder.curve if drawn else None
    return Transferred(folder.path, rows, dominated, folder.numbers, folder.table, curve, folder.sheet, notes)


def identity_of(job: TransferJob) -> dict[str, Any]:
    """What the pictures' bits depend on, but for seeds, k and strengths: any of these may be added later."""
    grid = job.picture.grid

    def region(pair: Pair) -> list[int] | None:
        return None if pair.region is None else pair.region.mask("img", grid.tokens, grid).nonzero()[0].tolist()

    return {
        **identity_of_pictures(job.suite, job.picture),
        "pairs": [[pair.prompt, pair.edited_prompt, region(pair)] for pair in job.pairs],
        "autoencoders": {
            str(site): [sae.config.architecture, sae.config.k, tensors_digest(*sae.state_dict().values())]
            for site, sae in job.saes.items()
        },
        "values": job.settings.values,
        "steps": job.steps,
    }


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)
