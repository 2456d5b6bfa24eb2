"""Directions that may put a concept into a picture: features, sets of them, mean differences, neurons, random ones.

They are picked on labelled captures; `causal` says which of them steer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from flux_ir.activations.blocks import TokenSource
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sites import Site
from flux_ir.steering.edits import Edit
from flux_ir.studies.caption_words import CONCEPTS, ConceptKind, text_levels
from flux_ir.studies.causal import Candidate, RegionRule, image_rules
from flux_ir.studies.labelled_tokens import FeatureBoard, LabelledTokens
from flux_ir.studies.labels import Labels, Level, Negatives, Question, Task

DirectionRow = Literal["feature", "set", "swap", "mean_difference", "mean_swap", "neuron", "random"]
SET_SIZES = (2, 3, 5)
_TOLD_BY: Mapping[ConceptKind, tuple[Level, Negatives]] = {
    "colour": ("interior", "hard"),
    "background": ("interior", "hard"),
    "shape": ("any", "hard"),
    "place": ("image", "all"),
}
"""What a concept of each kind is picked by in a picture: patches inside one object against those of other objects, and
so on."""


class Subject(NamedTuple):
    """One autoencoder, and where it is used."""

    folder: Path
    sae: SparseAutoencoder
    site: Site
    steps: Sequence[int]


class Spot(NamedTuple):
    """Some tokens of a site: those that tell a concept, by which directions are picked, and the rules to turn them by.

    Of a picture it is one spot; words are turned where they were picked.
    """

    site: Site
    task: Task
    rules: tuple[RegionRule, ...]

    def of(self, concept: str) -> "Spot":
        """The same of another concept."""
        question = self.task.question._replace(concept=concept)
        return self._replace(task=self.task._replace(question=question))


def is_text(site: Site) -> bool:
    """Whether its tokens are those of T5."""
    return site.kind == "t5" or site.stream == "txt"


@dataclass(frozen=True)
class Candidates:
    """All directions that there are to search among."""

    source: Callable[[Site], TokenSource]
    labels: Callable[[Site], Labels]
    """The answers of a site's tokens: patches, or words."""
    subjects: Sequence[Subject]
    most: int
    """Features, and neurons, of a concept."""
    random: int
    """Random directions of a concept."""
    neuron_outputs: Callable[[Site], Float[Tensor, "d neurons"]]
    """What each neuron of a site's block adds to the stream."""

    def of(self, row: DirectionRow, kind: ConceptKind, concept: str) -> list[Candidate]:
        """The directions of one row, best first."""
        match row:
            case "feature":
                return self._single(kind, concept)
            case "set":
                return self._sets(kind, concept)
            case "swap":
                return self._swaps(kind, concept)
            case "mean_difference":
                return [
                    self._along(f"mean difference, {spot.site}", spot, self._difference(spot))
                    for spot in self._spots(kind, concept)
                ]
            case "mean_swap":
                return [self._mean_swap(kind, spot) for spot in self._spots(kind, concept)]
            case "neuron":
                return self._neurons(kind, concept)
            case "random":
                return self._randoms(kind, concept)

    @property
    def sites(self) -> list[Site]:
        """Every site that some autoencoder is of."""
        return sorted({subject.site for subject in self.subjects})

    def _spots(self, kind: ConceptKind, concept: str) -> list[Spot]:
        return [spot for site in self.sites for spot in spots_of(site, kind, concept)]

    # ---- Features

    def _single(self, kind: ConceptKind, concept: str) -> list[Candidate]:
        """The best feature of every autoencoder and spot, then the second best of each, and so on."""
        ranked = list[tuple[int, float, int, Candidate]]()
        for subject in self.subjects:
            for spot in spots_of(subject.site, kind, concept):
                for rank, (auroc, number) in enumerate(self._best(subject, spot)):
                    ranked.append((rank, -auroc, len(ranked), self._features(subject, spot, [number])))
        return [candidate for *_, candidate in sorted(ranked)[: self.most]]

    def _sets(self, kind: ConceptKind, concept: str) -> list[Candidate]:
        """The best features together, and those that add up to the mean difference."""
        found = []
        for subject in self.subjects:
            for spot in spots_of(subject.site, kind, concept):
                own = [number for _, number in self._best(subject, spot)]
                found += [self._features(subject, spot, own[:size]) for size in SET_SIZES]
                difference = self._difference(spot).mean(dim=0)
                numbers, shares = pursued(difference, subject.sae.W_dec.detach().float().cpu(), max(SET_SIZES))
                name = f"features {_listed(numbers)} as in the mean difference, {subject.site}"
                edit = Edit(sae=subject.folder, feature=numbers, strength=shares, unit="raw")
                found.append(Candidate(name, (edit,), spot.rules))
        return found

    def _swaps(self, kind: ConceptKind, concept: str) -> list[Candidate]:
        """The best feature set to a strength, and the best feature of every other concept of the kind set to 0."""
        found = []
        for subject in self.subjects:
            for spot in spots_of(subject.site, kind, concept):
                best = {one: self._best(subject, spot.of(one))[0][1] for one in self._known(kind, spot)}
                own = best.pop(concept)
                others = tuple(sorted(set(best.values()) - {own}))
                name = f"feature {own} for {_listed(others)}, {subject.site}"
                strengths = (1.0, *(0.0 for _ in others))
                edit = Edit(kind="set", sae=subject.folder, feature=(own, *others), strength=strengths)
                found.append(Candidate(name, (edit,), spot.rules))
        return found

    def _features(self, subject: Subject, spot: Spot, numbers: Sequence[int]) -> Candidate:
        """Some features, each in units of its own maximum."""
        name = f"feature{'s' if len(numbers) > 1 else ''} {_listed(numbers)}, {subject.site}"
        return Candidate(name, (Edit(sae=subject.folder, feature=tuple(numbers)),), spot.rules)

    def _best(self, subject: Subject, spot: Spot) -> list[tuple[float, int]]:
        """The features that tell the spot's concept best by being active: AUROC, mean over steps, and number."""
        key = (subject.folder, spot)
        if key not in self._ranked:
            boards = self._boards[subject.folder]
            aurocs = np.mean([np.nan_to_num(board.aurocs(spot.task), nan=0.5) for board in boards], axis=0)
            largest = subject.sae.max_active
            if largest is not None:
                aurocs[largest.cpu().numpy() <= 0] = 0.0  # the dead have no unit
            best = np.argsort(-aurocs, kind="stable")[: max(self.most, *SET_SIZES)].tolist()
            self._ranked[key] = [(float(aurocs[number]), number) for number in best if aurocs[number] > 0]
        return self._ranked[key]

    @cached_property
    def _ranked(self) -> dict[tuple[Path, Spot], list[tuple[float, int]]]:
        return {}

    @cached_property
    def _boards(self) -> dict[Path, list[FeatureBoard]]:
        return {
            subject.folder: [FeatureBoard(self._tokens(subject.site, step), subject.sae) for step in subject.steps]
            for subject in self.subjects
        }

    # ---- Other directions, as long as the mean difference

    def _neurons(self, kind: ConceptKind, concept: str) -> list[Candidate]:
        """Feed-forward neurons whose outputs are nearest to the mean difference, with the sign that they have there."""
        ranked = list[tuple[int, float, int, Candidate]]()
        for spot in self._spots(kind, concept):
            difference = self._difference(spot)
            outputs = normalize(self.neuron_outputs(spot.site).float().cpu(), dim=0)
            cosines = normalize(difference.mean(dim=0), dim=0) @ outputs
            best = cosines.abs().argsort(descending=True, stable=True)[: self.most].tolist()
            for rank, number in enumerate(best):
                direction = outputs[:, number] * cosines[number].sign()
                neuron = self._as_long(f"neuron {number}, {spot.site}", spot, direction, difference)
                ranked.append((rank, -abs(float(cosines[number])), len(ranked), neuron))
        return [candidate for *_, candidate in sorted(ranked)[: self.most]]

    def _randoms(self, kind: ConceptKind, concept: str) -> list[Candidate]:
        """Random directions, the same for every concept, at each spot in turn."""
        found, spots = [], self._spots(kind, concept)
        for number in range(self.random):
            spot = spots[number % len(spots)]
            difference = self._difference(spot)
            draw = torch.Generator().manual_seed(number)
            direction = normalize(torch.randn(difference.shape[1], generator=draw), dim=0)
            found.append(self._as_long(f"random {number}, {spot.site}", spot, direction, difference))
        return found

    def _as_long(
        self, name: str, spot: Spot, direction: Float[Tensor, "d"], difference: Float[Tensor, "steps d"]
    ) -> Candidate:
        return self._along(name, spot, direction * difference.norm(dim=1, keepdim=True))

    def _along(self, name: str, spot: Spot, per_step: Float[Tensor, "steps d"]) -> Candidate:
        return Candidate(name, (Edit(vector=per_step, sites=str(spot.site), unit="raw"),), spot.rules)

    def _mean_swap(self, kind: ConceptKind, spot: Spot) -> Candidate:
        """The mean of the concept in place of the means of the others: where those of all concepts differ, a token gets
        the coordinates of this one's mean, along one orthogonal direction after the other.
        """
        every = torch.stack(
            [self._mean(spot.of(one)) for one in self._known(kind, spot)], dim=1
        )  # [steps, concepts, d]
        basis = torch.linalg.svd(every - every.mean(dim=1, keepdim=True), full_matrices=False).Vh[:, :-1]
        target = torch.einsum("snd,sd->sn", basis, self._mean(spot))
        target = torch.where(target.abs() < 1e-6, 1e-6, target)  # a vector has a direction
        vectors = (basis * target[:, :, None]).unbind(dim=1)
        edits = tuple(Edit(kind="set", vector=one, sites=str(spot.site), unit="raw") for one in vectors)
        return Candidate(f"means of {len(every[0])}, {spot.site}", edits, spot.rules)

    def _difference(self, spot: Spot) -> Float[Tensor, "steps d"]:
        """The mean of tokens, or of whole pictures, that have the concept minus that of those that have it not."""
        return self._mean(spot) - self._mean(spot, having=False)

    def _known(self, kind: ConceptKind, spot: Spot) -> list[str]:
        """The concepts that some of these captures have; the spot's own is one, or there is no mean of it."""
        tokens = self._tokens(spot.site, self.source(spot.site).steps[0])
        own = spot.task.question.concept
        return [one for one in CONCEPTS[kind] if one == own or tokens.counts(spot.of(one).task)[0] > 0]

    def _mean(self, spot: Spot, *, having: bool = True) -> Float[Tensor, "steps d"]:
        """The mean of tokens, or of whole pictures, that have the concept, or have it not."""
        key = (spot, having)
        if key not in self._means:
            question, rows = spot.task.question, []
            for step in self.source(spot.site).steps:
                tokens = self._tokens(spot.site, step)
                values = tokens.values().float()
                if not question.of_tokens:
                    values = values.reshape(tokens.images, tokens.tokens_per_image, -1).mean(dim=1)
                positive, counted = (torch.from_numpy(flags) for flags in tokens.flags(spot.task))
                chosen = positive if having else counted & ~positive
                if not chosen.any():
                    raise FluxIRError(
                        f"a mean difference is between pictures with and without it: none of these captures is "
                        f"{'with' if having else 'without'} {question.concept}",
                        hint="collect more captions, or name other --concepts",
                    )
                rows.append(values[chosen].mean(dim=0))
            self._means[key] = torch.stack(rows)
        return self._means[key]

    @cached_property
    def _means(self) -> dict[tuple[Spot, bool], Tensor]:
        return {}

    def _tokens(self, site: Site, step: int) -> LabelledTokens:
        return LabelledTokens(self.source(site), self.labels(site), site, step)


def spots_of(site: Site, kind: ConceptKind, concept: str) -> list[Spot]:
    """Where a concept is told at a site."""
    if not is_text(site):
        level, negatives = _TOLD_BY[kind]
        return [Spot(site, Task(Question(kind, concept, level), negatives), image_rules(kind))]
    return [Spot(site, Task(Question(kind, concept, level), "hard"), (level,)) for level in text_levels(kind)]


def pursued(
    target: Float[Tensor, "d"], rows: Float[Tensor, "features d"], number: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """So many rows whose weighted sum is nearest to the target, found one by one, and their weights.

    Orthogonal matching pursuit (Pati, Rezaiifar, Krishnaprasad 1993): after each choice all weights are fitted anew.
    """
    lengths = rows.norm(dim=1).clamp_min(1e-12)
    chosen: list[int] = []
    weights, rest = target.new_zeros(0), target
    for _ in range(number):
        likeness = (rows @ rest).abs() / lengths
        likeness[chosen] = -1.0
        chosen.append(int(likeness.argmax()))
        weights = torch.linalg.lstsq(rows[chosen].T, target[:, None]).solution[:, 0]
        rest = target - weights @ rows[chosen]
    return tuple(chosen), tuple(weights.tolist())


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
