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
from flux_ir.studies.causal import Candidate, ConceptKind
from flux_ir.studies.labelled_tokens import FeatureBoard, LabelledTokens
from flux_ir.studies.labels import Labels, Level, Negatives, Question, Task

DirectionRow = Literal["feature", "set", "mean_difference", "neuron", "random"]
SET_SIZES = (2, 3, 5)
_TOLD_BY: Mapping[ConceptKind, tuple[Level, Negatives]] = {
    "colour": ("interior", "hard"),
    "background": ("interior", "hard"),
    "shape": ("any", "hard"),
    "place": ("image", "all"),
}
"""What a concept of each kind is picked by: patches inside one object against those of other objects, and so on."""


class Subject(NamedTuple):
    """One autoencoder, and where it is used."""

    folder: Path
    sae: SparseAutoencoder
    site: Site
    steps: Sequence[int]


@dataclass(frozen=True)
class Candidates:
    """All directions that there are to search among."""

    source: TokenSource
    labels: Labels
    subjects: Sequence[Subject]
    most: int
    """Features, and neurons, of a concept."""
    random: int
    """Random directions of a concept."""
    neuron_outputs: Callable[[Site], Float[Tensor, "d neurons"]]
    """What each neuron of a site's block adds to the stream."""

    def of(self, row: DirectionRow, kind: ConceptKind, concept: str) -> list[Candidate]:
        """The directions of one row, best first."""
        task = Task(Question(kind, concept, _TOLD_BY[kind][0]), _TOLD_BY[kind][1])
        match row:
            case "feature":
                return [self._features(self.subjects[of], [number]) for of, number in self._best(task)[: self.most]]
            case "set":
                return self._sets(task)
            case "mean_difference":
                return [
                    self._along(f"mean difference, {site}", site, self._difference(site, task)) for site in self.sites
                ]
            case "neuron":
                return self._neurons(task)
            case "random":
                return self._randoms(task)

    @property
    def sites(self) -> list[Site]:
        """Every site that some autoencoder is of."""
        return sorted({subject.site for subject in self.subjects})

    # ---- Features

    def _sets(self, task: Task) -> list[Candidate]:
        """For each autoencoder its best features together, and those that add up to the mean difference."""
        found = []
        for of, subject in enumerate(self.subjects):
            own = [number for where, number in self._best(task) if where == of]
            found += [self._features(subject, own[:size]) for size in SET_SIZES]
            difference = self._difference(subject.site, task).mean(dim=0)
            numbers, shares = pursued(difference, subject.sae.W_dec.detach().float().cpu(), max(SET_SIZES))
            name = f"features {_listed(numbers)} as in the mean difference, {subject.site}"
            found.append(Candidate(name, Edit(sae=subject.folder, feature=numbers, strength=shares, unit="raw")))
        return found

    def _features(self, subject: Subject, numbers: Sequence[int]) -> Candidate:
        """Some features, each in units of its own maximum."""
        name = f"feature{'s' if len(numbers) > 1 else ''} {_listed(numbers)}, {subject.site}"
        return Candidate(name, Edit(sae=subject.folder, feature=tuple(numbers)))

    def _best(self, task: Task) -> list[tuple[int, int]]:
        """Features that tell the concept by being active, best first: the number of the autoencoder, and their own."""
        scored = []
        for of in range(len(self.subjects)):
            boards = self._boards[of]
            aurocs = np.mean([np.nan_to_num(board.aurocs(task), nan=0.5) for board in boards], axis=0)
            largest = self.subjects[of].sae.max_active
            best = np.argsort(-aurocs, kind="stable")[: max(self.most, *SET_SIZES)].tolist()
            alive = [number for number in best if largest is None or float(largest[number]) > 0]
            scored += [(-float(aurocs[number]), of, number) for number in alive]
        return [(of, number) for _, of, number in sorted(scored)]

    @cached_property
    def _boards(self) -> list[list[FeatureBoard]]:
        return [
            [FeatureBoard(self._tokens(subject.site, step), subject.sae) for step in subject.steps]
            for subject in self.subjects
        ]

    # ---- Other directions, as long as the mean difference

    def _neurons(self, task: Task) -> list[Candidate]:
        """Feed-forward neurons whose outputs are nearest to the mean difference, with the sign that they have there."""
        found = []
        for site in self.sites:
            difference = self._difference(site, task)
            outputs = normalize(self.neuron_outputs(site).float().cpu(), dim=0)
            cosines = normalize(difference.mean(dim=0), dim=0) @ outputs
            for number in cosines.abs().argsort(descending=True, stable=True)[: self.most].tolist():
                direction = outputs[:, number] * cosines[number].sign()
                found.append(self._as_long(f"neuron {number}, {site}", site, direction, difference))
        return found

    def _randoms(self, task: Task) -> list[Candidate]:
        """Random directions, the same for every concept, at each site in turn."""
        found = []
        for number in range(self.random):
            site = self.sites[number % len(self.sites)]
            difference = self._difference(site, task)
            draw = torch.Generator().manual_seed(number)
            direction = normalize(torch.randn(difference.shape[1], generator=draw), dim=0)
            found.append(self._as_long(f"random {number}, {site}", site, direction, difference))
        return found

    def _as_long(
        self, name: str, site: Site, direction: Float[Tensor, "d"], difference: Float[Tensor, "steps d"]
    ) -> Candidate:
        return self._along(name, site, direction * difference.norm(dim=1, keepdim=True))

    def _along(self, name: str, site: Site, per_step: Float[Tensor, "steps d"]) -> Candidate:
        return Candidate(name, Edit(vector=per_step, sites=str(site), unit="raw"))

    def _difference(self, site: Site, task: Task) -> Float[Tensor, "steps d"]:
        """The mean of tokens, or of whole pictures, that have the concept minus that of those that have it not."""
        key = (site, task)
        if key not in self._differences:
            rows = []
            for step in self.source.steps:
                tokens = self._tokens(site, step)
                values = tokens.values().float()
                if not task.question.of_tokens:
                    values = values.reshape(tokens.images, tokens.tokens_per_image, -1).mean(dim=1)
                positive, counted = (torch.from_numpy(flags) for flags in tokens.flags(task))
                if not positive.any() or not (counted & ~positive).any():
                    raise FluxIRError(
                        f"a mean difference is between pictures with and without it: none of these captures is with "
                        f"{task.question.concept}, or all are",
                        hint="collect more captions, or name other --concepts",
                    )
                rows.append(values[positive].mean(dim=0) - values[counted & ~positive].mean(dim=0))
            self._differences[key] = torch.stack(rows)
        return self._differences[key]

    @cached_property
    def _differences(self) -> dict[tuple[Site, Task], Tensor]:
        return {}

    def _tokens(self, site: Site, step: int) -> LabelledTokens:
        return LabelledTokens(self.source, self.labels, site, step)


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
