"""What a sparse autoencoder has to beat: PCA, random directions, data points (ITDA) and the network's own neurons.

Each is used as an autoencoder is (`encode`, `decode`, `forward`, `config.k`, `config.d_sae`), in raw space. First the
four dictionaries, then gradient pursuit, which encodes where there is no encoder; `BaselineFits` makes them from the
training tokens of one evaluation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.sae.data.held_out import EvaluationData
from flux_ir.sae.evaluation.metrics import Evaluation, evaluate
from flux_ir.sites import Site

BaselineName = Literal["pca", "random", "itda", "neurons"]
Vectors = Float[Tensor, "*batch d"]
Codes = Float[Tensor, "*batch d_sae"]
AnyVectors = Float[Tensor, "*batch _d"]  # neurons read vectors of another width than they give back


@dataclass(frozen=True)
class BaselineConfig:
    """What a baseline is: named like the fields of an autoencoder's configuration.

    Raises FluxIRError unless 1 <= k <= d_sae.
    """

    architecture: BaselineName
    d_in: int
    d_sae: int
    k: int
    """Most features that fire on one token."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae:
            raise FluxIRError(
                f"the baseline {self.architecture} must use between 1 and its {self.d_sae} features per token: "
                f"got k = {self.k}",
                hint="choose a smaller k",
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


class Baseline(nn.Module):
    """A dictionary that was not trained by gradient descent: features times `W_dec` plus `b_dec`."""

    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, config: BaselineConfig, W_dec: Float[Tensor, "d_sae d"], b_dec: Float[Tensor, " d"]) -> None:  # noqa: N803
        super().__init__()
        self.config = config
        self.register_buffer("W_dec", W_dec)
        self.register_buffer("b_dec", b_dec)

    def encode(self, x: AnyVectors) -> Codes:
        """Features of activations: at most k of each row are not zero."""
        raise NotImplementedError

    def decode(self, features: Codes) -> Vectors:
        """The activations these features stand for."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: AnyVectors) -> AnyVectors:
        return self.decode(self.encode(x))


class Covariance:
    """Count, mean and covariance of rows that come in batches: float64, merged as by Chan, Golub & LeVeque (1983)."""

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros(d, d, dtype=torch.float64, device=device)
        """Sum over rows of the outer product of (row - mean) with itself."""

    def add(self, rows: Float[Tensor, "tokens d"]) -> None:
        """Take these rows in."""
        if not len(rows):
            return
        exact = rows.double()
        mean = exact.mean(0)
        difference, both = mean - self.mean, self.count + len(rows)
        centred = exact - mean
        self.products.addmm_(centred.T, centred).addr_(difference, difference, alpha=self.count * len(rows) / both)
        self.mean += difference * (len(rows) / both)
        self.count = both


class PCA(Baseline):
    """The best linear code of k numbers per token: no dictionary that uses one fixed set of k directions has less FVU.

    All k features fire on every token, with either sign.
    """

    def encode(self, x: Vectors) -> Codes:
        return (x - self.b_dec) @ self.W_dec.T

    @classmethod
    def of(cls, covariance: Covariance, rank: int) -> "PCA":
        """The leading `rank` components. Raises FluxIRError if the data has no more dimensions than that, or no rows.

        Each component's sign is chosen so that its largest entry is positive: the same data give the same bits.
        """
        d = len(covariance.mean)
        if rank > d:
            raise FluxIRError(
                f"PCA of activations of width {d} has at most {d} components: got rank {rank}",
                hint="choose a smaller k",
            )
        if not covariance.count:
            raise FluxIRError("PCA needs at least one token: got none", hint="check the filters of the tokens")
        _, vectors = torch.linalg.eigh(covariance.products)  # in rising order of variance
        leading = vectors[:, -rank:].flip(1).T
        largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
        leading = leading * largest.sign()
        return cls(BaselineConfig("pca", d, rank, rank), leading.float().contiguous(), covariance.mean.float())


class RandomDictionary(Baseline):
    """Directions drawn at random, with as good an encoder as any: what a dictionary gives that knows nothing.

    Tokens are matched by gradient pursuit, which is given the k best directions one after another.
    """

    def encode(self, x: Vectors) -> Codes:
        return gradient_pursuit(x - self.b_dec, self.W_dec, self.config.k)

    @classmethod
    def draw(cls, mean: Float[Tensor, " d"], d_sae: int, k: int, generator: torch.Generator) -> "RandomDictionary":
        """Directions uniform on the sphere, around this mean. The generator lives on the CPU."""
        rows = torch.randn(d_sae, len(mean), generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        config = BaselineConfig("random", len(mean), d_sae, k)
        return cls(config, rows.to(mean.device), mean.float())


class Neurons(Baseline):
    """The network's own feed-forward neurons as a dictionary: only the k that write the most are let through.

    It reads what a `.neurons` site recorded, not what an autoencoder reads, and reconstructs what the second linear
    layer makes of it (`target`). The neurons that are left out rest at their mean instead of at zero.
    """

    rest: Tensor
    bias: Tensor
    row_norms: Tensor

    def __init__(
        self,
        config: BaselineConfig,
        W_dec: Float[Tensor, "d_sae d"],  # noqa: N803
        bias: Float[Tensor, " d"],
        rest: Float[Tensor, " d_sae"],
    ) -> None:
        super().__init__(config, W_dec, bias + rest @ W_dec)
        self.register_buffer("bias", bias)
        self.register_buffer("rest", rest)
        self.register_buffer("row_norms", W_dec.norm(dim=1), persistent=False)

    def encode(self, x: Codes) -> Codes:
        """How far the k neurons that write the most are from their rest: the largest |activation| x ||output row||."""
        from_rest = x - self.rest
        chosen = (from_rest.abs() * self.row_norms).topk(self.config.k, dim=-1).indices
        return torch.zeros_like(from_rest).scatter(-1, chosen, from_rest.gather(-1, chosen))

    def target(self, neurons: Codes) -> Vectors:
        """What the second linear layer makes of all neurons: what is to be reconstructed."""
        return neurons @ self.W_dec + self.bias

    @classmethod
    def of(cls, model: Transformer, site: Site, k: int, rest: Float[Tensor, " d_sae"] | None = None) -> "Neurons":
        """The neurons of a `.neurons` site, which rest at `rest` (None: at zero).

        In a single block they share their linear layer with attention, and have its last rows; its bias counts as
        theirs. Raises FluxIRError for any other site.
        """
        if site.part != "neurons":
            raise FluxIRError(
                f"neurons are recorded at a site that ends in .neurons: got {site}",
                hint=f"capture {site.kind}.{site.block}{_with_stream(site)}.neurons",
            )
        weight, bias = _second_linear(model, site)
        config = BaselineConfig("neurons", weight.shape[1], weight.shape[0], k)
        if rest is None:
            rest = torch.zeros(weight.shape[0], device=weight.device)
        return cls(config, weight, bias, rest.float())


def _second_linear(model: Transformer, site: Site) -> tuple[Tensor, Tensor]:
    """Weight [neurons, d] and bias [d] of the layer behind the neurons, in float32."""
    double, block = site.kind == "double", f"{site.kind}_blocks.{site.block}"
    linear = model.get_submodule(f"{block}.{site.stream}_mlp.2" if double else f"{block}.linear2")
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().float()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
    if not double:
        weight = weight[:, model.params.hidden_size :]  # attention has the first columns
    return weight.T.contiguous(), bias


def _with_stream(site: Site) -> str:
    return "" if site.stream is None else f".{site.stream}"


# ---- A dictionary of data points: inference-time decomposition of activations (ITDA, Leask et al. 2025)
# The relative squared error from which a token becomes an atom. The paper has one; here it falls from pass to pass
# until the dictionary is full, so that its size can be chosen and the worst explained tokens come first.
THRESHOLDS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.0)
TOKENS_AT_ONCE = 256  # judged with the same dictionary; among themselves they are compared one by one
SAME = 1e-6  # relative squared error below which a token is a copy: float32 rounding


class ITDA(Baseline):
    """Atoms are directions from the mean to chosen tokens; codes are >= 0, at most k a token."""

    atom_tokens: Tensor

    def __init__(
        self,
        config: BaselineConfig,
        W_dec: Float[Tensor, "d_sae d"],  # noqa: N803
        b_dec: Float[Tensor, " d"],
        atom_tokens: Int[Tensor, " d_sae"],
    ) -> None:
        super().__init__(config, W_dec, b_dec)
        self.register_buffer("atom_tokens", atom_tokens)

    def encode(self, x: Vectors) -> Codes:
        return gradient_pursuit(x - self.b_dec, self.W_dec, self.config.k)

    @classmethod
    def fit(
        cls,
        tokens: Float[Tensor, "tokens d"],
        mean: Float[Tensor, " d"],
        d_sae: int,
        k: int,
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> "ITDA":
        """At most `d_sae` atoms from `tokens` (shuffle them first: they are judged in order), around `mean`.

        `atom_tokens` says which token each atom is. Raises FluxIRError if fewer than k atoms are found.
        """
        centred = tokens.float() - mean.float()
        atoms = _Atoms(centred, d_sae)
        for threshold in thresholds:
            for start in range(0, len(centred), TOKENS_AT_ONCE):
                if atoms.full:
                    break
                atoms.consider(start, min(start + TOKENS_AT_ONCE, len(centred)), k, threshold)
        chosen = atoms.chosen()
        if len(chosen) < k:
            raise FluxIRError(
                f"a dictionary of data points needs at least k = {k} tokens that differ: found {len(chosen)} "
                f"among {len(tokens)}",
                hint="give it more tokens, or choose a smaller k",
            )
        config = BaselineConfig("itda", tokens.shape[1], len(chosen), k)
        return cls(config, atoms.directions(), mean.float(), chosen)


class _Atoms:
    """The dictionary while it grows."""

    def __init__(self, centred: Tensor, most: int) -> None:
        self.centred = centred
        self.unit = F.normalize(centred, dim=1, eps=torch.finfo(centred.dtype).tiny)
        self.most = most
        self.rows: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.most

    def chosen(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.int64, device=self.centred.device)

    def directions(self) -> Tensor:
        return self.unit[self.chosen()]

    def consider(self, start: int, stop: int, k: int, threshold: float) -> None:
        """Take the tokens from `start` to `stop` that neither the dictionary nor each other explain."""
        error = self._errors(self.centred[start:stop], k)
        poor = (error > max(threshold, SAME)).nonzero().flatten()
        for row in self._unlike_each_other(poor + start, threshold):
            if self.full:
                return
            self.rows.append(row)

    def _errors(self, x: Tensor, k: int) -> Tensor:
        """||x - x_hat||^2 / ||x||^2 of each row; a row of zeros needs no atom."""
        size = x.square().sum(1)
        if not self.rows:
            return (size > 0).float()
        atoms = self.directions()
        residual = x - gradient_pursuit(x, atoms, k) @ atoms
        return residual.square().sum(1) / torch.where(size > 0, size, 1.0)

    def _unlike_each_other(self, rows: Tensor, threshold: float) -> Iterator[int]:
        """The numbers of those rows that no single one before them explains: 1 - cos^2 above the threshold."""
        squared_cosine = (self.unit[rows] @ self.unit[rows].T).clamp_min(0).square().cpu()
        kept: list[int] = []
        for index, row in enumerate(rows.tolist()):
            if not kept or 1 - squared_cosine[index, kept].max() > max(threshold, SAME):
                kept.append(index)
                yield row


# ---- Codes in a dictionary that has no encoder
CODES_AT_ONCE = 1 << 24  # entries of a [rows, atoms] product held at a time: 64 MB in float32


@torch.no_grad()
def gradient_pursuit(
    x: Float[Tensor, "*batch d"], atoms: Float[Tensor, "atoms d"], k: int
) -> Float[Tensor, "*batch atoms"]:
    """Codes >= 0 with at most `k` atoms a row, such that codes @ atoms is near `x`. Atoms are unit rows.

    Gradient pursuit (Blumensath & Davies, 2008): each of k rounds adds the atom most like the residual, then moves all
    codes chosen so far along the gradient of the squared error, by the exact best length. Here they are clipped at zero
    too, as features are.
    """
    at_once = max(1, CODES_AT_ONCE // max(1, len(atoms)))
    rows = x.reshape(-1, x.shape[-1])
    codes = x.new_zeros(len(rows), len(atoms))
    for start in range(0, len(rows), at_once):
        codes[start : start + at_once] = _pursue(rows[start : start + at_once], atoms, k)
    return codes.reshape(*x.shape[:-1], len(atoms))


def _pursue(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    codes = x.new_zeros(len(x), len(atoms))
    chosen = torch.zeros_like(codes, dtype=torch.bool)
    residual = x
    for _ in range(min(k, len(atoms))):
        correlation = residual @ atoms.T
        best = correlation.masked_fill(chosen, -torch.inf).argmax(1, keepdim=True)
        # An atom that points away from the residual would only be clipped again.
        chosen.scatter_(1, best, correlation.gather(1, best) > 0)
        gradient = correlation * chosen
        direction = gradient @ atoms
        # The length that minimises ||residual - length * direction||^2: <residual, direction> / ||direction||^2.
        squares = direction.square().sum(1, keepdim=True)
        length = (residual * direction).sum(1, keepdim=True) / torch.where(squares > 0, squares, 1.0)
        codes = (codes + length * gradient).clamp_min(0)
        residual = x - codes @ atoms
    return codes


# ---- Made for one evaluation
ITDA_TOKENS = 8  # per atom: most tokens are explained by others
ITDA_BYTES = 2 * 2**30  # of float32 tokens that atoms are chosen from
DRAW_SEED = 0


class BaselineFits:
    """Makes baselines from the training tokens of one evaluation. The covariance is computed once."""

    def __init__(self, data: EvaluationData, *, fit_tokens: int, batch_tokens: int, device: torch.device) -> None:
        self.data, self.device = data, device
        self.fit_tokens, self.batch_tokens = fit_tokens, batch_tokens

    @cached_property
    def covariance(self) -> Covariance:
        """The covariance of the training tokens."""
        covariance = Covariance(self.data.source.d(self.data.site), self.device)
        for batch in self.data.tokens("training", self.batch_tokens, self.fit_tokens):
            covariance.add(batch.values.to(self.device))
        return covariance

    @property
    def mean(self) -> Tensor:
        """The mean of the training tokens, float32 [d]."""
        return self.covariance.mean.float()

    def make(self, name: Literal["pca", "random", "itda"], d_sae: int, k: int) -> Baseline:
        """The baseline of this name, with `d_sae` features where it can have as many as one asks for."""
        match name:
            case "pca":
                return self.pca(k)
            case "random":
                return self.random(d_sae, k)
            case "itda":
                return self.itda(d_sae, k)

    def pca(self, k: int) -> Baseline:
        """The k leading components; no more than there are dimensions."""
        return PCA.of(self.covariance, min(k, len(self.covariance.mean)))

    def random(self, d_sae: int, k: int) -> Baseline:
        """`d_sae` random directions, k of them at a time."""
        return RandomDictionary.draw(self.mean, d_sae, k, torch.Generator().manual_seed(DRAW_SEED))

    def itda(self, d_sae: int, k: int) -> Baseline:
        """At most `d_sae` of the training tokens, k of them at a time."""
        room = ITDA_BYTES // (4 * len(self.mean))
        most = min(ITDA_TOKENS * d_sae, room, self.fit_tokens)
        parts = [batch.values.float() for batch in self.data.tokens("training", self.batch_tokens, most)]
        tokens = torch.cat(parts)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(DRAW_SEED))
        return ITDA.fit(tokens[order].to(self.device), self.mean, d_sae, k)


def evaluate_neurons(
    model: Transformer,
    data: EvaluationData,
    k: int,
    *,
    fit_tokens: int,
    batch_tokens: int,
    max_tokens: int | None,
    device: torch.device,
) -> tuple[Neurons, Evaluation]:
    """The neurons behind the site, k of them at a time, and how well these reconstruct what all of them write.

    They have to reconstruct the feed-forward branch and not the block's output, which holds much more.

    Raises FluxIRError if the captures do not have the neurons.
    """
    site = neurons_of(data)
    of_neurons = replace(data, site=site)
    total, count = torch.zeros(data.source.d(site), dtype=torch.float64, device=device), 0
    for batch in of_neurons.tokens("training", batch_tokens, fit_tokens):
        total += batch.values.to(device).double().sum(0)
        count += len(batch.values)
    neurons = Neurons.of(model, site, min(k, len(total)), rest=(total / max(1, count)).float())
    tokens = of_neurons.tokens(data.side, batch_tokens, max_tokens)
    found = evaluate(neurons, tokens, d_sae=neurons.config.d_sae, device=device, target=neurons.target)
    return neurons, found


def neurons_of(data: EvaluationData) -> Site:
    """The site of the neurons in the block of the site. Raises FluxIRError if it was not captured."""
    if data.site is None:
        raise FluxIRError("a plain array has no neurons", hint="leave neurons out of --baselines")
    site = replace(data.site, part="neurons")
    if site not in data.source.sites and site.whole not in data.source.sites:
        raise FluxIRError(
            f"the baseline of neurons needs {site}, which these captures do not have",
            hint=f"collect it as well, with --sites {data.site},{site}, or leave neurons out of --baselines",
        )
    return site
