"""Weights of 8 bits with scales beside them: ComfyUI's float8 and int8, bitsandbytes' int8, quanto's.

    layer.weight, layer.scale_weight or layer.weight_scale     ComfyUI, older and newer; diffusers' fp8 files alike
    layer.weight (int8), layer.SCB                             bitsandbytes: a row's largest absolute value
    layer.weight._data, layer.weight._scale                    quanto

ComfyUI's newer files say for each layer how it was made, in a tensor (`layer.comfy_quant`) or in the header. What they
say is held against what is there, and formats that are not known are refused by their name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from flux_ir.models.checkpoints.formats.refused import UnreadableError
from flux_ir.models.checkpoints.headers import PLAIN, TensorEntry, mapped_bytes, read_metadata, read_tensor

MARK = "scaled_fp8"
"""A tensor that says of a whole file that its float8 weights have scales."""
_SCALES = ("scale_weight", "weight_scale")
# What else may stand beside such weights: how they were made, or how a GPU may round their inputs and outputs.
_BESIDE = ("scale_input", "input_scale", "output_scale", "comfy_quant", "weight_format")
_HEADER_KEY = "_quantization_metadata"
# The types that weights of a named format may have in the file: plain bytes may stand for float8.
_FORMATS = {
    "float8_e4m3fn": ("F8_E4M3", "U8"),
    "float8_e5m2": ("F8_E5M2", "U8"),
    "int8_tensorwise": ("I8",),
}
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_CANNOT = "holds quantised weights that cannot be read"
_ONE_127TH = 7.874015718698502e-3  # as bitsandbytes has it: 1 / 127 rounded to float32

Format = Mapping[str, Any]


@dataclass(frozen=True)
class Scaled:
    """Numbers times one scale in all, or one for each row, and times a constant: each product rounded to float32."""

    values: TensorEntry
    scale: TensorEntry
    dtype: torch.dtype
    """What the values are, whatever the file calls them."""
    constant: float = 1.0

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} with scales"

    def decode(self) -> Tensor:
        numbers = read_tensor(self.values).view(self.dtype).to(torch.float32, copy=True)
        scale = read_tensor(self.scale).to(torch.float32)
        numbers.mul_(scale.reshape(-1, *(1 for _ in self.values.shape[1:])))
        return numbers if self.constant == 1.0 else numbers.mul_(self.constant)


def scaled(
    name: str, entries: Mapping[str, TensorEntry], formats: Mapping[str, Format]
) -> tuple[TensorEntry, set[str]] | None:
    """The weight of this name joined with its scale, and the names of all that; None: it has none.

    `formats` are those that the file names, by layer (`named_formats`). Raises UnreadableError for scales that are
    missing or of other shapes, and for formats that are not known.
    """
    entry, (layer, _, leaf) = entries[name], name.rpartition(".")
    if leaf == "_data":  # quanto: layer.weight._data
        return _joined(entry, entries.get(f"{layer}._scale"), entry.dtype, {name, f"{layer}._scale"})
    if leaf != "weight":
        return None
    beside = {f"{layer}.{part}" for part in _BESIDE} & entries.keys()
    if (absmax := entries.get(f"{layer}.SCB")) is not None and entry.dtype == "I8":
        return _joined(entry, absmax, "I8", {name, f"{layer}.SCB", *beside}, constant=_ONE_127TH)
    found = [f"{layer}.{part}" for part in _SCALES if f"{layer}.{part}" in entries]
    scale, dtype = entries[found[0]] if found else None, entry.dtype
    if (said := _format_of(entry.name, layer, formats)) is not None:
        dtype = _checked(said, layer, entry)
    elif scale is None or entry.dtype not in PLAIN:
        return None
    return _joined(entry, scale, dtype, {name, *found, *beside})


def beside_weights(entries: Mapping[str, TensorEntry]) -> set[str]:
    """The names of tensors that change no weight."""
    marks = {name for name in entries if name.rpartition(".")[2] == MARK}
    return marks | {
        name
        for name in entries
        if (split := name.rpartition("."))[2] in _BESIDE
        and (f"{split[0]}.weight" in entries or f"{split[0]}.weight._data" in entries)
    }


def named_formats(entries: Mapping[str, TensorEntry]) -> dict[str, Format]:
    """What ComfyUI's files say of how each layer was made, by layer: the key `format`, and its settings."""
    formats: dict[str, Format] = {}
    for file in sorted({entry.file for entry in entries.values()}):
        if (text := read_metadata(file).get(_HEADER_KEY)) is not None:
            layers = _json(text, _HEADER_KEY).get("layers")
            if not isinstance(layers, dict):
                raise UnreadableError(f"must name its layers in a JSON object: those of {_HEADER_KEY} are {layers!r}")
            formats |= {layer: _format(said, layer) for layer, said in layers.items()}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            formats[layer] = _format(_json(mapped_bytes(entry).numpy().tobytes(), name), layer)
    return formats


def check_all_scaled(entries: Mapping[str, TensorEntry], weights: Mapping[str, TensorEntry]) -> None:
    """Raises UnreadableError if float8 weights lack the scales that the file, or their likes in other blocks, have."""
    plain = [name for name, weight in weights.items() if weight.dtype.startswith("F8_") and weight.encoding is None]
    kinds = {_kind(name): name for name, weight in weights.items() if isinstance(weight.encoding, Scaled)}
    if lacking := [name for name in plain if _kind(name) in kinds]:
        other = kinds[_kind(lacking[0])]
        raise UnreadableError(
            f"holds scaled weights, and {len(lacking)} of them lack their scales: {lacking[0]} has none, {other} has"
        )
    if plain and not kinds and any(name.rpartition(".")[2] == MARK for name in entries):
        raise UnreadableError(f"says that its float8 weights have scales ({MARK}), and holds none: first {plain[0]}")


def _kind(name: str) -> str:
    """A layer's name without the number of its block."""
    return re.sub(r"\d+", "#", name)


def _joined(
    entry: TensorEntry, scale: TensorEntry | None, dtype: str, names: set[str], *, constant: float = 1.0
) -> tuple[TensorEntry, set[str]]:
    if scale is None:
        raise UnreadableError(f"holds scaled weights that lack their scales: first {entry.name}")
    if dtype != "I8" and dtype not in PLAIN:
        raise UnreadableError(f"{_CANNOT}: {entry.name} is {dtype} with a scale")
    if scale.dtype not in PLAIN or not _is_scale(scale.shape, entry.shape):
        raise UnreadableError(
            "holds scaled weights, and their scales must be one number or one for each row: "
            f"that of {entry.name} {entry.shape} is {scale.dtype} {scale.shape}"
        )
    encoding = Scaled(entry, scale, torch.int8 if dtype == "I8" else PLAIN[dtype], constant)
    return entry._replace(nbytes=entry.nbytes + scale.nbytes, encoding=encoding), names


def _is_scale(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    return prod(shape) == 1 or (bool(of) and shape in ((of[0],), (of[0], *(1 for _ in of[1:]))))


def _format_of(full_name: str, layer: str, formats: Mapping[str, Format]) -> Format | None:
    """What the file says of a layer. The header may name it with its prefix, without it, or with ComfyUI's."""
    names = (full_name.removesuffix(".weight"), *(prefix + layer for prefix in _PREFIXES))
    return next((formats[name] for name in names if name in formats), None)


def _checked(said: Format, layer: str, entry: TensorEntry) -> str:
    """The type of the values of a named format. Raises UnreadableError for one that cannot be read."""
    word = said["format"]
    if word not in _FORMATS:
        raise UnreadableError(f"{_CANNOT}: {layer} is in ComfyUI's format {word}")
    if said.get("convrot"):
        raise UnreadableError(f"{_CANNOT}: those of {layer} are rotated ({word}, convrot)")
    if entry.dtype not in _FORMATS[word]:
        raise UnreadableError(f"says that {layer} is {word}, and it is {entry.dtype}")
    return _FORMATS[word][0]


def _format(said: Any, layer: str) -> Format:
    said = {"format": said} if isinstance(said, str) else said
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise UnreadableError(f"must name the format of {layer}: it says {said!r}")
    return said


def _json(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UnreadableError(f"must say in JSON how it was quantised: {name} is something else") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"must say as a JSON object how it was quantised: {name} is {value!r}")
    return value
