"""How much a LoRA changes each block: its change against the weights, ||dW|| / ||W|| (Frobenius norms)."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.models.checkpoints.lora.read import LoRA, merge

Shapes = Mapping[str, tuple[int, ...]]
"""Of the weights of linear layers, by their names, in the order of their network."""

_BLOCKS = (
    (re.compile(r"(double|single)_blocks\.(\d+)\."), "{0}.{1}"),
    (re.compile(r"encoder\.block\.(\d+)\."), "t5.{0}"),
    (re.compile(r"text_model\.encoder\.layers\.(\d+)\."), "clip.{0}"),
)


class Lengths(NamedTuple):
    """Squared Frobenius norms of one matrix of a network: of its change, and of itself."""

    weight: str
    changed: float
    own: float


def block_of(weight: str) -> str:
    """`double.3`, `single.9`, `t5.0`, `clip.7`, or the module outside the blocks that a weight belongs to."""
    for pattern, block in _BLOCKS:
        if match := pattern.match(weight):
            return block.format(*match.groups())
    return weight.partition(".")[0]


def lengths(lora: LoRA, read_into: Callable[[Tensor, str], None], shapes: Shapes) -> Iterator[Lengths]:
    """Every matrix of a network in depth order, with the LoRA at strength 1.

    `read_into` fills a tensor with the weight of a name as it is without the LoRA.
    """
    at_one = replace(lora, strength=1.0)
    for name, shape in shapes.items():
        before = torch.empty(shape, dtype=torch.float32)
        read_into(before, name)
        own = _squared(before)
        changed = 0.0
        if name in lora.layers:
            after = before.clone()
            merge(after, name, [at_one])
            changed = _squared(after.sub_(before))
        yield Lengths(name, changed, own)


def matrices(blank: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The linear layers' weights of a transformer, by name, in the order of the network."""
    named = {name: tuple(tensor.shape) for name, tensor in blank.items() if name.endswith(".weight")}
    return {name: shape for name, shape in named.items() if len(shape) == 2}


def relative_changes(measured: Sequence[Lengths]) -> dict[str, float]:
    """||dW|| / ||W|| of all matrices of a block together, in depth order."""
    sums: dict[str, tuple[float, float]] = {}
    for one in measured:
        changed, own = sums.get(block_of(one.weight), (0.0, 0.0))
        sums[block_of(one.weight)] = changed + one.changed, own + one.own
    return {block: (changed / own) ** 0.5 if own else 0.0 for block, (changed, own) in sums.items()}


def _squared(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
