"""What stands in safetensors files, read from their headers alone: a few hundred kilobytes, however large the file.

A safetensors file is 8 bytes of header length, the header (JSON: dtype, shape and place of every tensor), and the bytes
of the tensors. A set of shards has an index beside it that says which file holds which tensor. float8 weights may have
a scale beside them. `read_tensor` reads one tensor. Next: `inspect`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(?P<suffix>(?:\.\w+)?\.(?:safetensors|bin))")
# What the format calls the types that hold weights as they are. All others hold codes of some quantisation.
_PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# ComfyUI's names, the older and the newer, for what a layer's `weight` is to be multiplied with.
_SCALES = ("scale_weight", "weight_scale")
# What stands beside scaled weights and does not change them: how a GPU may round what it multiplies them with.
_BESIDE_SCALES = ("scale_input", "input_scale", "comfy_quant")
_SCALED_MARK = "scaled_fp8"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit: anything above is another kind of file


class TensorEntry(NamedTuple):
    """One tensor of a file, unread: where it is, under which name, and how large. `dtype` as the format spells it.

    `offset`: the byte of the file that its values begin at. `scale`: the tensor that the values are to be multiplied
    with, one factor in all or one for each row.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int = 0
    scale: "TensorEntry | None" = None


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor by name, of one safetensors file or of all the shards of an index.

    Raises FluxIRError for a file that cannot be read, is cut short or of another kind, and for a missing shard.
    """
    try:
        return read_index(path) if is_index(path) else read_header(path)
    except OSError as error:
        raise FluxIRError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def is_index(path: Path) -> bool:
    """Whether the path names the index of a set of shards, rather than one file of tensors."""
    return path.name.endswith(".json")


def plain_weights(entries: Mapping[str, TensorEntry], where: str, *, hint: str) -> dict[str, TensorEntry]:
    """The weights among the tensors of a file, each joined with the scale that stands beside it.

    Raises FluxIRError for tensors of types that hold no plain weights, and for scales of other shapes than one factor
    in all or one for each row. `where` names the file there.
    """
    weights: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        scaled = entries.get(f"{layer}.weight")
        if leaf == _SCALED_MARK or (leaf in (*_SCALES, *_BESIDE_SCALES) and scaled is not None):
            continue
        scale = None
        if leaf == "weight":
            scale = next((entries[f"{layer}.{s}"] for s in _SCALES if f"{layer}.{s}" in entries), None)
        weights[name] = entry._replace(scale=scale)
    coded = {name: entry.dtype for name, entry in weights.items() if entry.dtype not in _PLAIN}
    if coded:
        counts = " and ".join(f"{count} tensors of type {dtype}" for dtype, count in Counter(coded.values()).items())
        raise FluxIRError(
            f"{where} holds quantised weights, and only plain ones can be read: {counts}, first {next(iter(coded))}",
            hint=hint,
        )
    for name, entry in weights.items():
        if (scale := entry.scale) and (scale.dtype not in _PLAIN or not _is_scale(scale.shape, entry.shape)):
            raise FluxIRError(
                f"{where} holds scaled weights, and their scales must be one number or one for each row: the scale of "
                f"{name} {entry.shape} is {scale.dtype} {scale.shape}",
                hint=hint,
            )
    return weights


def _is_scale(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    return prod(shape) == 1 or shape in ((of[0],), (of[0], *(1 for _ in of[1:])))


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor as a view of its file, mapped for itself alone: freeing it gives its pages back at once.

    With a scale it is their product in float32. Raises FluxIRError for a file that can no longer be read.
    """
    try:
        with safe_open(entry.file, framework="pt") as file:
            values: Tensor = file.get_tensor(entry.name)
    except (SafetensorError, OSError) as error:
        raise FluxIRError(f"{entry.file} cannot be read: {error}", hint="download it again") from error
    if entry.scale is None:
        return values
    scale = read_tensor(entry.scale).to(torch.float32)
    return values.to(torch.float32) * scale.reshape(-1, *(1 for _ in entry.shape[1:]))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, by name. The file's size is held against what the header promises."""
    # By hand, not with `safe_open`: it refuses a whole file for one type it does not know, where the name of the
    # tensor is what tells people which quantisation they have, and it says neither how many bytes are missing of a
    # download that was cut short nor that the file is a web page or a pointer of Git LFS.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise _not_safetensors(path, start)
        if size < 8 + header_bytes:
            raise _truncated(path, size, 8 + header_bytes)
        header = _parse_header(path, file.read(header_bytes))
    data = 8 + header_bytes
    entries = {name: _entry(path, name, value, data) for name, value in header.items() if name != "__metadata__"}
    expected = 8 + header_bytes + sum(entry.nbytes for entry in entries.values())
    if size < expected:
        raise _truncated(path, size, expected)
    return entries


def read_index(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a sharded set, by name, each from the shard that the index names for it.

    A copy in another shard counts for nothing. Raises FluxIRError unless all shards are there, hold what the index
    says, and are the only ones of their set in the folder.
    """
    weight_map = _weight_map(path)
    missing = [shard.name for shard in shards(path) if not shard.is_file()]
    if missing:
        raise FluxIRError(
            f"{path} lists shards that are not there: {', '.join(missing)}",
            hint="download the missing files into the same folder",
        )
    if surplus := _surplus_shards(path):
        raise FluxIRError(
            f"beside {path} lie shards that it does not list: {', '.join(surplus)}",
            hint="files of two versions are in one folder: delete those that do not belong to the index",
        )
    headers = {shard: read_header(path.parent / shard) for shard in sorted(set(weight_map.values()))}
    gone = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    if gone:
        raise FluxIRError(
            f"the shards of {path} lack {len(gone)} of the tensors it lists: {', '.join(gone[:3])} "
            f"(the first should be in {weight_map[gone[0]]})",
            hint="index and shards are of different versions: download them again",
        )
    unlisted = {name: entry for header in headers.values() for name, entry in header.items() if name not in weight_map}
    return unlisted | {name: headers[shard][name] for name, shard in weight_map.items()}


def _surplus_shards(index: Path) -> list[str]:
    """Files beside an index that are called as its shards are, and that it does not list."""
    listed = {shard.name for shard in shards(index)}
    sets = {match.group(1, "suffix") for name in listed if (match := _SHARD.fullmatch(name))}
    matches = [_SHARD.fullmatch(file.name) for file in sorted(index.parent.iterdir())]
    return [m[0] for m in matches if m and m.group(1, "suffix") in sets and m[0] not in listed]


def shards(index: Path) -> list[Path]:
    """The files an index lists, whether they exist or not."""
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(read_json(index, required=("weight_map",), hint="download it again")["weight_map"])
    except (ValueError, TypeError) as error:
        raise FluxIRError(
            f"{index} must be an index of shards (JSON with a weight_map): {error!r}", hint="download it again"
        ) from error


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _not_safetensors(path, raw[:8]) from error
    if not isinstance(header, dict):
        raise _not_safetensors(path, raw[:8])
    return header


def _entry(path: Path, name: str, value: Any, data: int) -> TensorEntry:
    try:
        begin, end = value["data_offsets"]
        return TensorEntry(path, name, tuple(value["shape"]), value["dtype"], end - begin, data + begin)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_safetensors(path, name.encode()) from error


def _truncated(path: Path, size: int, expected: int) -> FluxIRError:
    return FluxIRError(
        f"{path} is cut short: it has {size:,} bytes and its header promises {expected:,}", hint="download it again"
    )


def _not_safetensors(path: Path, start: bytes) -> FluxIRError:
    if start == b"version ":  # the first line of a Git LFS pointer
        return FluxIRError(
            f"{path} is a Git LFS pointer, not the weights themselves", hint="fetch the file with `git lfs pull`"
        )
    if start[:4] == b"GGUF":
        return FluxIRError(
            f"{path} holds quantised weights (GGUF), and only plain ones can be read",
            hint="pass a .safetensors file of bfloat16, float16 or float8 weights",
        )
    kind = f"it starts with {start!r}"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        kind = "it is a pickle, as torch.save writes, and might run code"
    return FluxIRError(
        f"{path} is not a safetensors file ({kind})",
        hint="only .safetensors and .sft files and diffusers folders of them can be read",
    )
