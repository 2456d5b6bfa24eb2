"""Transfer: what one prompt's run computed in a region, put into the run of another prompt from the same noise.

    difference = compare_runs(painter, original, edited, saes, reach, most=40)
    painter.make([original._replace(steering=difference.edits("features", k=10, strength=1.0))])

Both runs are read first. The units (features, or neurons beside them) are chosen by their share in all that is active
in the region, as RIEBench does (Surkov et al., 2025): the k whose share is larger in the original run by most are
subtracted, the k whose share is larger in the edited one are added. A change is x + s (z' - z) W_dec, like any edit.
Next: `tradeoff`, what the pictures are worth.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.evaluation.metrics import DENSE_VALUES
from flux_ir.shapes import Tokens
from flux_ir.sites import Site
from flux_ir.steering.apply import PictureEdits, SiteEdit
from flux_ir.steering.dose import Made, Painter, Variant

Values = Literal["spatial", "quantile"]
"""What a unit is set to. spatial: at each token and step, what it is there in the edited run; quantile: those that are
subtracted to 0, those that are added to their `QUANTILE` over the region's tokens of the step in the edited run."""
Method = Literal["features", "activations", "neurons", "mean", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
SWEPT: tuple[Method, ...] = ("features", "neurons", "random")
"""The methods that move k units of each kind; the others move whole tokens."""
Family = Literal["features", "neurons"]
"""Of which units: random ones are features."""
QUANTILE = 0.95

Rows = Float[Tensor, "tokens d"]
Key = tuple[Site, int]
"""A site and a step."""


class Reach(NamedTuple):
    """Where and when something is transferred."""

    inside: Bool[Tensor, "tokens"] | None
    """The region's image tokens; None: every token of a site."""
    steps: frozenset[int]

    def rows(self, site: Site, txt_tokens: int) -> Bool[Tensor, "tokens"] | None:
        """Which of a site's tokens are meant; None: all. On text and image together a region leaves the text alone."""
        if self.inside is None or site.stream is not None:
            return self.inside
        return torch.cat([torch.zeros(txt_tokens, dtype=torch.bool), self.inside])


class PictureOf(NamedTuple):
    """What is done to one picture."""

    ready: tuple[SiteEdit, ...]
    txt_tokens: int


# ---- Units: the features of an autoencoder, or single neurons


@runtime_checkable
class Units(Protocol):
    """What the tokens of a site consist of."""

    def values(self, x: Rows) -> Float[Tensor, "tokens units"]:
        """How much of each unit is in each token: z."""

    def change(self, delta: Float[Tensor, "tokens n"], numbers: Int[Tensor, "n"]) -> Rows:
        """What is added to the tokens when z of these units changes by `delta`."""


class FeatureUnits:
    """The features of an autoencoder."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae

    def values(self, x: Rows) -> Float[Tensor, "tokens units"]:
        """z, in parts that fit into memory."""
        at_once = max(1, DENSE_VALUES // self.sae.config.d_sae)
        return torch.cat([self.sae.encode(part) for part in torch.split(x, at_once)])

    def change(self, delta: Float[Tensor, "tokens n"], numbers: Int[Tensor, "n"]) -> Rows:
        """(z' - z) W_dec."""
        return delta @ self.sae.W_dec.detach()[numbers].float()


class NeuronUnits:
    """The neurons of a block, each by itself: the dictionary whose rows are the axes."""

    def __init__(self, width: int) -> None:
        self.width = width

    def values(self, x: Rows) -> Float[Tensor, "tokens units"]:
        """The tokens themselves."""
        return x

    def change(self, delta: Float[Tensor, "tokens n"], numbers: Int[Tensor, "n"]) -> Rows:
        """The same z' - z, and 0 for all other neurons."""
        return delta.new_zeros(len(delta), self.width).index_copy(1, numbers, delta)


def neurons_beside(site: Site) -> Site:
    """The feed-forward neurons of the site's block, of the same stream."""
    return replace(site, part="neurons")


# ---- What is read, and what is changed, while a picture is sampled


class AtRegion(ABC):
    """Something that is done to the region's tokens of some sites; a `SiteEdit`."""

    def __init__(self, sites: Iterable[Site], reach: Reach) -> None:
        self.weights: dict[Site, float] = dict.fromkeys(sites, 1.0)
        self.reach = reach

    def __call__(self, site: Site, txt_tokens: int, value: Tokens, step: int) -> Tokens:
        """The value [1, tokens, d] afterwards: itself, and not a copy, where nothing is changed."""
        if step not in self.reach.steps:
            return value
        rows = self.reach.rows(site, txt_tokens)
        before = value[0] if rows is None else value[0, rows.to(value.device)]
        new = self.at(site, before, step)
        if new is None:
            return value
        if rows is None:
            return new.to(value.dtype)[None]
        result = value.clone()
        result[0, rows.to(value.device)] = new.to(value.dtype)
        return result

    @abstractmethod
    def at(self, site: Site, tokens: Tensor, step: int) -> Rows | None:
        """What stands in place of these tokens, in float32; None: they stay."""


class Listener(AtRegion):
    """Reads one run: how active its units are in all, and their mean token; or `wanted` units, token by token."""

    def __init__(
        self,
        units: Mapping[Site, Units],
        reach: Reach,
        *,
        keep: bool = False,
        wanted: Mapping[Site, Int[Tensor, "n"]] | None = None,
    ) -> None:
        super().__init__(units, reach)
        self.units, self.keep, self.wanted = units, keep, wanted
        self.sums: dict[Site, Tensor] = {}
        """|z| of every unit [units], added up over the region's tokens and the steps."""
        self.means: dict[Key, Tensor] = {}
        self.tokens: dict[Key, Tensor] = {}
        """The tokens themselves, if they are kept."""
        self.columns: dict[Key, Tensor] = {}
        """z of the wanted units [tokens, n], on the CPU."""

    def at(self, site: Site, tokens: Tensor, step: int) -> None:
        """Reads, and leaves the tokens as they are."""
        x = tokens.float()
        z = self.units[site].values(x)
        if self.wanted is not None:
            self.columns[site, step] = z[:, self.wanted[site].to(z.device)].cpu()
            return
        self.sums[site] = self.sums.get(site, 0) + z.abs().double().sum(dim=0).cpu()
        self.means[site, step] = x.mean(dim=0).cpu()
        if self.keep:
            self.tokens[site, step] = tokens.cpu()


class UnitTransfer(AtRegion):
    """z' = z + s (target - z) for some units of each site, in x + (z' - z) W_dec: the error term stays."""

    def __init__(
        self,
        units: Mapping[Site, Units],
        numbers: Mapping[Site, Int[Tensor, "n"]],
        targets: Mapping[Key, Float[Tensor, "rows n"]],
        strength: float,
        reach: Reach,
    ) -> None:
        super().__init__(numbers, reach)
        self.units, self.numbers, self.targets, self.strength = units, numbers, targets, strength

    def at(self, site: Site, tokens: Tensor, step: int) -> Rows:
        """The tokens with these units moved towards their targets."""
        x, numbers = tokens.float(), self.numbers[site].to(tokens.device)
        z = self.units[site].values(x)[:, numbers]
        change = self.units[site].change(self.strength * (self.targets[site, step].to(z.device) - z), numbers)
        return torch.where(change == 0, x, x + change)  # adding 0 would turn -0.0 into 0.0


class ActivationTransfer(AtRegion):
    """x + s (x_edited - x): the whole token, the error term too. At strength 1 it is the edited run's, to the bit."""

    def __init__(self, tokens: Mapping[Key, Tensor], strength: float, reach: Reach) -> None:
        super().__init__({site for site, _ in tokens}, reach)
        self.tokens, self.strength = tokens, strength

    def at(self, site: Site, tokens: Tensor, step: int) -> Rows:
        """`lerp` is exact at strength 0 and 1, which the formula as it is written is not."""
        return torch.lerp(tokens.float(), self.tokens[site, step].to(tokens.device).float(), self.strength)


class MeanTransfer(AtRegion):
    """x + s v, v the difference of the mean tokens: one vector for the whole region, per site and step."""

    def __init__(self, vectors: Mapping[Key, Float[Tensor, "d"]], strength: float, reach: Reach) -> None:
        super().__init__({site for site, _ in vectors}, reach)
        self.vectors, self.strength = vectors, strength

    def at(self, site: Site, tokens: Tensor, step: int) -> Rows:
        """The tokens, all moved alike."""
        return tokens.float() + self.strength * self.vectors[site, step].to(tokens.device)


# ---- Which units


class Unit(NamedTuple):
    """One unit of one site."""

    site: Site
    number: int
    share: float
    """How much larger its share in all that is active is, in the run it is chosen for. 0 for one drawn by chance."""


class Chosen(NamedTuple):
    """Units in the order of their choice."""

    subtracted: tuple[Unit, ...]
    added: tuple[Unit, ...]

    def first(self, k: int) -> "Chosen":
        """The k first of each, or as many as there are."""
        return Chosen(self.subtracted[:k], self.added[:k])

    @property
    def available(self) -> int:
        """The largest k that both have."""
        return min(len(self.subtracted), len(self.added))


def choose(original: Mapping[Site, Float[Tensor, "units"]], edited: Mapping[Site, Float[Tensor, "units"]]) -> Chosen:
    """Every unit whose share differs, those that differ most first, the sites pooled.

    `original` and `edited` are the sums of a `Listener`. A unit's share is its sum over that of all units of its site.
    """
    units = []
    for site in sorted(original):
        shares = _shares(original[site]) - _shares(edited[site])
        units += [Unit(site, int(number), float(shares[number])) for number in shares.nonzero().flatten()]
    # Sorting is stable: equal shares stay in the order of their sites and numbers.
    subtracted = sorted((unit for unit in units if unit.share > 0), key=lambda unit: -unit.share)
    added = sorted((unit._replace(share=-unit.share) for unit in units if unit.share < 0), key=lambda unit: -unit.share)
    return Chosen(tuple(subtracted), tuple(added))


def draw(
    original: Mapping[Site, Float[Tensor, "units"]], edited: Mapping[Site, Float[Tensor, "units"]], seed: str
) -> Chosen:
    """The control: units that are active in either run, in an order by chance, every other one to subtract."""
    active = [
        Unit(site, int(number), 0.0)
        for site in sorted(original)
        for number in (original[site] + edited[site]).nonzero().flatten()
    ]
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    order = torch.randperm(len(active), generator=torch.Generator().manual_seed(number)).tolist()
    return Chosen(tuple(active[i] for i in order[::2]), tuple(active[i] for i in order[1::2]))


def _shares(sums: Float[Tensor, "units"]) -> Float[Tensor, "units"]:
    total = float(sums.sum())
    return sums / total if total > 0 else sums


# ---- Two runs, read and compared


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What two runs from the same noise differ in, in a region. In memory are the edited run's tokens of the region."""

    reach: Reach
    txt_tokens: int
    values: Values
    units: Mapping[Family, Mapping[Site, Units]]
    chosen: Mapping[tuple[Method, int], Chosen]
    """The units of each method, and (random) of each draw."""
    numbers: Mapping[Family, Mapping[Site, Int[Tensor, "n"]]]
    """The units that some method may move, ascending."""
    columns: Mapping[Family, Mapping[Key, Float[Tensor, "tokens n"]]]
    """z of them in the edited run."""
    tokens: Mapping[Key, Tensor]
    vectors: Mapping[Key, Float[Tensor, "d"]]

    def edits(self, method: Method, strength: float, k: int | None = None, draw: int = 0) -> PictureEdits | None:
        """What makes a picture of this method; None: it changes nothing."""
        if strength == 0:
            return None
        if method == "activations":
            return PictureOf((ActivationTransfer(self.tokens, strength, self.reach),), self.txt_tokens)
        if method == "mean":
            return PictureOf((MeanTransfer(self.vectors, strength, self.reach),), self.txt_tokens)
        if k is None:
            raise ValueError(f"{method} moves k units: got none")
        chosen = self.chosen[method, draw].first(k)
        if not chosen.subtracted and not chosen.added:
            return None
        family: Family = "neurons" if method == "neurons" else "features"
        return PictureOf((self._of_units(family, chosen, strength),), self.txt_tokens)

    def _of_units(self, family: Family, chosen: Chosen, strength: float) -> UnitTransfer:
        numbers, targets = {}, {}
        for site in sorted({unit.site for unit in (*chosen.subtracted, *chosen.added)}):
            subtracted, added = (
                torch.tensor([unit.number for unit in units if unit.site == site], dtype=torch.int64)
                for units in chosen
            )
            numbers[site] = torch.cat([subtracted, added])
            places = torch.searchsorted(self.numbers[family][site], numbers[site])
            for step in self.reach.steps:
                z = self.columns[family][site, step][:, places]
                targets[site, step] = z if self.values == "spatial" else _quantiles(z, len(subtracted))
        return UnitTransfer(self.units[family], numbers, targets, strength, self.reach)


def compare_runs(
    painter: Painter,
    original: Variant,
    edited: Variant,
    saes: Mapping[Site, SparseAutoencoder],
    reach: Reach,
    *,
    txt_tokens: int,
    most: int,
    draws: int,
    key: str,
    values: Values,
) -> Difference:
    """Both runs are made and read; then the edited one once more, for the units that are chosen now.

    `most` is the largest k; `key` seeds the draws of random units. The run that is read again takes less memory than to
    keep every neuron, and the threads that read it are those of the edits, so its codes have the bits they will see.
    Raises FluxIRError for two runs that have the same tokens in the region.
    """
    hidden = painter.model.params.hidden_size
    beside: dict[Site, Units] = {
        neurons_beside(site): NeuronUnits(int(hidden * painter.model.params.mlp_ratio)) for site in saes
    }
    features: dict[Site, Units] = {site: FeatureUnits(sae) for site, sae in saes.items()}
    units: dict[Family, Mapping[Site, Units]] = {"features": features, "neurons": beside}

    def listened(variant: Variant, *listeners: Listener) -> Made:
        (made,) = painter.make([variant._replace(steering=PictureOf(listeners, txt_tokens))])
        return made

    ours, theirs = (
        {"features": Listener(features, reach, keep=keep), "neurons": Listener(beside, reach)} for keep in (False, True)
    )
    listened(original, *ours.values())
    listened(edited, *theirs.values())
    vectors = {key: mean - ours["features"].means[key] for key, mean in theirs["features"].means.items()}
    if not any(vector.any() for vector in vectors.values()):
        raise FluxIRError(
            "the two prompts give the same tokens at these sites, in the region and at the steps of the transfer",
            hint="name other sites by other autoencoders, a larger region, or prompts that differ",
        )
    sums = {family: (ours[family].sums, theirs[family].sums) for family in ours}
    chosen: dict[tuple[Method, int], Chosen] = {
        ("features", 0): choose(*sums["features"]).first(most),
        ("neurons", 0): choose(*sums["neurons"]).first(most),
    }
    for number in range(draws):
        chosen["random", number] = draw(*sums["features"], f"{number} {key}").first(most)
    numbers: dict[Family, dict[Site, Tensor]] = {}
    for family, of_sites in units.items():
        named = [
            unit
            for (method, _), both in chosen.items()
            if (method == "neurons") == (family == "neurons")
            for unit in (*both.subtracted, *both.added)
        ]
        numbers[family] = {
            site: torch.tensor(sorted({unit.number for unit in named if unit.site == site}), dtype=torch.int64)
            for site in of_sites
        }
    again = {family: Listener(units[family], reach, wanted=numbers[family]) for family in units}
    listened(edited, *again.values())
    return Difference(
        reach=reach,
        txt_tokens=txt_tokens,
        values=values,
        units=units,
        chosen=chosen,
        numbers=numbers,
        columns={family: listener.columns for family, listener in again.items()},
        tokens=theirs["features"].tokens,
        vectors=vectors,
    )


def _quantiles(z: Float[Tensor, "tokens n"], subtracted: int) -> Float[Tensor, "1 n"]:
    """0 for the units that are subtracted, which come first, and the quantile of the others over the tokens."""
    targets = torch.zeros(1, z.shape[1])
    if z.shape[1] > subtracted:
        targets[0, subtracted:] = torch.quantile(z[:, subtracted:], QUANTILE, dim=0)
    return targets
