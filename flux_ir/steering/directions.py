"""Directions in the activations of a site: features of an autoencoder, and plain vectors.

Both say what one unit of z adds to a token, how much z a token has, and how much z a strength of 1 is. Next: `apply`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.evaluation.metrics import DENSE_VALUES
from flux_ir.steering.edits import Unit

Rows = Float[Tensor, "tokens d"]
Activations = Float[Tensor, "tokens features"]


class Features:
    """Some features of an autoencoder."""

    def __init__(self, sae: SparseAutoencoder, numbers: Sequence[int]) -> None:
        beyond = [number for number in numbers if not 0 <= number < sae.config.d_sae]
        if beyond:
            raise FluxIRError(
                f"this autoencoder has the features 0 to {sae.config.d_sae - 1}: got {beyond[0]}",
                hint="features of another autoencoder have other numbers",
            )
        self.sae, self.numbers = sae, torch.tensor(numbers)
        self._rows = sae.W_dec.detach()[self.numbers].float()

    def rows(self, step: int) -> Float[Tensor, "features d"]:
        """What one unit of z adds to a token."""
        return self._rows

    @torch.no_grad()
    def activations(self, x: Rows, step: int) -> Activations:
        """How much of each feature is in each token: z."""
        at_once = max(1, DENSE_VALUES // self.sae.config.d_sae)
        return torch.cat([self.sae.encode(part)[:, self.numbers] for part in torch.split(x, at_once)])

    def unit(self, unit: Unit, length: Float[Tensor, ""]) -> Float[Tensor, "features"]:
        """A strength of 1, in z. `length` is the mean one of the site's tokens."""
        ones = torch.ones(len(self.numbers), device=self._rows.device)
        if unit == "raw":
            return ones
        if unit == "norm":
            return ones * length / self._rows.norm(dim=1)
        known = self.sae.max_active if unit == "max" else self.sae.mean_active
        if known is None:
            raise FluxIRError(
                f"the folder of this autoencoder does not say how strongly its features are active: --unit {unit} "
                "cannot be used",
                hint="--unit norm measures strengths by the length of the tokens",
            )
        values = known[self.numbers].float()
        if (values <= 0).any():
            silent = int(self.numbers[values <= 0][0])
            raise FluxIRError(
                f"feature {silent} was never active in training, so it has no {unit} to measure strengths by",
                hint="choose a feature that is active, or --unit norm",
            )
        return values

    def digest(self) -> str:
        """16 hex digits that stand for the autoencoder's weights."""
        return tensors_digest(self.sae.W_dec, self.sae.encoder, self.sae.b_enc, self.sae.b_dec)

    @torch.no_grad()
    def explained(self, x: Rows) -> Rows:
        """The part of each token that all features together stand for, b_dec not counted."""
        at_once = max(1, DENSE_VALUES // self.sae.config.d_sae)
        return torch.cat([self.sae.encode(part) @ self.sae.W_dec for part in torch.split(x, at_once)])


class Vector:
    """A plain direction, or one per step; with any unit but raw, its length does not count."""

    def __init__(self, vector: Tensor, unit: Unit, name: str) -> None:
        if vector.ndim not in (1, 2) or vector.numel() == 0 or not vector.isfinite().all():
            raise FluxIRError(
                f"a vector is finite numbers [d], or [steps, d]: {name} has {list(vector.shape)}"
                f"{'' if vector.isfinite().all() else ', not all finite'}",
                hint="save one tensor of this shape",
            )
        self.vector = vector.detach().float().reshape(-1, vector.shape[-1])
        lengths = self.vector.norm(dim=1, keepdim=True)
        if (lengths == 0).any():
            raise FluxIRError(f"a vector has a direction: {name} is all zero", hint="leave the edit out")
        if unit != "raw":
            self.vector = self.vector / lengths

    def rows(self, step: int) -> Float[Tensor, "features d"]:
        """What one unit of z adds to a token."""
        return self.vector[step : step + 1] if len(self.vector) > 1 else self.vector

    def activations(self, x: Rows, step: int) -> Activations:
        """The length of each token along it, in units of it: z."""
        row = self.rows(step)
        return x @ row.T / row.square().sum()

    def unit(self, unit: Unit, length: Float[Tensor, ""]) -> Float[Tensor, "features"]:
        """A strength of 1, in z. `length` is the mean one of the site's tokens."""
        return (length if unit == "norm" else torch.ones((), device=self.vector.device)).reshape(1)

    def digest(self) -> str:
        """16 hex digits that stand for the vector."""
        return tensors_digest(self.vector)


Direction = Features | Vector


def read_vector(path: str | Path) -> Tensor:
    """A vector's file, `FILE.safetensors` or `FILE.safetensors:NAME`. Raises FluxIRError if there is none in it."""
    file, _, name = str(path).partition(".safetensors:")
    file = file + ".safetensors" if name else file
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            if not name and len(names) != 1:
                raise FluxIRError(
                    f"{file} must hold one vector, or be asked for one: it holds {', '.join(names) or 'none'}",
                    hint=f"name it, as {file}:{names[0] if names else 'NAME'}",
                )
            if name and name not in names:
                raise FluxIRError(
                    f"{file} holds no {name!r}: it holds {', '.join(names) or 'nothing'}", hint="name one of them"
                )
            return tensors.get_tensor(name or names[0])
    except (OSError, SafetensorError) as error:
        raise FluxIRError(f"cannot read the vector in {file}: {error}", hint="write a .safetensors file") from error


def tensors_digest(*tensors: Tensor) -> str:
    """16 hex digits that stand for the values of some tensors."""
    content = b"".join(tensor.detach().float().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]
