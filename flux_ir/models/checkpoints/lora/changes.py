"""What a layer of a LoRA adds to the rows of its weight.

LoRA (Hu et al., 2021): scale * (up @ down). LoHa (Hyeon-Woo et al., 2022): the elementwise product of two of these.
LoKr (Yeh et al., 2024): scale * kron(w1, w2), each of the two whole or a product. DoRA (Liu et al., 2024): the changed
weight is brought to learnt norms of its rows, or of its columns.

Everything is float32 on the CPU, wherever the network goes, and products are computed for queries, keys and values one
by one, wherever a file has them together: one LoRA gives the same bits on every device and in every layout.

A plain LoRA is added some rows at a time, which stay in the cache of a core: seven times as fast as a whole product,
for which the system has to find memory first. Streamed blocks are merged at every step.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.headers import TensorEntry, read_tensor
from flux_ir.models.checkpoints.lora.names import Target

Method = Literal["LoRA", "LoHa", "LoKr"]

_NEEDED: dict[Method, tuple[str, ...]] = {
    "LoRA": ("down", "up"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": (),
}
_CACHED = 1 << 20  # elements of a product that are worked on together


class Layer(NamedTuple):
    """What a file has for one layer of the network: its tensors, unread, by the names of `names.LEAVES`."""

    name: str
    method: Method
    target: Target
    tensors: Mapping[str, TensorEntry]
    scale: float
    """What the product is multiplied with at strength 1."""

    @property
    def rank(self) -> int | None:
        """The inner width of its products; None for a LoKr that has none."""
        return rank_of(self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether its change is one product, whatever the weight is."""
        return self.method == "LoRA" and not self.is_dora

    @property
    def is_dora(self) -> bool:
        """Whether it has norms of its own."""
        return "magnitude" in self.tensors


def method_of(tensors: Mapping[str, TensorEntry], name: str) -> Method:
    """Which kind of change these tensors are. Raises FluxIRError if one of them is missing."""
    method: Method = "LoRA"
    if any(leaf.startswith("hada_") for leaf in tensors):
        method = "LoHa"
    elif any(leaf.startswith("lokr_") for leaf in tensors):
        method = "LoKr"
    missing = [leaf for leaf in _NEEDED[method] if leaf not in tensors]
    if method == "LoKr":
        pairs = {f"lokr_{w}": (f"lokr_{w}_a", f"lokr_{w}_b") for w in ("w1", "w2")}
        missing = [w for w, pair in pairs.items() if w not in tensors and not all(part in tensors for part in pair)]
    if missing:
        raise FluxIRError(
            f"{name} lacks {' and '.join(missing)}: it has {', '.join(sorted(tensors))}",
            hint="the file is incomplete: download it again",
        )
    return method


def rank_of(tensors: Mapping[str, TensorEntry]) -> int | None:
    """The inner width of the products that these tensors are the factors of; None if there is none."""
    # LyCORIS divides alpha by the width of the second product, where there are two.
    for leaf in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if leaf in tensors:
            return tensors[leaf].shape[0]
    return None


def columns_of(layer: Layer) -> int:
    """The columns of its weight. Raises FluxIRError for products that do not go together."""
    return _shape(layer, _factor_shapes(layer))[1]


def _factor_shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    return {leaf: entry.shape for leaf, entry in layer.tensors.items() if leaf not in ("alpha", "magnitude")}


def check_shapes(layer: Layer, shape: tuple[int, ...]) -> None:
    """Raises FluxIRError unless the layer gives a change of this shape: of its rows of its weight."""
    two = _factor_shapes(layer)
    for leaf, found in two.items():
        if len(found) != 2:
            raise _misfit(layer, f"{leaf} must have two axes and is {list(found)}")
    given = _shape(layer, two)
    if given != shape:
        raise _misfit(layer, f"its change is {list(given)}, and the rows of {layer.target.weight} are {list(shape)}")
    if layer.is_dora:
        norms = layer.tensors["magnitude"].shape
        if norms not in ((shape[0],), (shape[0], 1), (1, shape[1])):
            raise _misfit(
                layer,
                f"its norms (DoRA) must be {[shape[0]]}, {[shape[0], 1]} or {[1, shape[1]]} and are {list(norms)}",
            )


def _shape(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    def product(left: str, right: str) -> tuple[int, ...]:
        if shapes[left][1] != shapes[right][0]:
            raise _misfit(layer, f"the ranks of {left} {list(shapes[left])} and {right} {list(shapes[right])} differ")
        return shapes[left][0], shapes[right][1]

    if layer.method == "LoRA":
        return product("up", "down")
    if layer.method == "LoHa":
        first, second = product("hada_w1_a", "hada_w1_b"), product("hada_w2_a", "hada_w2_b")
        if first != second:
            raise _misfit(layer, f"its two products are {list(first)} and {list(second)}")
        return first
    factors = [shapes[w] if w in shapes else product(f"{w}_a", f"{w}_b") for w in ("lokr_w1", "lokr_w2")]
    return tuple(math.prod(sides) for sides in zip(*factors, strict=True))


def _misfit(layer: Layer, problem: str) -> FluxIRError:
    return FluxIRError(f"{layer.name} does not fit the network: {problem}", hint="take a LoRA of this model")


def add_product(layer: Layer, weight: Tensor, strength: float) -> None:
    """Add the change of a layer that `is_plain`, times `strength`, to `weight`, the rows of its target."""
    target = layer.target
    up, down = _read(layer, "up").mul_(layer.scale), _read(layer, "down")
    if target.swap_halves:
        up = torch.cat(up.chunk(2)[::-1])
    together = max(1, _CACHED // down.shape[1])
    product = torch.empty(together, down.shape[1])
    for before, after in pairwise(cut - target.cuts[0] for cut in target.cuts):
        for begin in range(before, after, together):
            rows = slice(begin, min(begin + together, after))
            # A clone: where a matrix begins in memory may decide how a product is rounded.
            part = torch.mm(up[rows].clone(), down, out=product[: rows.stop - rows.start])
            # In two steps: in one, whether a product is rounded before it is added depends on where it lies in memory.
            weight[rows] += part if strength == 1 else part.mul_(strength)


def change(layer: Layer, base: Tensor) -> Tensor:
    """What is added to `base`, the rows as they are without any LoRA, at strength 1: float32 [rows, columns]."""
    delta = _product(layer)
    if not layer.is_dora:
        return delta
    changed = delta.add_(base)
    norms = _read(layer, "magnitude")
    # A vector, or a column, has a norm for each row; a row has one for each column.
    of_columns = norms.ndim == 2 and norms.shape[0] == 1 and base.shape[0] != 1
    lengths = torch.linalg.vector_norm(changed, dim=0 if of_columns else 1, keepdim=True)
    factors = norms.reshape(lengths.shape) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return changed.mul_(factors).sub_(base)


def _product(layer: Layer) -> Tensor:
    """Its product times its scale."""
    target = layer.target
    if layer.method == "LoRA":
        whole = torch.zeros(target.cuts[-1] - target.cuts[0], layer.tensors["down"].shape[1])
        add_product(layer, whole, 1.0)
        return whole
    if layer.method == "LoHa":
        whole = (_read(layer, "hada_w1_a") @ _read(layer, "hada_w1_b")).mul_(
            _read(layer, "hada_w2_a") @ _read(layer, "hada_w2_b")
        )
    else:
        whole = torch.kron(*(_factor(layer, w) for w in ("lokr_w1", "lokr_w2")))
    whole.mul_(layer.scale)
    return torch.cat(whole.chunk(2)[::-1]) if target.swap_halves else whole


def _factor(layer: Layer, w: str) -> Tensor:
    return _read(layer, w) if w in layer.tensors else _read(layer, f"{w}_a") @ _read(layer, f"{w}_b")


def _read(layer: Layer, leaf: str) -> Tensor:
    return read_tensor(layer.tensors[leaf]).to(torch.float32, copy=True).contiguous()
