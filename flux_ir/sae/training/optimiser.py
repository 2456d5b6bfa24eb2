"""Adam for one autoencoder: float32 master weights, bf16 copies, unit decoder rows, moments that can be sharded.

The matrices have a row per feature; each goes through `kernels.choose.adam_rows_` in one pass (project, step, rescale,
round into the bf16 copy), so that weights, gradient and moments are read and written once. Vectors are stepped
together. No number is read back from the device, which would make the host wait.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.kernels.choose import AdamStep, adam_rows_

BETAS = (0.9, 0.999)
EPS = 6.25e-10  # Gao et al. 2024, appendix A: gradients of rare features are small, 1e-8 would drown them
_TINY = 1e-12  # keeps a gradient of zeros from dividing by zero


class RowRange(NamedTuple):
    """The rows [start, stop) of a matrix that one process owns."""

    start: int
    stop: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


RowReader = Callable[[str, RowRange], Tensor]
"""Reads rows of a stored moment by its name: any rows, whoever wrote them."""


def own_rows(count: int, rank: int, world_size: int) -> RowRange:
    """The rows of `count` that a process owns: contiguous, in order of rank, equal to within one."""
    return RowRange(count * rank // world_size, count * (rank + 1) // world_size)


class RowAdam:
    """Adam over named parameters (Kingma and Ba 2015), read from their `.grad`; gradients are gone after a step."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        unit_rows: Collection[str] = (),
        bf16_copies: Mapping[str, Tensor] | None = None,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        ranks: Ranks | None = None,
        shard: bool = False,
    ) -> None:
        """`unit_rows` names the matrices whose rows keep length one; `bf16_copies` are refreshed, by parameter.

        With `shard`, each process keeps the moments of its rows alone, steps these rows and broadcasts them.
        """
        if unknown := (set(unit_rows) | set(bf16_copies or {})) - set(parameters):
            raise FluxIRError(f"no parameter is called {', '.join(sorted(unknown))}: there are {', '.join(parameters)}")
        self.parameters = dict(parameters)
        self.unit_rows = frozenset(unit_rows)
        self.bf16_copies = dict(bf16_copies or {})
        self.betas, self.eps = betas, eps
        self.ranks = ranks if shard and ranks is not None and ranks.world_size > 1 else None
        self.steps_done = 0
        self.first = {name: torch.zeros_like(p[self.rows(name).slice]) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(moment) for name, moment in self.first.items()}

    def rows(self, name: str) -> RowRange:
        """The rows of a parameter whose moments this process keeps; all of them, unless it is a sharded matrix."""
        count = len(self.parameters[name])
        if self.ranks is None or self.parameters[name].ndim < 2:
            return RowRange(0, count)
        return own_rows(count, self.ranks.rank, self.ranks.world_size)

    @torch.no_grad()
    def step(self, learning_rate: float, *, clip: float | None = None) -> Tensor:
        """One step. Returns the norm of all gradients before they were scaled down to `clip`, a 0-d tensor."""
        gradients = {name: _gradient(name, p) for name, p in self.parameters.items()}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        scale = None if clip is None else (clip / (norm + _TINY)).clamp(max=1.0)
        self.steps_done += 1
        how = AdamStep(self.steps_done, learning_rate, self.betas, self.eps, scale=scale)
        vectors = []
        for name, parameter in self.parameters.items():
            if parameter.ndim < 2:
                vectors.append(name)
                continue
            own = self.rows(name).slice
            bf16_copy = self.bf16_copies.get(name)
            adam_rows_(
                parameter.data[own],
                gradients[name][own],
                self.first[name],
                self.second[name],
                how._replace(unit_rows=name in self.unit_rows),
                bf16_copy=None if bf16_copy is None else bf16_copy[own],
            )
            self._broadcast_rows(name)
        self._step_vectors(vectors, gradients, learning_rate, scale)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def forget(self, name: str, features: Tensor) -> None:
        """Set the moments of these features' rows to zero: they were given new weights."""
        rows = self.rows(name)
        own = features[(features >= rows.start) & (features < rows.stop)] - rows.start
        for moment in (self.first[name], self.second[name]):
            moment[own] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """The moments this process keeps: `{name}.first` and `{name}.second`, of the rows `rows(name)`."""
        first = {f"{name}.first": moment for name, moment in self.first.items()}
        return first | {f"{name}.second": moment for name, moment in self.second.items()}

    def load(self, steps_done: int, read: RowReader) -> None:
        """Take up stored moments, whatever number of processes kept them."""
        self.steps_done = steps_done
        for key, moment in self.state_dict().items():
            moment.copy_(read(key, self.rows(key.rpartition(".")[0])))

    def _step_vectors(
        self, names: list[str], gradients: dict[str, Tensor], learning_rate: float, scale: Tensor | None
    ) -> None:
        """Adam on all vectors at once. Equations of Kingma and Ba 2015, algorithm 1."""
        if not names:
            return
        beta1, beta2 = self.betas
        weights: list[Tensor] = [self.parameters[name].data for name in names]
        grads = [gradients[name] for name in names]
        if scale is not None:
            torch._foreach_mul_(grads, scale)
        first, second = [self.first[name] for name in names], [self.second[name] for name in names]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2**self.steps_done) ** 0.5)
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_addcdiv_(weights, first, denominators, -learning_rate / (1 - beta1**self.steps_done))

    def _broadcast_rows(self, name: str) -> None:
        """Give every process the rows the others stepped. One broadcast per owner: shares may differ by a row."""
        if self.ranks is None:
            return
        weight, bf16_copy, mine = self.parameters[name].data, self.bf16_copies.get(name), self.rows(name)
        for owner in range(self.ranks.world_size):
            rows = own_rows(len(weight), owner, self.ranks.world_size)
            dist.broadcast(weight[rows.slice], src=owner)
            if bf16_copy is not None and rows != mine:
                bf16_copy[rows.slice].copy_(weight[rows.slice])


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise FluxIRError(f"{name} has no gradient: every parameter must take part in the loss")
    return parameter.grad
