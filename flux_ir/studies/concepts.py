"""The best feature of each concept, and how well it tells the concept, where the answer is known.

A feature is picked on one set of pictures and reported on another that shares no prompt with it. Beside it stand rows
of other readers (`rows`), and a null: the same pick under label maps that were permuted between pictures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from flux_ir.sae.architectures.config import HAS_K, SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.studies.auroc import auroc
from flux_ir.studies.labelled_tokens import FeatureBoard, LabelledTokens
from flux_ir.studies.labels import LEVELS, NEGATIVES, Labels, Task, check_apart
from flux_ir.studies.rows import (
    Answer,
    Bench,
    FeatureRows,
    Space,
    best_directions,
    best_of,
    mean_differences,
    principal_axes,
    probes,
    random_directions,
)

LEAST_POSITIVES = 200
"""With fewer positives, or negatives, to report on there is no number; half as many are enough to pick with."""
RowName = Literal[
    "sae",
    "k_sparse_1",
    "k_sparse_2",
    "k_sparse_5",
    "untrained",
    "neurons",
    "pca",
    "random",
    "mean_difference",
    "input_axes",
    "input_probe",
    "probe",
    "shuffled",
    "null",
]
ROWS: tuple[RowName, ...] = get_args(RowName)
ROW_TITLES: dict[RowName, str] = {
    "sae": "best feature",
    "k_sparse_1": "1 feature",
    "k_sparse_2": "2 features",
    "k_sparse_5": "5 features",
    "untrained": "untrained",
    "neurons": "neuron",
    "pca": "PCA axis",
    "random": "random",
    "mean_difference": "mean diff.",
    "input_axes": "noisy input",
    "input_probe": "its probe",
    "probe": "full probe",
    "shuffled": "shuffled",
    "null": "null 95 %",
}
OF_THE_SAE: tuple[RowName, ...] = ("sae", "k_sparse_1", "k_sparse_2", "k_sparse_5", "null")
"""The rows that depend on the autoencoder; others are the same for all that read one site."""


class BestFeature(NamedTuple):
    """The feature that tells a concept best, with its sign: -1 if it is smaller where the concept is present."""

    task: Task
    feature: int
    sign: int
    picked_on: float
    """Its AUROC where it was picked: the best of many, so too good."""
    auroc: float
    """Its AUROC on the pictures that did not pick it."""
    positives: tuple[int, int]
    """How many there were to pick with, and to report on."""


def best_features(
    sae: SparseAutoencoder, pick: LabelledTokens, report: LabelledTokens, least_positives: int = LEAST_POSITIVES
) -> list[BestFeature]:
    """For every task with enough positives the feature that is best on `pick`, and how good it is on `report`.

    Raises FluxIRError if the two share a prompt.
    """
    check_apart(("the set that picks", pick.labels.prompts), ("the set that reports", report.labels.prompts))
    pick_board, report_board = FeatureBoard(pick, sae), FeatureBoard(report, sae)
    best = []
    for task in askable(pick, report, least_positives):
        feature, sign, picked_on = best_of(pick_board.aurocs(task))
        scores = sign * report_board.scores(task, feature)
        positives = pick.counts(task)[0], report.counts(task)[0]
        best.append(BestFeature(task, feature, sign, picked_on, auroc(scores, *report.flags(task)), positives))
    return best


def askable(pick: LabelledTokens, report: LabelledTokens, least_positives: int = LEAST_POSITIVES) -> list[Task]:
    """The tasks with at least `least_positives` positives and negatives to report on, and half as many to pick with."""
    reportable = {one for one in report.tasks() if min(report.counts(one)) >= least_positives}
    asked = [one for one in pick.tasks() if one in reportable and 2 * min(pick.counts(one)) >= least_positives]
    # Those of one level and one kind of negatives count the same tokens, so that the pass over these is shared.
    return sorted(asked, key=lambda one: (LEVELS.index(one.question.level), NEGATIVES.index(one.negatives)))


@dataclass(frozen=True)
class Readers:
    """All readers of one site and step, a row each. What several of them need is computed once."""

    bench: Bench
    sae: SparseAutoencoder
    neurons: Callable[[LabelledTokens], Tensor] | None
    """Gives the neurons of every token; None: there are none."""
    null_draws: int
    neuron_count: int | None = None
    """How many of them there are."""

    @cached_property
    def k(self) -> int:
        """Features per token, of the untrained autoencoder too."""
        return features_per_token(self.sae, self.bench.pick)

    @cached_property
    def fewer(self) -> tuple[int, ...]:
        """How many candidates other rows pick from, where these are fewer than the features.

        The best of more candidates is better by chance, so these rows are held against the best of as many features.
        """
        part = self.bench.pick
        sizes = [part.source.d(part.site), self.neuron_count, part.noisy_width]
        return tuple(sorted({size for size in sizes if size is not None and size < self.sae.config.d_sae}))

    def available(self) -> dict[RowName, str | None]:
        """Every row, and why there is none of it; None: there is."""
        noisy = self.bench.pick.has_noisy and self.bench.report.has_noisy
        missing: dict[RowName, str | None] = dict.fromkeys(ROWS)
        if self.neurons is None:
            missing["neurons"] = "these captures have no neurons of this block: collect them too, or give --run_model"
        if not noisy:
            missing["input_axes"] = missing["input_probe"] = "these captures have no noisy latents of these tokens"
        if not self.null_draws:
            missing["null"] = "no draws were asked for"
        return missing

    def candidates(self, row: RowName) -> int | None:
        """How many candidates a row picks from, each with both signs; None: it picks none."""
        sizes: dict[RowName, Callable[[], int]] = {
            "sae": lambda: self.sae.config.d_sae,
            "null": lambda: self.sae.config.d_sae,
            "untrained": lambda: self.sae.config.d_sae,
            "random": lambda: self.sae.config.d_sae,
            "neurons": lambda: self._neurons.pick.shape[1],
            "pca": lambda: self._space.pick.shape[1],
            "input_axes": lambda: self._noisy.pick.shape[1],
        }
        return sizes[row]() if row in sizes else None

    def row(self, name: RowName) -> Iterator[Answer]:
        """The answers of one row, one for each task."""
        d, count = self._space.pick.shape[1], self.sae.config.d_sae
        match name:
            case "sae":
                return self._features.best(fewer=self.fewer)
            case "k_sparse_1" | "k_sparse_2" | "k_sparse_5":
                return self._features.k_sparse(int(name.removeprefix("k_sparse_")))
            case "untrained":
                return FeatureRows(self.bench, self._untrained()).best(fewer=self.fewer)
            case "neurons":
                return best_directions(self.bench, self._neurons, None)
            case "pca":
                return best_directions(self.bench, self._space, principal_axes(self._read))
            case "random":
                return best_directions(self.bench, self._space, random_directions(d, count, self.bench.seed))
            case "mean_difference":
                return mean_differences(self.bench, self._space)
            case "input_axes":
                return best_directions(self.bench, self._noisy, None)
            case "input_probe":
                return probes(self.bench, self._noisy)
            case "probe":
                return probes(self.bench, self._space)
            case "shuffled":
                return probes(self.bench, self._space, shuffled=True)
            case "null":
                raise ValueError("the null is asked for by `null`")

    def null(self, follow: Callable[[Sequence[int]], Iterable[int]] = iter) -> dict[Task, np.ndarray]:
        """AUROC under permuted label maps, [draws, 2] for each task: on the set that picks and on the other one."""
        found: dict[Task, list[tuple[float, float]]] = {one: [] for one in self.bench.tasks}
        for draw in follow(range(self.null_draws)):
            for task, picked_on, reported in self._features.null(draw):
                found[task].append((picked_on, reported))
        return {task: np.array(pairs) for task, pairs in found.items()}

    @cached_property
    def _features(self) -> FeatureRows:
        return FeatureRows(self.bench, self.sae)

    @cached_property
    def _space(self) -> Space:
        return Space(self.bench.pick.values(), self.bench.report.values())

    @property
    def _read(self) -> Tensor:
        """The tokens of the set that picks, without padding: [tokens, d]."""
        used = self.bench.pick.used
        return self._space.pick if used is None else self._space.pick[used.flatten()]

    @cached_property
    def _noisy(self) -> Space:
        return Space(self.bench.pick.noisy(), self.bench.report.noisy())

    @cached_property
    def _neurons(self) -> Space:
        assert self.neurons is not None
        return Space(self.neurons(self.bench.pick), self.neurons(self.bench.report))

    def _untrained(self) -> SparseAutoencoder:
        """An autoencoder of the same size and the same k as training would begin with it."""
        config = SAEConfig("topk", self._space.pick.shape[1], self.sae.config.d_sae, k=self.k, seed=self.bench.seed)
        return make_sae(config, sample=self._read[:: max(1, len(self._read) // 100_000)].float())


def features_per_token(sae: SparseAutoencoder, part: LabelledTokens) -> int:
    """The k of an autoencoder; of one that has none, the nearest whole number to its L0 on a part."""
    if sae.config.architecture in HAS_K and sae.config.k is not None:
        return sae.config.k
    codes = part.codes(sae)
    tokens = codes.tokens if part.used is None else int(part.used.sum())
    return min(max(1, round(len(codes.token) / tokens)), sae.config.d_sae)


def limited(labels: Labels, most: int, seed: int) -> Labels:
    """At most `most` pictures, of prompts drawn at random: all pictures of a prompt, or none."""
    if len(labels.images) <= most:
        return labels
    order = np.random.default_rng(seed).permutation(int(labels.groups.max()) + 1)
    sizes = np.bincount(labels.groups)[order]
    chosen = order[np.cumsum(sizes) <= most]
    return labels.chosen(np.isin(labels.groups, chosen))


# ---- As JSON


def answers_as_json(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """One object per answer."""
    return [
        {
            **task_as_json(one.task),
            "picked_on": round(one.picked_on, 5),
            "auroc": round(one.auroc, 5),
            "interval": None if one.interval is None else [round(end, 5) for end in one.interval],
            "recall": round(one.recall, 5),
            "precision": None if one.precision is None else round(one.precision, 5),
            "chosen": _rounded(one.chosen),
        }
        for one in answers
    ]


def null_as_json(found: dict[Task, np.ndarray]) -> list[dict[str, Any]]:
    """The 95th percentile of every task: what one pick in twenty exceeds where there is nothing to find."""
    return [
        {
            **task_as_json(task),
            "picked_on": round(float(np.quantile(pairs[:, 0], 0.95)), 5),
            "auroc": round(float(np.quantile(pairs[:, 1], 0.95)), 5),
            "mean": round(float(pairs[:, 1].mean()), 5),
        }
        for task, pairs in found.items()
    ]


def task_as_json(task: Task) -> dict[str, str]:
    """Kind, concept, level and negatives of a task."""
    return {**task.question._asdict(), "negatives": task.negatives}


def questions_as_json(pick: LabelledTokens, report: LabelledTokens, asked: Sequence[Task]) -> list[dict[str, Any]]:
    """Every task with its counts in both sets, by shape too, and whether there were enough for a number."""
    were_asked, rows = set(asked), []
    for task in dict.fromkeys([*pick.tasks(), *report.tasks()]):
        counts = {
            name: dict(zip(("positives", "negatives"), part.counts(task), strict=True))
            for name, part in (("pick", pick), ("report", report))
        }
        by_shape = report.labels.by_shape.get(task.question) or None
        rows.append({**task_as_json(task), **counts, "by_shape": by_shape, "asked": task in were_asked})
    return rows


def _rounded(chosen: Any) -> Any:
    if isinstance(chosen, float):
        return round(chosen, 6)
    return {key: _rounded(value) for key, value in chosen.items()} if isinstance(chosen, dict) else chosen
