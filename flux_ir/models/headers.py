"""What stands in safetensors files, read from their headers alone: a few hundred kilobytes, however large the file.

A safetensors file is 8 bytes of header length, the header (JSON: dtype, shape and place of every tensor), and the bytes
of the tensors. A set of shards has an index beside it that says which file holds which tensor. Next: `contents`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.errors import FluxIRError

INDEX_SUFFIX = ".safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit: anything above is another kind of file


class TensorEntry(NamedTuple):
    """One tensor of a file, unread: where it is, under which name, and how large. `dtype` as the format spells it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor by name, of one safetensors file or of all the shards of an index.

    Raises FluxIRError for a file that cannot be read, is cut short or of another kind, and for a missing shard.
    """
    try:
        return read_index(path) if path.name.endswith(INDEX_SUFFIX) else read_header(path)
    except OSError as error:
        raise FluxIRError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, by name. The file's size is held against what the header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise _not_safetensors(path, start)
        if size < 8 + header_bytes:
            raise _truncated(path, size, 8 + header_bytes)
        header = _parse_header(path, file.read(header_bytes))
    entries = {name: _entry(path, name, value) for name, value in header.items() if name != "__metadata__"}
    expected = 8 + header_bytes + sum(entry.nbytes for entry in entries.values())
    if size < expected:
        raise _truncated(path, size, expected)
    return entries


def read_index(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a sharded set, by name. All shards must be there and hold what the index says."""
    weight_map = _weight_map(path)
    missing = [shard.name for shard in shards(path) if not shard.is_file()]
    if missing:
        raise FluxIRError(
            f"{path} lists shards that are not there: {', '.join(missing)}",
            hint="download the missing files into the same folder",
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards(path):
        entries |= read_header(shard)
    unlisted = sorted(name for name in weight_map if name not in entries)
    if unlisted:
        raise FluxIRError(
            f"the shards of {path} lack {len(unlisted)} of the tensors it lists: {', '.join(unlisted[:3])}",
            hint="index and shards are of different versions: download them again",
        )
    return entries


def shards(index: Path) -> list[Path]:
    """The files an index lists, whether they exist or not."""
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
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


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    try:
        begin, end = value["data_offsets"]
        return TensorEntry(path, name, tuple(value["shape"]), value["dtype"], end - begin)
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
    return FluxIRError(
        f"{path} is not a safetensors file (it starts with {start!r})",
        hint="only .safetensors files and diffusers folders of them can be read",
    )
