"""The readers of concepts: features, neurons, directions, probes. Each is made on one set and judged on another, and
its answers to all tasks are a row of concepts.json.

All readers that pick the best of many candidates pick in the same way, each candidate with both signs. The best of more
candidates is better by chance alone, and axes and neurons are fewer than features: beside the best feature stands the
expected AUROC of the best of as many features. Next: `concepts`, the study made of these rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.evaluation.baselines import PCA, Covariance
from flux_ir.studies.auroc import at_threshold, auroc, bootstrap, precise_threshold
from flux_ir.studies.labelled_tokens import FeatureBoard, LabelledTokens
from flux_ir.studies.labels import Task, permuted
from flux_ir.studies.probes import Probe, balanced, fit_probe, fit_ridge, r_squared

PRECISION = 0.95
"""The precision at which the recall is given; its threshold is picked on the set that picks."""
SCREENED_TOKENS, FINALISTS = 65_536, 5
"""Dense candidates are ranked on so many tokens of the set that picks, and the best few again on all of them."""
_NUMBERS = 2**25  # of a dense block: 128 MB in float32


class Answer(NamedTuple):
    """How well one row tells one concept."""

    task: Task
    picked_on: float
    """AUROC on the set that picked or fitted."""
    auroc: float
    """AUROC on the other one."""
    interval: tuple[float, float] | None
    """The middle 95 % over draws of the reported prompts; None: no draws, or none with positives and negatives."""
    recall: float
    """The share of positives above the threshold."""
    precision: float | None
    """The share of positives in what is above it; None: nothing is."""
    chosen: Mapping[str, Any]
    """What was picked: a feature and its sign, a penalty."""


@dataclass(frozen=True)
class Bench:
    """The two sets of labelled tokens, and the tasks that readers are held against."""

    pick: LabelledTokens
    report: LabelledTokens
    tasks: Sequence[Task]
    draws: int
    """Draws of the bootstrap; 0: no intervals."""
    seed: int = 0

    def answer(self, task: Task, pick: np.ndarray, report: np.ndarray, chosen: Mapping[str, Any]) -> Answer:
        """The AUROC, interval, recall and precision of one score of every token, or picture, of the two sets."""
        pick_flags, report_flags = self.pick.flags(task), self.report.flags(task)
        threshold = precise_threshold(pick, *pick_flags, PRECISION)
        reached = at_threshold(report, *report_flags, threshold)
        interval = None
        if self.draws:
            groups = self.report.groups(task)
            interval = bootstrap(report, *report_flags, groups, draws=self.draws, seed=self.seed)
        aurocs = auroc(pick, *pick_flags), auroc(report, *report_flags)
        return Answer(task, *aurocs, interval, reached.recall, reached.precision, chosen)


# ---- Features of an autoencoder


class FeatureRows:
    """The rows that read the features of one autoencoder."""

    def __init__(self, bench: Bench, sae: SparseAutoencoder) -> None:
        self.bench = bench
        self.pick, self.report = (FeatureBoard(part, sae) for part in (bench.pick, bench.report))

    @property
    def candidates(self) -> int:
        return self.pick.codes.features

    @cached_property
    def _aurocs(self) -> dict[Task, np.ndarray]:
        """The AUROC of every feature on the set that picks."""
        return {task: self.pick.aurocs(task) for task in self.bench.tasks}

    def best(self, fewer: Sequence[int] = ()) -> Iterator[Answer]:
        """The feature that is best on the set that picks.

        For each number in `fewer` also the expected AUROC of the best of so many features drawn at random.
        """
        for task, aurocs in self._aurocs.items():
            feature, sign, _ = best_of(aurocs)
            scores = [sign * board.scores(task, feature) for board in (self.pick, self.report)]
            chosen: dict[str, Any] = {"feature": feature, "sign": sign}
            if few := {str(count): self._best_of_fewer(task, count) for count in fewer if count < len(aurocs)}:
                chosen["expected_of_fewer"] = few
            yield self.bench.answer(task, scores[0], scores[1], chosen)

    def k_sparse(self, k: int) -> Iterator[Answer]:
        """Logistic regression on the k features whose means differ most between positives and negatives."""
        for task in self.bench.tasks:
            positive, counted = self.bench.pick.flags(task)
            codes = self.pick.codes if task.question.of_tokens else self.pick.pooled
            means = [codes.sums(side) / side.sum() for side in (positive, counted & ~positive)]
            features = np.sort(np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:k])
            x_pick, x_report = (
                torch.from_numpy(np.stack([board.scores(task, int(f)) for f in features], axis=1))
                for board in (self.pick, self.report)
            )
            probe = fitted(self.bench, task, x_pick)
            chosen = {"features": features.tolist(), "penalty": probe.penalty}
            yield self.bench.answer(task, probe.scores(x_pick), probe.scores(x_report), chosen)

    def null(self, draw: int) -> Iterator[tuple[Task, float, float]]:
        """One draw of the null: the best feature under permuted label maps, as a task, `picked_on` and `auroc`.

        A draw permutes the maps of both sets and repeats the whole pick, so its AUROC is that of a pick where there is
        nothing to find. Maps move between pictures and positions stay: a feature of a position keeps its advantage.
        """
        bench = self.bench
        orders = [
            permuted(part.labels, (bench.seed, draw, side)) for side, part in enumerate((bench.pick, bench.report))
        ]
        for task in bench.tasks:
            feature, sign, picked_on = best_of(self.pick.aurocs(task, orders[0]))
            reported = self.report.auroc_of(task, feature, orders[1])
            yield task, picked_on, reported if sign > 0 else 1 - reported

    def _best_of_fewer(self, task: Task, count: int) -> float:
        """The expected AUROC of the best of `count` features drawn at random from all F, in closed form.

        With features ranked on the set that picks, from r = 0 on, the one of rank r is the best of a draw with
        probability C(F - r - 1, count - 1) / C(F, count).
        """
        aurocs = self._aurocs[task]
        order, features = np.argsort(-np.abs(aurocs - 0.5), kind="stable"), len(aurocs)
        total, reached, chance = 0.0, 0.0, count / features  # C(F - 1, count - 1) / C(F, count)
        for rank, feature in enumerate(order[: features - count + 1]):
            reported = self.report.auroc_of(task, int(feature))
            total += chance * (reported if aurocs[feature] >= 0.5 else 1 - reported)
            reached += chance
            if reached > 1 - 1e-4:
                break  # the features below are the best of almost no draw
            chance *= (features - rank - count) / (features - rank - 1)
        return total / reached


def best_of(aurocs: np.ndarray) -> tuple[int, int, float]:
    """The feature whose AUROC is furthest from .5, the sign that puts it above, and its AUROC with that sign."""
    distance = np.abs(np.nan_to_num(aurocs, nan=0.5) - 0.5)
    feature = int(distance.argmax())
    return feature, 1 if aurocs[feature] >= 0.5 else -1, 0.5 + float(distance[feature])


# ---- Directions


class Space(NamedTuple):
    """Tokens of both sets in one space: activations, neurons, or noisy inputs. [images * tokens, d], as stored."""

    pick: Tensor
    report: Tensor


def best_directions(bench: Bench, space: Space, directions: Tensor | None) -> Iterator[Answer]:
    """The best of many directions, [d, n], or of the axes of the space (None).

    A picture's number is its largest token's, along the direction or against it.
    """
    for of_tokens in (True, False):
        asked = [one for one in bench.tasks if one.question.of_tokens == of_tokens]
        finals = _screened(bench, space.pick, directions, asked)
        for task, finalists in zip(asked, finals, strict=True):
            pick_scores = _columns(bench.pick, space.pick, directions, finalists, of_tokens=of_tokens)
            flags = bench.pick.flags(task)
            aurocs = np.array([auroc(column, *flags) for column in pick_scores.T])
            best, sign, _ = best_of(aurocs) if of_tokens else (int(aurocs.argmax()), 1, 0.0)
            chosen, along = finalists[best]
            scores = _columns(bench.report, space.report, directions, [finalists[best]], of_tokens=of_tokens)[:, 0]
            picked = {"candidate": chosen, "sign": sign * along}
            yield bench.answer(task, sign * pick_scores[:, best], sign * scores, picked)


def _screened(
    bench: Bench, tokens: Tensor, directions: Tensor | None, asked: Sequence[Task]
) -> list[list[tuple[int, int]]]:
    """For every task the few candidates, with their signs, of the largest difference in mean rank."""
    if not asked:
        return []
    part, of_tokens = bench.pick, asked[0].question.of_tokens
    each = part.tokens_per_image
    every = -(-len(tokens) // SCREENED_TOKENS) if of_tokens else 1  # every so many-th picture is screened
    images = np.arange(0, part.images, every)
    rows = (images[:, None] * each + np.arange(each)).reshape(-1) if of_tokens else images
    # Where all rows count, AUROC = 1/2 + (mean rank of positives - mean rank of negatives) / rows, so one product of
    # weights and ranks screens all candidates for all tasks.
    sides = []
    for task in asked:
        positive, counted = (flags[rows] for flags in part.flags(task))
        sides.append(positive / max(1, positive.sum()) - (counted & ~positive) / max(1, (counted & ~positive).sum()))
    weights = torch.from_numpy(np.stack(sides)).float()  # [tasks, rows]: mean over positives less that of the rest
    count = (directions if directions is not None else tokens).shape[1]
    gaps = torch.zeros(len(asked), 1 if of_tokens else 2, count)
    at_once = max(1, _NUMBERS // max(1, len(rows)))
    for first in range(0, count, at_once):
        chosen = range(first, min(first + at_once, count))
        signs = (1,) if of_tokens else (1, -1)
        for number, sign in enumerate(signs):
            columns = torch.from_numpy(
                _columns(part, tokens, directions, [(c, sign) for c in chosen], of_tokens=of_tokens, images=images)
            ).T.contiguous()
            gaps[:, number, chosen.start : chosen.stop] = weights @ _ranks(columns).T
    finals = []
    for gap in gaps:
        order = (gap.abs() if of_tokens else gap).flatten().argsort(descending=True, stable=True)[:FINALISTS]
        finals.append([(int(o) % count, -1 if int(o) >= count else 1) for o in order])
    return finals


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value in its row, the mean one where values tie (bfloat16 has few): float32, as `values`."""
    ordered, order = values.sort(1)
    index = torch.arange(values.shape[1]).expand_as(order)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, index, 0).cummax(1).values
    ends = torch.where(new.roll(-1, 1), index, values.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(values).scatter_(1, order, 0.5 * (first + ends))


def _columns(
    part: LabelledTokens,
    tokens: Tensor,
    directions: Tensor | None,
    chosen: Sequence[tuple[int, int]],
    *,
    of_tokens: bool,
    images: np.ndarray | None = None,
) -> np.ndarray:
    """The scores of some candidates on all tokens, or pictures, or those of `images` alone: float32 [rows, chosen]."""
    each = part.tokens_per_image
    which = torch.arange(part.images) if images is None else torch.from_numpy(images)
    numbers = torch.tensor([number for number, _ in chosen])
    signs = torch.tensor([float(sign) for _, sign in chosen])
    used, found = part.used, []
    for some in torch.split(which, max(1, _NUMBERS // (each * max(len(chosen), tokens.shape[1])))):
        block = tokens.reshape(-1, each, tokens.shape[1])[some]
        values = block[:, :, numbers].float() if directions is None else block.float() @ directions[:, numbers]
        values *= signs
        if used is not None and not of_tokens:
            values.masked_fill_(~used[some, :, None], -math.inf)
        found.append(values.flatten(0, 1) if of_tokens else values.amax(1))
    return torch.cat(found).numpy()


def principal_axes(tokens: Tensor) -> Tensor:
    """All principal axes of tokens [n, d]: [d, d], a column each."""
    covariance = Covariance(tokens.shape[1])
    for some in torch.split(tokens, 2**16):
        covariance.add(some.float())
    return PCA.of(covariance, tokens.shape[1]).W_dec.T.contiguous()


def random_directions(d: int, count: int, seed: int) -> Tensor:
    """Directions uniform on the sphere: [d, count]."""
    drawn = torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
    return (drawn / drawn.norm(dim=1, keepdim=True)).T.contiguous()


# ---- Probes


def probes(bench: Bench, space: Space, *, shuffled: bool = False) -> Iterator[Answer]:
    """A linear probe on all dimensions. `shuffled`: fitted on label maps that were permuted between pictures.

    A picture is the mean, the largest and the smallest of its tokens, dimension by dimension (`pooled`).
    """
    order = permuted(bench.pick.labels, (bench.seed, 1)) if shuffled else None
    for of_tokens in (True, False):
        asked = [one for one in bench.tasks if one.question.of_tokens == of_tokens]
        x_pick = space.pick if of_tokens else pooled(space.pick, bench.pick.tokens_per_image, bench.pick.used)
        x_report = space.report if of_tokens else pooled(space.report, bench.report.tokens_per_image, bench.report.used)
        for task in asked:
            probe = fitted(bench, task, x_pick, order)
            scores = [_scores(probe, tokens) for tokens in (x_pick, x_report)]
            yield bench.answer(task, scores[0], scores[1], {"penalty": probe.penalty})


class NumberAnswer(NamedTuple):
    """How well a label that is a number is predicted."""

    name: str
    r_squared: float
    """On the pictures the probe was not fitted on."""
    penalty: float
    pictures: tuple[int, int]
    """How many pictures have the label: to fit on, and to judge on."""


def number_probes(bench: Bench, space: Space, least: int) -> list[NumberAnswer]:
    """Ridge regression of every number that is known of `least` pictures to judge on and of half as many to fit on."""
    pick, report = bench.pick, bench.report
    answers = []
    for name, fit_on in pick.labels.numbers.items():
        judge_on = report.labels.numbers.get(name, np.zeros(0))
        rows = np.flatnonzero(np.isfinite(fit_on)), np.flatnonzero(np.isfinite(judge_on))
        if len(rows[1]) < least or 2 * len(rows[0]) < least:
            continue
        x = [
            pooled(tokens, part.tokens_per_image, part.used) for tokens, part in zip(space, (pick, report), strict=True)
        ]
        probe = fit_ridge(x[0][torch.from_numpy(rows[0])], fit_on[rows[0]], pick.labels.groups[rows[0]])
        predicted = probe.scores(x[1][torch.from_numpy(rows[1])])
        explained = r_squared(predicted, judge_on[rows[1]])
        answers.append(NumberAnswer(name, explained, probe.penalty, (len(rows[0]), len(rows[1]))))
    return answers


def mean_differences(bench: Bench, space: Space) -> Iterator[Answer]:
    """The direction from the mean of the negatives to that of the positives."""
    for of_tokens in (True, False):
        x_pick = space.pick if of_tokens else pooled(space.pick, bench.pick.tokens_per_image, bench.pick.used)
        x_report = space.report if of_tokens else pooled(space.report, bench.report.tokens_per_image, bench.report.used)
        for task in [one for one in bench.tasks if one.question.of_tokens == of_tokens]:
            positive, counted = bench.pick.flags(task)
            means = [_mean(x_pick, np.flatnonzero(side)) for side in (positive, counted & ~positive)]
            line = Probe(means[0] - means[1], 0.0, 0.0)
            yield bench.answer(task, _scores(line, x_pick), _scores(line, x_report), {})


def fitted(bench: Bench, task: Task, x: Tensor, order: np.ndarray | None = None) -> Probe:
    """A probe fitted on the set that picks: on all tokens or pictures that count, or as many as `balanced` draws."""
    positive, counted = bench.pick.flags(task, order)
    rows = balanced(positive, counted, bench.seed)
    return fit_probe(x[torch.from_numpy(rows)].float(), positive[rows], bench.pick.groups(task)[rows])


def pooled(tokens: Tensor, tokens_per_image: int, used: Tensor | None = None) -> Tensor:
    """The mean, the largest and the smallest of every picture's tokens, dimension by dimension: [images, 3 d].

    `used`, [images, tokens], are the tokens that are no padding; None: all.
    """
    blocks = torch.split(tokens.reshape(-1, tokens_per_image, tokens.shape[1]), 64)
    if used is None:
        parts = [torch.cat([b.mean(1), b.amax(1), b.amin(1)], dim=1) for b in (block.float() for block in blocks)]
        return torch.cat(parts)
    parts = []
    for values, kept in zip((block.float() for block in blocks), torch.split(used[:, :, None], 64), strict=True):
        mean = values.where(kept, 0).sum(1) / kept.sum(1)
        ends = values.where(kept, -math.inf).amax(1), values.where(kept, math.inf).amin(1)
        parts.append(torch.cat([mean, *ends], dim=1))
    return torch.cat(parts)


def _mean(tokens: Tensor, rows: np.ndarray) -> Tensor:
    some = torch.split(torch.from_numpy(rows), 2**16)
    return torch.stack([tokens[part].double().sum(0) for part in some]).sum(0).float() / max(1, len(rows))


def _scores(probe: Probe, tokens: Tensor) -> np.ndarray:
    return np.concatenate([probe.scores(some) for some in torch.split(tokens, 2**16)])
