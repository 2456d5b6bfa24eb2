"""Judged autoencoders: their numbers as JSON, as pictures and as a table."""

import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flux_ir.commands.evaluate_sae import EvaluateSAEOptions
from flux_ir.errors import FluxIRError, counted
from flux_ir.layout import write_json
from flux_ir.sae.config import HAS_K, SAEConfig
from flux_ir.sae.held_out import Subject
from flux_ir.sae.metrics import Evaluation, Numbers, to_json
from flux_ir.sae.plots import Panel, Run, density_histogram, fvu_per_step, pareto, training_curves

CURVES = "curves.jsonl"
PANELS = (
    Panel("fvu", "FVU of the batch", log=True, percent=True),
    Panel("l0", "features that fire on a token (L0)"),
    Panel("dead_share", "dead features", percent=True),
    Panel("loss", "loss", log=True),
    Panel("auxiliary", "auxiliary loss"),
    Panel("learning_rate", "learning rate"),
)
NAMES = {"pca": "PCA", "random": "random directions", "itda": "data points (ITDA)", "neurons": "neurons"}


class Judged(NamedTuple):
    """One autoencoder with its numbers, and those of its baselines by their names."""

    folder: Path
    config: SAEConfig
    subject: Subject
    k: int
    """Of the baselines: the autoencoder's own k, or the nearest whole number to its L0."""
    evaluation: Evaluation
    baselines: dict[str, tuple[int, Evaluation]]
    """k, which may be less where there are not so many features, and the numbers."""
    splice: dict[str, Any] | None


def write_results(judged: Judged, options: EvaluateSAEOptions) -> None:
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
    write_json(folder / "metrics.json", as_json(judged, options))  # last: where it is, the pictures are


def as_json(judged: Judged, options: EvaluateSAEOptions) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    config = judged.config
    return {
        "sae": {name: getattr(config, name) for name in ("architecture", "d_in", "d_sae", "k", "seed")},
        "data": judged.subject.described()
        | {"captures": options.captures.name, "max_tokens": options.max_tokens, "fit_tokens": options.fit_tokens},
        **to_json(judged.evaluation),
        "baselines": {name: {"k": k, **to_json(found)} for name, (k, found) in judged.baselines.items()},
        "splice": judged.splice,
        "versions": {"flux_ir": import_module("flux_ir").__version__, "torch": torch.__version__},
    }


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The rows that training wrote, one JSON object a line; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except ValueError as error:
        raise FluxIRError(f"{path} must hold one JSON object a line: {error}", hint="delete it") from error


def draw_fronts(judged: Sequence[Judged]) -> dict[str, Path]:
    """One picture of L0 against FVU for each site, in the folder that holds all of the autoencoders."""
    common = Path(os.path.commonpath([one.folder.resolve().parent for one in judged]))
    sites = list(dict.fromkeys(place_of(one) for one in judged))
    written = {}
    for site in sites:
        here = [one for one in judged if place_of(one) == site]
        name = "pareto.png" if len(sites) == 1 else f"pareto_{site.split()[0]}.png"
        runs = [Run(family_of(one.config), *_l0_fvu(one.evaluation.overall)) for one in here]
        anchors = [
            Run(NAMES[name], *_l0_fvu(found.overall))
            for one in here
            for name, (_, found) in one.baselines.items()
            if name != "neurons"
        ]
        pareto(common / name, runs, "Sparsity against what is left unexplained", subtitle=site, anchors=anchors)
        written[f"front, {site}"] = common / name
    return written


def result_table(judged: Sequence[Judged]) -> list[str]:
    """One line per autoencoder and per baseline, and one per splice, under headings."""
    head = ("", "site", "features", "k", "L0", "FVU", "cosine", "dead")
    rows: list[tuple[str, ...]] = [head]
    for one in judged:
        config = one.config
        k = str(config.k) if config.architecture in HAS_K else ""
        rows.append((one.folder.name, place_of(one), str(config.d_sae), k, *_numbers(one.evaluation.overall)))
        rows += _without_outliers(one.evaluation)
        for name, (rank, found) in one.baselines.items():
            rows.append((f"  {NAMES[name]}", "", str(len(found.frequency)), str(rank), *_numbers(found.overall)))
            rows += _without_outliers(found)
    lines = _aligned(rows) + [line for one in judged for line in outlier_notes(one.folder.name, one.evaluation)]
    spliced: list[tuple[str, ...]] = [("spliced in", "velocity MSE", "of zero", "of mean", "picture [dB]")]
    for one in judged:
        for name, row in (one.splice or {"replacements": {}})["replacements"].items():
            recovered = [_share(row[f"recovered_from_{anchor}"]) for anchor in ("zero", "mean")]
            decibels = "" if row["image_psnr_db"] is None else f"{row['image_psnr_db']:.1f}"
            spliced.append((f"{one.folder.name}: {name}", f"{row['velocity_mse']:.3g}", *recovered, decibels))
    return lines + (["", *_aligned(spliced)] if len(spliced) > 1 else [])


def _without_outliers(found: Evaluation) -> list[tuple[str, ...]]:
    """A row with the numbers of the ordinary tokens alone, if there are others."""
    if found.outliers is None or not found.outliers.tokens:
        return []
    return [(f"  without {counted(found.outliers.tokens, 'outlier')}", "", "", "", *_numbers(found.outliers.overall))]


def outlier_notes(name: str, found: Evaluation) -> list[str]:
    """A line that says so, if a few tokens decide what the FVU is."""
    outliers = found.outliers
    if outliers is None or not found.decided_by_outliers:
        return []
    return [
        f"note: {name}: {outliers.tokens} of {found.overall.tokens} tokens are more than {outliers.factor:g} times as "
        f"long as the median and decide the FVU: it is {_share(found.overall.fvu)} with them and "
        f"{_share(outliers.overall.fvu)} without"
    ]


def describe(config: SAEConfig) -> str:
    """An autoencoder in a few words."""
    k = f", k {config.k}" if config.architecture in HAS_K else ""
    return f"{family_of(config)}{k}"


def family_of(config: SAEConfig) -> str:
    """What autoencoders of one line in the picture have in common."""
    return f"{config.architecture}, {config.d_sae:,} features"


def place_of(judged: Judged) -> str:
    """Where the activations come from, in words."""
    model = judged.config.model or judged.subject.source.model
    return str(judged.subject.site or "an array") + (f" of {model}" if model else "")


def _l0_fvu(numbers: Numbers) -> tuple[float, float]:
    return numbers.l0, numbers.fvu


def _numbers(numbers: Numbers) -> tuple[str, str, str, str]:
    return f"{numbers.l0:.1f}", _share(numbers.fvu), f"{numbers.cosine:.4f}", _share(numbers.dead_share)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns with two spaces between: the first to the left, the others to the right."""
    columns = []
    for place, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if place else cell.ljust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
