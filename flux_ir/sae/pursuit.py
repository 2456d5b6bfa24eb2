"""Sparse codes in a dictionary that has no encoder: which atoms to use, and how much of each."""

import torch
from jaxtyping import Float
from torch import Tensor

CODES_AT_ONCE = 1 << 24  # entries of a [rows, atoms] product held at a time: 64 MB in float32


@torch.no_grad()
def gradient_pursuit(
    x: Float[Tensor, "*batch d"], atoms: Float[Tensor, "atoms d"], k: int
) -> Float[Tensor, "*batch atoms"]:
    """Codes >= 0 with at most `k` atoms a row, such that codes @ atoms is near `x`. Atoms are unit rows.

    Each of k rounds adds the atom most like what is still missing, then moves all codes chosen so far along the
    gradient, by the exact best length (Blumensath & Davies, 2008), and clips them at zero as features are.
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
    missing = x
    for _ in range(min(k, len(atoms))):
        likeness = missing @ atoms.T
        best = likeness.masked_fill(chosen, -torch.inf).argmax(1, keepdim=True)
        # An atom that points away from what is missing would only be clipped again.
        chosen.scatter_(1, best, likeness.gather(1, best) > 0)
        gradient = likeness * chosen
        direction = gradient @ atoms
        squares = direction.square().sum(1, keepdim=True)
        length = (missing * direction).sum(1, keepdim=True) / torch.where(squares > 0, squares, 1.0)
        codes = (codes + length * gradient).clamp_min(0)
        missing = x - codes @ atoms
    return codes
