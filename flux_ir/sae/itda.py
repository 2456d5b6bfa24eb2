"""A dictionary of data points: tokens that the tokens before them could not explain (ITDA; Leask et al., 2025).

Nothing is trained: a token whose reconstruction is poor becomes an atom itself, and codes come from gradient pursuit.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flux_ir.errors import FluxIRError
from flux_ir.sae.baselines import Baseline, BaselineConfig, Codes, Vectors
from flux_ir.sae.pursuit import gradient_pursuit

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
        found = _Atoms(centred, d_sae)
        for threshold in thresholds:
            for start in range(0, len(centred), TOKENS_AT_ONCE):
                if found.full:
                    break
                found.consider(start, min(start + TOKENS_AT_ONCE, len(centred)), k, threshold)
        chosen = found.chosen()
        if len(chosen) < k:
            raise FluxIRError(
                f"a dictionary of data points needs at least k = {k} tokens that differ: found {len(chosen)} "
                f"among {len(tokens)}",
                hint="give it more tokens, or choose a smaller k",
            )
        config = BaselineConfig("itda", tokens.shape[1], len(chosen), k)
        return cls(config, found.atoms(), mean.float(), chosen)


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

    def atoms(self) -> Tensor:
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
        atoms = self.atoms()
        missing = x - gradient_pursuit(x, atoms, k) @ atoms
        return missing.square().sum(1) / torch.where(size > 0, size, 1.0)

    def _unlike_each_other(self, rows: Tensor, threshold: float) -> Iterator[int]:
        """Of these rows, in order, those that no single one before them explains: 1 - cos^2 above the threshold."""
        likeness = (self.unit[rows] @ self.unit[rows].T).clamp_min(0).square().cpu()
        kept: list[int] = []
        for place, row in enumerate(rows.tolist()):
            if not kept or 1 - likeness[place, kept].max() > max(threshold, SAME):
                kept.append(place)
                yield row
