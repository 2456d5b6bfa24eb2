"""What stands in safetensors files, read from their headers alone: a few hundred kilobytes, however large the file.

A safetensors file is 8 bytes of header length, the header (JSON: dtype, shape and place of every tensor), and the bytes
of the tensors. A set of shards has an index beside it that says which file holds which tensor. `read_tensor` reads one
tensor, in whatever way its entry says. Next: `formats`, which reads quantised weights and GGUF files; `inspect`.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(?P<suffix>(?:\.\w+)?\.(?:safetensors|bin))")
PLAIN: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,  # counters, such as a batch norm's
}
"""What files call the types that hold weights as they are. All others hold codes of some quantisation."""
GGUF_START = b"GGUF"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit: anything above is another kind of file


class Encoding(Protocol):
    """How a weight that does not stand in its file as plain numbers becomes numbers."""

    @property
    def name(self) -> str:
        """What people call it."""

    def decode(self) -> Tensor:
        """Reads the weight: its numbers in float32, in the shape of its entry."""


class TensorEntry(NamedTuple):
    """One tensor of a file, unread: where it is, under which name, and how large. `dtype` as the format spells it.

    `offset`: the byte of the file that its values begin at. `encoding`: how they are read; None: they are plain. An
    encoded weight has the shape of its numbers, and in `nbytes` all that stands beside it, such as its scales.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int = 0
    encoding: Encoding | None = None


def is_index(path: Path) -> bool:
    """Whether the path names the index of a set of shards, rather than one file of tensors."""
    return path.name.endswith(".json")


def read_tensor(entry: TensorEntry) -> Tensor:
    """The numbers of a tensor: in float32 if they were encoded, else a view of the file, which is mapped for it alone.

    Freeing a view gives its pages back at once. Raises FluxIRError for a file that can no longer be read.
    """
    if entry.encoding is not None:
        return entry.encoding.decode()
    try:
        if starts_as_gguf(entry.file):
            return mapped_bytes(entry).view(PLAIN[entry.dtype]).reshape(entry.shape)
        with safe_open(entry.file, framework="pt") as file:
            values: Tensor = file.get_tensor(entry.name)
    except (SafetensorError, OSError) as error:
        raise _gone(entry.file, str(error)) from error
    return values


def mapped_bytes(entry: TensorEntry) -> Tensor:
    """The bytes of a tensor in its file, uint8, mapped as in `read_tensor`."""
    try:
        # "c" is copy on write: PyTorch warns of memory that it must not write to.
        array = np.memmap(entry.file, np.uint8, "c", entry.offset, (entry.nbytes,))
    except (OSError, ValueError) as error:  # ValueError: the file has become shorter
        raise _gone(entry.file, str(error)) from error
    return torch.from_numpy(array)


def starts_as_gguf(path: Path) -> bool:
    """Whether a file is one of GGUF, which llama.cpp and ComfyUI-GGUF write."""
    with path.open("rb") as file:
        return file.read(len(GGUF_START)) == GGUF_START


def _gone(path: Path, problem: str) -> FluxIRError:
    return FluxIRError(f"{path} cannot be read: {problem}", hint="download it again")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, by name. The file's size is held against what the header promises."""
    # By hand, not with `safe_open`: it refuses a whole file for one type it does not know, where the name of the
    # tensor is what tells people which quantisation they have, and it says neither how many bytes are missing of a
    # download that was cut short nor that the file is a web page or a pointer of Git LFS.
    header, data = _header(path)
    size = path.stat().st_size
    entries = {name: _entry(path, name, value, data) for name, value in header.items() if name != "__metadata__"}
    expected = data + sum(entry.nbytes for entry in entries.values())
    if size < expected:
        raise truncated(path, size, expected)
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer of a safetensors file says of it, by keywords of its own; of a GGUF file nothing."""
    said = {} if starts_as_gguf(path) else _header(path)[0].get("__metadata__", {})
    return said if isinstance(said, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise _not_safetensors(path, start)
        if size < 8 + header_bytes:
            raise truncated(path, size, 8 + header_bytes)
        return _parse_header(path, file.read(header_bytes)), 8 + header_bytes


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


def truncated(path: Path, size: int, expected: int) -> FluxIRError:
    """The fault of a file that ends before its header says."""
    return FluxIRError(
        f"{path} is cut short: it has {size:,} bytes and its header promises {expected:,}", hint="download it again"
    )


def _not_safetensors(path: Path, start: bytes) -> FluxIRError:
    if start == b"version ":  # the first line of a Git LFS pointer
        return FluxIRError(
            f"{path} is a Git LFS pointer, not the weights themselves", hint="fetch the file with `git lfs pull`"
        )
    kind = f"it starts with {start!r}"
    if start[:4] == GGUF_START:
        kind = "it is one of GGUF, which cannot be read here"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        kind = "it is a pickle, as torch.save writes, and might run code"
    return FluxIRError(
        f"{path} is not a safetensors file ({kind})",
        hint="only .safetensors, .sft and .gguf files and diffusers folders of them can be read",
    )
