"""Evaluated autoencoders: their numbers as JSON and as pictures, in their folders."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flux_ir.api.arguments import check_least, check_words
from flux_ir.errors import FluxIRError
from flux_ir.files import versions, write_json
from flux_ir.models.compute_dtype import DtypeWord
from flux_ir.sae.architectures.config import HAS_K, SAEConfig
from flux_ir.sae.data.held_out import EvaluationData
from flux_ir.sae.evaluation.metrics import Evaluation, Numbers, to_json
from flux_ir.sae.evaluation.plots import (
    CurvePanel,
    ParetoPoint,
    density_histogram,
    fvu_per_step,
    pareto,
    training_curves,
)

BaselineName = Literal["pca", "random", "itda", "neurons"]
LEAST = {"splice_steps": 0} | dict.fromkeys(("max_tokens", "fit_tokens", "prompts", "splice_batch", "batch_tokens"), 1)
CURVES = "curves.jsonl"
PANELS = (
    CurvePanel("fvu", "FVU of the batch", log=True, percent=True),
    CurvePanel("l0", "features that fire on a token (L0)"),
    CurvePanel("dead_share", "dead features", percent=True),
    CurvePanel("loss", "loss", log=True),
    CurvePanel("auxiliary", "auxiliary loss"),
    CurvePanel("learning_rate", "learning rate"),
)
NAMES = {"pca": "PCA", "random": "random directions", "itda": "data points (ITDA)", "neurons": "neurons"}


@dataclass(frozen=True, kw_only=True)
class EvaluateSAESettings:
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
    device: str | None = None
    dtype: DtypeWord = "auto"
    checkpoint: str | Path | None = None
    ae_checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        check_words(EvaluateSAESettings, vars(self))
        check_least(LEAST, vars(self))
        if not 0 <= self.held_out < 1:
            raise FluxIRError(f"--held_out must be from 0 to below 1: got {self.held_out}", hint="pass 0.1 for a tenth")


class EvaluatedSAE(NamedTuple):
    """One autoencoder with its numbers, and those of its baselines by their names."""

    folder: Path
    config: SAEConfig
    subject: EvaluationData
    k: int
    """What the baselines have: the autoencoder's own k, or the nearest whole number to its L0."""
    evaluation: Evaluation
    baselines: dict[str, tuple[int, Evaluation]]
    """k, which may be less where there are not so many features, and the numbers."""
    splice: dict[str, Any] | None


def write_results(judged: EvaluatedSAE, settings: EvaluateSAESettings) -> None:
    """metrics.json and the pictures of one autoencoder, the same bytes for the same numbers."""
    folder, evaluation = judged.folder, judged.evaluation
    what = f"{describe(judged.config)}: {place_of(judged)}"
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
            NAMES[name]: {step: numbers.fvu for step, numbers in found.per_step.items()}
            for name, (_, found) in judged.baselines.items()
            if name != "neurons"  # they give back something else
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
        "data": judged.subject.described()
        | {
            "captures": Path(settings.captures).name,
            "max_tokens": settings.max_tokens,
            "fit_tokens": settings.fit_tokens,
        },
        **to_json(judged.evaluation),
        "baselines": {name: {"k": k, **to_json(found)} for name, (k, found) in judged.baselines.items()},
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
    sites = list(dict.fromkeys(place_of(one) for one in judged))
    written = {}
    for site in sites:
        here = [one for one in judged if place_of(one) == site]
        name = "pareto.png" if len(sites) == 1 else f"pareto_{site.split()[0]}.png"
        runs = [ParetoPoint(family_of(one.config), *_l0_fvu(one.evaluation.overall)) for one in here]
        anchors = [
            ParetoPoint(NAMES[name], *_l0_fvu(found.overall))
            for one in here
            for name, (_, found) in one.baselines.items()
            if name != "neurons"
        ]
        pareto(common / name, runs, "Sparsity against what is left unexplained", subtitle=site, anchors=anchors)
        written[f"front, {site}"] = common / name
    return written


def describe(config: SAEConfig) -> str:
    """An autoencoder in a few words."""
    k = f", k {config.k}" if config.architecture in HAS_K else ""
    return f"{family_of(config)}{k}"


def family_of(config: SAEConfig) -> str:
    """What autoencoders of one line in the picture have in common."""
    return f"{config.architecture}, {config.d_sae:,} features"


def place_of(judged: EvaluatedSAE) -> str:
    """Where the activations come from, in words."""
    model = judged.config.model or judged.subject.source.model
    return str(judged.subject.site or "an array") + (f" of {model}" if model else "")


def _l0_fvu(numbers: Numbers) -> tuple[float, float]:
    return numbers.l0, numbers.fvu
