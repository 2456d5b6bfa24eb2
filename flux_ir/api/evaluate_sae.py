"""How well autoencoders reconstruct tokens they were not trained on, beside baselines; what that does to the model.

One evaluation, top to bottom: `run_evaluation` takes each folder, `Judge.judge` measures it on held-out tokens and
beside baselines, `Judge.splice` puts its reconstructions back into the model (`splicing` runs it), and `write_results`
leaves metrics.json and pictures. The numbers are defined in `sae.evaluation.metrics`.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flux_ir.activations.blocks import changes_of
from flux_ir.activations.source import TokenSource, open_source
from flux_ir.api.arguments import check_least, check_words
from flux_ir.api.model_settings import ModelSettings, as_captured, note_other_model
from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.api.splicing import Splicer, recorded_dtype
from flux_ir.errors import FluxIRError
from flux_ir.files import versions, write_json
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.placement import plan
from flux_ir.models.registry import model_names
from flux_ir.sae.architectures.config import HAS_K, SAEConfig
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.held_out import EvaluationData, EvaluationTokens, evaluation_data_of
from flux_ir.sae.evaluation.baselines import Baseline, BaselineFits, BaselineName, evaluate_neurons, neurons_of
from flux_ir.sae.evaluation.metrics import Evaluation, Group, Numbers, evaluate, outlier_limits, to_json
from flux_ir.sae.evaluation.plots import (
    CurvePanel,
    ParetoPoint,
    density_histogram,
    fvu_per_step,
    pareto,
    training_curves,
)
from flux_ir.sae.evaluation.splice import mean_ablation, reconstruction, zero_ablation
from flux_ir.sae.files.formats import load_any, sae_folders
from flux_ir.sites import Site

CURVES = "curves.jsonl"
PANELS = (
    CurvePanel("fvu", "FVU of the batch", log=True, percent=True),
    CurvePanel("l0", "features that fire on a token (L0)"),
    CurvePanel("dead_share", "dead features", percent=True),
    CurvePanel("loss", "loss", log=True),
    CurvePanel("auxiliary", "auxiliary loss"),
    CurvePanel("learning_rate", "learning rate"),
)
BASELINE_NAMES = {"pca": "PCA", "random": "random directions", "itda": "data points (ITDA)", "neurons": "neurons"}


@dataclass(frozen=True, kw_only=True)
class EvaluateSAESettings(ModelSettings):
    """The arguments of `evaluate_sae`, which says what they mean."""

    sae: tuple[Path, ...]
    captures: str | Path
    site: str | None = None
    baselines: tuple[BaselineName, ...] | None = ("pca",)
    max_tokens: int | None = None
    fit_tokens: int = 200_000
    held_out: float = 0.1
    splice: bool = False
    prompts: int = 16
    splice_steps: tuple[int, ...] | None = None
    pictures: bool = True
    splice_batch: int = 4
    model: str | None = None
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        check_words(EvaluateSAESettings, vars(self))
        check_least(vars(self))
        if not 0 <= self.held_out < 1:
            raise FluxIRError(f"--held_out must be from 0 to below 1: got {self.held_out}", hint="pass 0.1 for a tenth")


class EvaluatedSAE(NamedTuple):
    """One autoencoder with its numbers, and those of its baselines by their names."""

    folder: Path
    config: SAEConfig
    data: EvaluationData
    k: int
    """What the baselines have: the autoencoder's own k, or the nearest whole number to its L0."""
    evaluation: Evaluation
    baselines: dict[BaselineName, tuple[int, Evaluation]]
    """k, which may be less where there are not so many features, and the numbers."""
    splice: dict[str, Any] | None


def evaluate_sae(
    sae: str | Path | Sequence[str | Path],
    captures: str | Path,
    *,
    site: str | Site | None = None,
    baselines: BaselineName | Sequence[BaselineName] | None = ("pca",),
    max_tokens: int | None = None,
    fit_tokens: int = 200_000,
    held_out: float = 0.1,
    splice: bool = False,
    prompts: int = 16,
    splice_steps: Sequence[int] | None = None,
    pictures: bool = True,
    splice_batch: int = 4,
    model: str | None = None,
    batch_tokens: int = 4096,
    device: str | None = None,
    dtype: DtypeWord = "auto",
    checkpoint: str | Path | None = None,
    ae_checkpoint: str | Path | None = None,
    progress: Watch = unwatched,
) -> list[EvaluatedSAE]:
    """Measure autoencoders on tokens they were not trained on; their folders get metrics.json and pictures as well.

    `sae` are folders of autoencoders, of whichever program, or folders of such folders; `captures` is what
    `open_source` takes. `site` is for an autoencoder that does not say its own; `held_out` for one that does not say
    what it was trained on. The numbers, `evaluation.overall.fvu` and so on, are those of at most `max_tokens`; the
    `baselines` have the same k and are made from at most `fit_tokens`.

    With `splice` the reconstructions are also put back into the model, at `splice_steps` of `prompts` held-out
    generations, `splice_batch` at a time, and with `pictures` to the end; `model`, `dtype`, `checkpoint` and
    `ae_checkpoint` say which model, None the one that was captured.

    Raises FluxIRError for what a user can mend.
    """
    folders = [sae] if isinstance(sae, str | Path) else list(sae)
    settings = EvaluateSAESettings(
        sae=tuple(map(Path, folders)),
        captures=captures,
        site=None if site is None else str(site),
        baselines=(baselines,) if isinstance(baselines, str) else tuple(baselines or ()),
        max_tokens=max_tokens,
        fit_tokens=fit_tokens,
        held_out=held_out,
        splice=splice,
        prompts=prompts,
        splice_steps=None if splice_steps is None else tuple(splice_steps),
        pictures=pictures,
        splice_batch=splice_batch,
        model=model,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        checkpoint=checkpoint,
        ae_checkpoint=ae_checkpoint,
    )
    return run_evaluation(settings, progress)


def run_evaluation(settings: EvaluateSAESettings, progress: Watch = unwatched) -> list[EvaluatedSAE]:
    """`evaluate_sae` with its settings in one object."""
    folders = find_saes(settings.sae)
    judge, judged = Judge(settings, progress), list[EvaluatedSAE]()
    for folder in follow(progress, "evaluate", folders, total=len(folders)):
        judged.append(judge.judge(folder))
        write_results(judged[-1], settings)
    if settings.splice:  # a bar of its own for each, so not within the loop above
        for index, one in enumerate(judged):
            judged[index] = judge.splice(one)
            write_results(judged[index], settings)
    return judged


class Judge:
    """Judges autoencoders on one source; those that are judged on the same tokens share limits and baselines."""

    def __init__(self, settings: EvaluateSAESettings, progress: Watch) -> None:
        self.settings, self.progress = settings, progress
        self.source = open_source(settings.captures)
        placement = plan(torch.cuda.device_count(), device=settings.device)
        progress(Note(f"on {placement.transformer} ({placement.reason})"))
        self.device = torch.device(placement.transformer)
        self._sets: dict[str, EvaluationSet] = {}
        self._splicer: Splicer | None = None

    def judge(self, folder: Path) -> EvaluatedSAE:
        """All numbers of the autoencoder in a folder."""
        # The held-out tokens, chosen as the autoencoder's own training chose them.
        sae = load_for(folder, self.source, self.settings.site, self.progress).to(self.device)
        data = evaluation_data_of(sae, self.source, held_out=self.settings.held_out)
        self._check(folder, sae, data)
        tokens = self._set_of(data)
        # FVU, L0, cosine, dead features and density; without outliers too.
        evaluation = tokens.evaluate(sae, sae.config.d_sae)
        # The same numbers of baselines with as many active features.
        k = sae.config.k if sae.config.architecture in HAS_K else max(1, round(evaluation.overall.l0))
        baselines = {
            name: self._baseline(name, tokens, k, sae.config.d_sae)
            for name in dict.fromkeys(self.settings.baselines or ())
        }
        return EvaluatedSAE(folder, sae.config, data, k, evaluation, baselines, None)

    def splice(self, judged: EvaluatedSAE) -> EvaluatedSAE:
        """Add what the model makes of the reconstructions, beside those of PCA, the mean and zeros."""
        sae = load_for(judged.folder, self.source, self.settings.site).to(self.device)
        fits = self._set_of(judged.data).fits
        replacements = {
            "sae": reconstruction(sae, sae.config.d_sae),
            "sae_with_error": reconstruction(sae, sae.config.d_sae, keep_error=True),
            "pca": reconstruction(fits.pca(judged.k), judged.k),
            "mean": mean_ablation(fits.mean),
            "zero": zero_ablation,
        }
        splicer = self._splicer_for(judged.data)
        return judged._replace(splice=splicer.measure(judged.data, replacements, self.settings.prompts))

    def _check(self, folder: Path, sae: SparseAutoencoder, data: EvaluationData) -> None:
        """Raises FluxIRError for what is known before anything is computed; notes what the numbers do not show."""
        if self.settings.splice:
            self._splicer_for(data).check(data)
        if "neurons" in (self.settings.baselines or ()):
            neurons_of(data)
        if "split" not in sae.metadata and "held_out" not in sae.metadata:
            self.progress(Note(f"note: {folder} does not say what was held out: some tokens may have been trained on"))
        if data.side == "training":
            self.progress(Note(f"note: nothing was held out from {folder}: it is measured on what it was trained on"))

    def _baseline(self, name: BaselineName, tokens: "EvaluationSet", k: int, d_sae: int) -> tuple[int, Evaluation]:
        """The k and the numbers of a baseline; made once for all autoencoders it is the same for."""
        key = (name, k) if name in ("pca", "neurons") else (name, k, d_sae)
        if key not in tokens.baselines:
            if name == "neurons":
                with self._splicer_for(tokens.data).suite.transformer() as model:
                    neurons, numbers = evaluate_neurons(
                        model,
                        tokens.data,
                        k,
                        fit_tokens=self.settings.fit_tokens,
                        batch_tokens=self.settings.batch_tokens,
                        max_tokens=self.settings.max_tokens,
                        device=self.device,
                    )
                tokens.baselines[key] = neurons.config.k, numbers
            else:
                baseline = tokens.fits.make(name, d_sae, k)
                tokens.baselines[key] = baseline.config.k, tokens.evaluate(baseline, baseline.config.d_sae)
        return tokens.baselines[key]

    def _set_of(self, data: EvaluationData) -> "EvaluationSet":
        key = json.dumps(data.described())  # what two autoencoders must have in common to be measured alike
        return self._sets.setdefault(key, EvaluationSet(data, self.settings, self.device))

    def _splicer_for(self, data: EvaluationData) -> Splicer:
        settings = self.settings
        if self._splicer is None:
            self._splicer = Splicer(
                as_captured(
                    ModelSettings(model=settings.model or self.source.model, **settings.model_choices()), self.source
                ),
                recorded_dtype(data),
                steps=settings.splice_steps,
                batch_size=settings.splice_batch,
                pictures=settings.splice and settings.pictures,
                progress=self.progress,
            )
        return self._splicer


class EvaluationSet:
    """The tokens that one or several autoencoders are judged on, and what is made from them once."""

    def __init__(self, data: EvaluationData, settings: EvaluateSAESettings, device: torch.device) -> None:
        self.data, self.settings, self.device = data, settings, device
        self.fits = BaselineFits(
            data, fit_tokens=settings.fit_tokens, batch_tokens=settings.batch_tokens, device=device
        )
        self.baselines: dict[tuple[Any, ...], tuple[int, Evaluation]] = {}

    def evaluate(self, reconstructor: SparseAutoencoder | Baseline, d_sae: int) -> Evaluation:
        """The numbers of an autoencoder or a baseline on these tokens."""
        return evaluate(reconstructor, self._tokens(), d_sae=d_sae, device=self.device, limits=self.limits)

    @cached_property
    def limits(self) -> Mapping[Group, float]:
        """How long an outlier is, of each step and stream of the tokens that are measured on."""
        return outlier_limits(self._tokens(), self.data.filters.steps_of(self.data.source.steps))

    def _tokens(self) -> Iterator[EvaluationTokens]:
        return self.data.tokens(self.data.side, self.settings.batch_tokens, self.settings.max_tokens)


# ---- The autoencoders


def find_saes(paths: Sequence[Path]) -> list[Path]:
    """The folders of autoencoders among these and below them. Raises FluxIRError for a path that leads to none."""
    folders: dict[Path, None] = {}
    for path in paths:
        below = sae_folders(path)
        if not below:
            raise FluxIRError(
                f"there is no autoencoder in {path}: no folder there has its weights",
                hint="name the folder that training left",
            )
        folders |= dict.fromkeys(below)
    return list(folders)


def load_for(folder: Path, source: TokenSource, site: str | None, progress: Watch = unwatched) -> SparseAutoencoder:
    """The autoencoder of a folder, whichever program saved it, of the `site` that is asked for.

    Another site than the one it says it was trained on is noted, and so is a model with other LoRAs or quantisation.
    Raises FluxIRError if neither the autoencoder nor `site`, which is --site, names a site of the captures.
    """
    sae = load_any(folder)
    note_other_model(str(folder), sae, changes_of(source), "these captures are of", progress)
    if not source.sites:
        if site is not None:
            raise FluxIRError(f"these activations have no sites: got --site {site}", hint="leave --site out")
        return sae
    if site is not None:
        # Other programs have other names for the models, so theirs cannot be compared with ours.
        model = sae.config.model if sae.config.model in model_names() else None
        trained_on = sae.config.site
        if trained_on is not None and _is_site(trained_on) and Site.parse(trained_on) != Site.parse(site):
            progress(Note(f"note: {folder} was trained on {trained_on}, and is used on {site}, as --site says"))
        sae.config = replace(sae.config, site=str(Site.parse(site)), model=model)
    elif sae.config.site is None or not _is_site(sae.config.site):
        named = f"the site {sae.config.site!r}, which FLUX does not have" if sae.config.site else "no site"
        raise FluxIRError(
            f"{folder} names {named}, and these captures have sites",
            hint=f"say which it is of, such as --site {source.sites[-1]}",
        )
    return sae


def _is_site(name: str) -> bool:
    try:
        Site.parse(name)
    except FluxIRError:
        return False
    return True


# ---- The files


def write_results(judged: EvaluatedSAE, settings: EvaluateSAESettings) -> None:
    """metrics.json and the pictures of one autoencoder, the same bytes for the same numbers."""
    folder, evaluation = judged.folder, judged.evaluation
    what = f"{describe(judged.config)}: {origin_of(judged)}"
    density_histogram(folder / "density.png", evaluation.density, "How often features fire", subtitle=what)
    fvu_per_step(
        folder / "fvu_per_step.png",
        {
            stream: {step: n.fvu for (step, of), n in evaluation.per_group.items() if of == stream}
            for stream in evaluation.per_stream
        },
        "What is left unexplained",
        subtitle=what,
        anchors={
            BASELINE_NAMES[name]: {step: numbers.fvu for step, numbers in measured.per_step.items()}
            for name, (_, measured) in judged.baselines.items()
            if name != "neurons"  # they reconstruct the feed-forward branch, which is something else
        },
    )
    rows = read_curves(folder / CURVES)
    if len(rows) > 1:
        training_curves(folder / "curves.png", rows, PANELS, "Training", subtitle=what)
    write_json(folder / "metrics.json", as_json(judged, settings))  # last: where it is, the pictures are


def as_json(judged: EvaluatedSAE, settings: EvaluateSAESettings) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    config = judged.config
    return {
        "sae": {name: getattr(config, name) for name in ("architecture", "d_in", "d_sae", "k", "seed")},
        "data": judged.data.described()
        | {
            "captures": Path(settings.captures).name,
            "max_tokens": settings.max_tokens,
            "fit_tokens": settings.fit_tokens,
        },
        **to_json(judged.evaluation),
        "baselines": {name: {"k": k, **to_json(measured)} for name, (k, measured) in judged.baselines.items()},
        "splice": judged.splice,
        "versions": versions("torch"),
    }


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The rows that training wrote, one JSON object a line; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except ValueError as error:
        raise FluxIRError(f"{path} must hold one JSON object a line: {error}", hint="delete it") from error


def draw_fronts(judged: Sequence[EvaluatedSAE]) -> dict[str, Path]:
    """One picture of L0 against FVU for each site, in the folder that holds all of the autoencoders."""
    common = Path(os.path.commonpath([one.folder.resolve().parent for one in judged]))
    sites = list(dict.fromkeys(origin_of(one) for one in judged))
    written = {}
    for site in sites:
        members = [one for one in judged if origin_of(one) == site]
        file = "pareto.png" if len(sites) == 1 else f"pareto_{site.split()[0]}.png"
        points = [ParetoPoint(family_of(one.config), *_l0_fvu(one.evaluation.overall)) for one in members]
        anchors = [
            ParetoPoint(BASELINE_NAMES[name], *_l0_fvu(measured.overall))
            for one in members
            for name, (_, measured) in one.baselines.items()
            if name != "neurons"
        ]
        pareto(common / file, points, "Sparsity against what is left unexplained", subtitle=site, anchors=anchors)
        written[f"front, {site}"] = common / file
    return written


def describe(config: SAEConfig) -> str:
    """An autoencoder in a few words."""
    k = f", k {config.k}" if config.architecture in HAS_K else ""
    return f"{family_of(config)}{k}"


def family_of(config: SAEConfig) -> str:
    """What autoencoders of one line in the picture have in common."""
    return f"{config.architecture}, {config.d_sae:,} features"


def origin_of(judged: EvaluatedSAE) -> str:
    """Where the activations come from, in words."""
    model = judged.config.model or judged.data.source.model
    return str(judged.data.site or "an array") + (f" of {model}" if model else "")


def _l0_fvu(numbers: Numbers) -> tuple[float, float]:
    return numbers.l0, numbers.fvu
