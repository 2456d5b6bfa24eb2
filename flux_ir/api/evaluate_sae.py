"""How well autoencoders give back tokens they were not trained on, beside baselines; what that does to the model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flux_ir.activations.source import TokenSource, open_source
from flux_ir.api.evaluation_files import BaselineName, EvaluatedSAE, EvaluateSAESettings, write_results
from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.api.splicing import Splicer, recorded_dtype
from flux_ir.errors import FluxIRError
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.models.placement import plan
from flux_ir.models.registry import model_names
from flux_ir.sae.architectures.config import HAS_K
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.held_out import EvaluationData, EvaluationTokens, evaluation_data_of
from flux_ir.sae.evaluation.baselines import Baseline
from flux_ir.sae.evaluation.fit_baselines import BaselineFits, evaluate_neurons, neurons_of
from flux_ir.sae.evaluation.metrics import Evaluation, Group, evaluate, outlier_limits
from flux_ir.sae.files.formats import load_any, sae_folders
from flux_ir.sites import Site


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
    """The same, with its settings in one object."""
    folders = find_saes(settings.sae)
    judge, judged = Judge(settings, progress), list[EvaluatedSAE]()
    for folder in follow(progress, "evaluate", folders, total=len(folders)):
        judged.append(judge.judge(folder))
        write_results(judged[-1], settings)
    if settings.splice:  # a bar of its own for each, so not within the loop above
        for place, one in enumerate(judged):
            judged[place] = judge.splice(one)
            write_results(judged[place], settings)
    return judged


class Judge:
    """Judges autoencoders on one source; what several of them share is made once."""

    def __init__(self, settings: EvaluateSAESettings, progress: Watch) -> None:
        self.settings, self.progress = settings, progress
        self.source = open_source(settings.captures)
        placement = plan(torch.cuda.device_count(), device=settings.device)
        progress(Note(f"on {placement.transformer} ({placement.reason})"))
        self.device = torch.device(placement.transformer)
        self._fits: dict[str, BaselineFits] = {}
        self._limits: dict[str, Mapping[Group, float]] = {}
        self._baselines: dict[tuple[Any, ...], tuple[int, Evaluation]] = {}
        self._splicer: Splicer | None = None

    def judge(self, folder: Path) -> EvaluatedSAE:
        """All numbers of the autoencoder in a folder."""
        sae = self._load(folder, self.progress)
        subject = evaluation_data_of(sae, self.source, held_out=self.settings.held_out)
        self._check(folder, sae, subject)
        evaluation = self._evaluate(sae, sae.config.d_sae, subject)
        k = sae.config.k if sae.config.architecture in HAS_K else max(1, round(evaluation.overall.l0))
        key, fits, baselines = _key(subject), self._fits_for(subject), dict[str, tuple[int, Evaluation]]()
        for name in dict.fromkeys(self.settings.baselines or ()):
            shared = (name, key, k) if name in ("pca", "neurons") else (name, key, k, sae.config.d_sae)
            if shared not in self._baselines:
                self._baselines[shared] = self._baseline(name, subject, fits, k, sae.config.d_sae)
            baselines[name] = self._baselines[shared]
        return EvaluatedSAE(folder, sae.config, subject, k, evaluation, baselines, None)

    def _load(self, folder: Path, progress: Watch = unwatched) -> SparseAutoencoder:
        return load_for(folder, self.source, self.settings.site, progress).to(self.device)

    def _check(self, folder: Path, sae: SparseAutoencoder, subject: EvaluationData) -> None:
        """Raise what can be known before anything is computed; say what the numbers will not show."""
        if self.settings.splice:
            self._splicer_for(subject).check(subject)
        if "neurons" in (self.settings.baselines or ()):
            neurons_of(subject)
        if "split" not in sae.metadata and "held_out" not in sae.metadata:
            self.progress(Note(f"note: {folder} does not say what was held out: some tokens may have been trained on"))
        if subject.side == "training":
            self.progress(Note(f"note: nothing was held out from {folder}: it is measured on what it was trained on"))

    def splice(self, judged: EvaluatedSAE) -> EvaluatedSAE:
        """The same with what the model makes of its reconstructions."""
        sae, subject = self._load(judged.folder), judged.subject
        splicer = self._splicer_for(subject)
        return judged._replace(splice=splicer.measure(sae, subject, self._fits_for(subject), judged.k))

    def _fits_for(self, subject: EvaluationData) -> BaselineFits:
        settings = self.settings
        if _key(subject) not in self._fits:
            self._fits[_key(subject)] = BaselineFits(
                subject, fit_tokens=settings.fit_tokens, batch_tokens=settings.batch_tokens, device=self.device
            )
        return self._fits[_key(subject)]

    def _evaluate(self, reconstructor: SparseAutoencoder | Baseline, d_sae: int, subject: EvaluationData) -> Evaluation:
        limits = self._limits_for(subject)
        return evaluate(reconstructor, self._tokens(subject), d_sae=d_sae, device=self.device, limits=limits)

    def _limits_for(self, subject: EvaluationData) -> Mapping[Group, float]:
        """How long an outlier is, of each step and stream of the tokens that are measured on."""
        if _key(subject) not in self._limits:
            steps = subject.filters.steps_of(subject.source.steps)
            self._limits[_key(subject)] = outlier_limits(self._tokens(subject), steps)
        return self._limits[_key(subject)]

    def _tokens(self, subject: EvaluationData) -> Iterator[EvaluationTokens]:
        return subject.tokens(subject.side, self.settings.batch_tokens, self.settings.max_tokens)

    def _baseline(
        self, name: str, subject: EvaluationData, fits: BaselineFits, k: int, d_sae: int
    ) -> tuple[int, Evaluation]:
        if name == "neurons":
            with self._splicer_for(subject).suite.transformer() as model:
                neurons, found = evaluate_neurons(
                    model,
                    subject,
                    k,
                    fit_tokens=self.settings.fit_tokens,
                    batch_tokens=self.settings.batch_tokens,
                    max_tokens=self.settings.max_tokens,
                    device=self.device,
                )
            return neurons.config.k, found
        make = {
            "pca": lambda: fits.pca(k),
            "random": lambda: fits.random(d_sae, k),
            "itda": lambda: fits.itda(d_sae, k),
        }
        baseline = make[name]()
        return baseline.config.k, self._evaluate(baseline, baseline.config.d_sae, subject)

    def _splicer_for(self, subject: EvaluationData) -> Splicer:
        if self._splicer is None:
            self._splicer = Splicer(self.settings, self.source.model, recorded_dtype(subject), self.progress)
        return self._splicer


def _key(subject: EvaluationData) -> str:
    """What baselines of two autoencoders must have in common to be the same."""
    return json.dumps(subject.described())


def find_saes(paths: Sequence[Path]) -> list[Path]:
    """The folders of autoencoders among these and below them. Raises FluxIRError for a path that leads to none."""
    found: dict[Path, None] = {}
    for path in paths:
        below = sae_folders(path)
        if not below:
            raise FluxIRError(
                f"there is no autoencoder in {path}: no folder there has its weights",
                hint="name the folder that training left",
            )
        found |= dict.fromkeys(below)
    return list(found)


def load_for(folder: Path, source: TokenSource, asked: str | None, progress: Watch = unwatched) -> SparseAutoencoder:
    """The autoencoder of a folder, whichever program saved it, of the site that was asked for.

    Another site than the one it says it was trained on is noted.
    Raises FluxIRError if neither the autoencoder nor `asked`, which is --site, names a site of the captures.
    """
    sae = load_any(folder)
    if not source.sites:
        if asked is not None:
            raise FluxIRError(f"these activations have no sites: got --site {asked}", hint="leave --site out")
        return sae
    if asked is not None:
        # Other programs have other names for the models, so theirs cannot be compared with ours.
        model = sae.config.model if sae.config.model in model_names() else None
        trained_on = sae.config.site
        if trained_on is not None and _is_site(trained_on) and Site.parse(trained_on) != Site.parse(asked):
            progress(Note(f"note: {folder} was trained on {trained_on}, and is used on {asked}, as --site says"))
        sae.config = replace(sae.config, site=str(Site.parse(asked)), model=model)
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
