"""How much a LoRA changes each block: its change against the weights, ||dW|| / ||W|| (Frobenius norms)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.models.checkpoints.lora.read import LoRA, merge


class Lengths(NamedTuple):
    """Squared Frobenius norms of one matrix of the network: of its change, and of itself."""

    weight: str
    changed: float
    own: float


def block_of(weight: str) -> str:
    """`double.3`, `single.9`, or the module outside the blocks that a weight belongs to."""
    module, _, rest = weight.partition(".")
    if module in ("double_blocks", "single_blocks"):
        return f"{module.removesuffix('_blocks')}.{rest.split('.')[0]}"
    return module


def lengths(lora: LoRA, read_into: Callable[[Tensor, str], None], blank: Mapping[str, Tensor]) -> Iterator[Lengths]:
    """Every matrix of the network in depth order, with the LoRA at strength 1.

    `read_into` fills a tensor with the weight of a name as it is without the LoRA (`load.Weights`); `blank` has the
    network's names and shapes.
    """
    at_one = replace(lora, strength=1.0)
    for name in matrices(blank):
        before = torch.empty(blank[name].shape, dtype=torch.float32)
        read_into(before, name)
        own = _squared(before)
        changed = 0.0
        if name in lora.layers:
            after = before.clone()
            merge(after, name, [at_one])
            changed = _squared(after.sub_(before))
        yield Lengths(name, changed, own)


def matrices(blank: Mapping[str, Tensor]) -> list[str]:
    """The names of the linear layers' weights, in the order of the network."""
    return [name for name, tensor in blank.items() if name.endswith(".weight") and tensor.ndim == 2]


def relative_changes(measured: Sequence[Lengths]) -> dict[str, float]:
    """||dW|| / ||W|| of all matrices of a block together, in depth order."""
    sums: dict[str, tuple[float, float]] = {}
    for one in measured:
        changed, own = sums.get(block_of(one.weight), (0.0, 0.0))
        sums[block_of(one.weight)] = changed + one.changed, own + one.own
    return {block: (changed / own) ** 0.5 if own else 0.0 for block, (changed, own) in sums.items()}


def _squared(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
