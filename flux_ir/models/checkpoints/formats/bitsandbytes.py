"""bitsandbytes' weights of 4 bits, NF4 and FP4 (Dettmers et al., 2023), read without bitsandbytes.

    layer.weight                                   two codes a byte, the first in the high half
    layer.weight.quant_map                         the 16 values that codes stand for
    layer.weight.absmax                            what a block of 64 values is multiplied with, or codes of it
    layer.weight.nested_quant_map, .nested_absmax  the 256 values of those codes, and the factors of blocks of 256
    layer.weight.quant_state.bitsandbytes__nf4     shape, sizes of blocks and an offset, as JSON

Every product is rounded to float32, as bitsandbytes does it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from flux_ir.models.checkpoints.formats.refused import UnreadableError
from flux_ir.models.checkpoints.headers import TensorEntry, mapped_bytes, read_tensor

_KINDS = ("nf4", "fp4")
_STATE = ".quant_state.bitsandbytes__"
_BYTES_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Blockwise:
    """Codes, the values they stand for, and a factor for each `block` of them. `factors` may be such codes themselves.

    `factors_map` and `factors_absmax`: those of the factors, which `offset` is added to.
    """

    kind: str
    shape: tuple[int, ...]
    codes: TensorEntry
    code_map: TensorEntry
    factors: TensorEntry
    block: int
    factors_map: TensorEntry | None = None
    factors_absmax: TensorEntry | None = None
    factors_block: int = 256
    offset: float = 0.0

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind.upper()}"

    def decode(self) -> Tensor:
        values, codes = read_tensor(self.code_map).to(torch.float32), mapped_bytes(self.codes)
        # Both values of a byte at once: half as many steps, each of 8 bytes.
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)
        numbers = torch.empty(codes.shape[0], 2)
        for start in range(0, codes.shape[0], _BYTES_AT_ONCE):
            part = codes[start : start + _BYTES_AT_ONCE].to(torch.int32)
            torch.index_select(pairs, 0, part, out=numbers[start : start + _BYTES_AT_ONCE])
        flat = numbers.reshape(-1)[: prod(self.shape)]
        return _times(flat, self._factors(), self.block).reshape(self.shape)

    def _factors(self) -> Tensor:
        factors = read_tensor(self.factors)
        if self.factors_map is None or self.factors_absmax is None:
            return factors.to(torch.float32)
        values = read_tensor(self.factors_map).to(torch.float32)[factors.to(torch.int32)]
        return _times(values, read_tensor(self.factors_absmax).to(torch.float32), self.factors_block) + self.offset


def _times(values: Tensor, factors: Tensor, block: int) -> Tensor:
    """Every block of values times its factor, in place; the last block may be shorter."""
    whole = values.numel() // block
    values[: whole * block].view(whole, block).mul_(factors[:whole, None])
    if whole < factors.numel():
        values[whole * block :].mul_(factors[whole])
    return values


def four_bit(name: str, entries: Mapping[str, TensorEntry]) -> tuple[TensorEntry, set[str]] | None:
    """The weight of this name joined with what stands beside it, and the names of all that; None: it is none of these.

    Raises UnreadableError if something is missing or has another size than the weight needs.
    """
    beside = {other: entry for other, entry in entries.items() if other.startswith(f"{name}.")}
    kind = next((kind for kind in _KINDS if f"{name}{_STATE}{kind}" in beside), None)
    if kind is None:
        if f"{name}.absmax" in beside:
            raise UnreadableError(f"holds 4-bit weights of bitsandbytes without what describes them: {name}{_STATE}nf4")
        return None
    state = _state(f"{name}{_STATE}{kind}", beside)
    nested = "nested_blocksize" in state
    needed = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    if missing := [f"{name}.{part}" for part in needed if f"{name}.{part}" not in beside]:
        raise UnreadableError(f"holds incomplete 4-bit weights of bitsandbytes: it lacks {', '.join(missing)}")
    parts = {part: beside[f"{name}.{part}"] for part in needed}
    try:
        shape, block = tuple(int(side) for side in state["shape"]), int(state["blocksize"])
        factors_block, offset = int(state.get("nested_blocksize", 256)), float(state.get("nested_offset", 0.0))
        blocks = ceil(prod(shape) / block)
        sizes = {"absmax": blocks, "quant_map": 16, "nested_absmax": ceil(blocks / factors_block)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnreadableError(f"describes its 4-bit weights wrongly: {name}{_STATE}{kind} is {state}") from error
    sizes["nested_quant_map"] = 256
    for part, entry in parts.items():
        if prod(entry.shape) != sizes[part]:
            raise UnreadableError(
                f"holds broken 4-bit weights: {entry.name} must hold {sizes[part]} numbers, "
                f"and its shape is {entry.shape}"
            )
    codes = entries[name]
    if codes.nbytes != ceil(prod(shape) / 2):
        raise UnreadableError(f"holds broken 4-bit weights: {name} of shape {shape} has {codes.nbytes} bytes of codes")
    encoding = Blockwise(
        kind,
        shape,
        codes,
        code_map=parts["quant_map"],
        factors=parts["absmax"],
        block=block,
        factors_map=parts.get("nested_quant_map"),
        factors_absmax=parts.get("nested_absmax"),
        factors_block=factors_block,
        offset=offset,
    )
    nbytes = codes.nbytes + sum(entry.nbytes for entry in beside.values())
    return codes._replace(shape=shape, nbytes=nbytes, encoding=encoding), {name, *beside}


def _state(name: str, beside: Mapping[str, TensorEntry]) -> dict[str, Any]:
    raw = mapped_bytes(beside[name]).numpy().tobytes()
    try:
        state = json.loads(raw)
    except ValueError as error:
        raise UnreadableError(f"describes its 4-bit weights wrongly: {name} is no JSON") from error
    if not isinstance(state, dict):
        raise UnreadableError(f"describes its 4-bit weights wrongly: {name} is {state!r}")
    return state
