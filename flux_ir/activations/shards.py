"""Shards: the files of a collection, each a fixed run of generations. Any safetensors reader opens them.

    {site}/step_{s}          [images, tokens, d]       what the site put out at the step
    {site}/step_{s}/scale    [images, tokens]          float32, beside float8: multiplies a token
    state/step_{s}           [images, img_tokens, 64]  packed latent before the step, kept tokens
    img_positions            [images, img_tokens]      int32, where tokens were chosen: their places

One image of a tensor lies in one piece, and the images one after the other, so any run of images of
a site is one read. The header's metadata says what the rows are: ids, prompts and seeds as JSON
lists, one entry per image.

A shard is written into a file laid out in advance, an image or a batch at a time, in any order;
whoever writes it gives it its final name when it is complete. The header is made here and not by the
library: it must be known before the tensors are, and its bytes are a function of the content alone.
"""

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.sites import Site

SHARD_IMAGES = 64
"""Most generations of a shard."""
SHARD_BYTES = 256 * 10**6
"""Most bytes of a shard, unless one generation has more."""
FORMAT, VERSION = "flux_ir shard", "1"

POSITIONS_KEY = "img_positions"
"""The name of the kept places on the image grid."""

_STATE = "state"
_ALIGNMENT = 64  # bytes: of the first tensor, so that values can be mapped
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
}


def images_per_shard(bytes_per_image: int) -> int:
    """Generations of a shard: a function of their size alone, so that all processes deal the work alike."""
    return max(1, min(SHARD_IMAGES, SHARD_BYTES // max(bytes_per_image, 1)))


def site_key(site: Site | str, step: int | None) -> str:
    """The name of a site's values at a step; of what has no steps (CLIP's activations), its name alone."""
    return str(site) if step is None else f"{site}/step_{step}"


_SITE_KEY = re.compile(r"(?P<site>[^/]+)/step_(?P<step>\d+)")


def parse_site_key(key: str) -> tuple[str, int] | None:
    """The site and the step of a `site_key`; None for other keys: scales, latents, positions, what has no steps."""
    named = _SITE_KEY.fullmatch(key)
    return None if named is None or named["site"] == _STATE else (named["site"], int(named["step"]))


def scale_key(key: str) -> str:
    """The name of the scales beside float8 values."""
    return f"{key}/scale"


def state_key(step: int) -> str:
    """The name of the packed latents a step began with."""
    return f"{_STATE}/step_{step}"


class ShardTensor(NamedTuple):
    """One tensor of a shard: its first axis counts the images."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes_per_image(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.bytes_per_image


@dataclass(frozen=True)
class ShardLayout:
    """What a shard holds: known before anything is computed. `rows` has one list per word, with an entry per image."""

    tensors: Mapping[str, ShardTensor]
    rows: Mapping[str, Sequence[Any]]
    """ids, prompts, seeds, repeats, used_txt, or what a collection of another kind has."""
    facts: Mapping[str, Any]
    """What all rows have in common: model, txt_tokens."""

    @property
    def images(self) -> int:
        return len(next(iter(self.rows.values())))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header()) + sum(tensor.nbytes for tensor in self.tensors.values())

    def header(self) -> bytes:
        """The file's first bytes: the length of the JSON, and the JSON padded so that values begin aligned."""
        metadata = {"format": FORMAT, "version": VERSION}
        metadata |= {word: _json(list(values)) for word, values in self.rows.items()}
        metadata |= {word: _json(value) for word, value in self.facts.items()}
        entries: dict[str, Any] = {"__metadata__": metadata}
        for name, (start, tensor) in self._spans().items():
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, start + tensor.nbytes],
            }
        text = _json(entries).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _spans(self) -> dict[str, tuple[int, ShardTensor]]:
        """Where each tensor begins behind the header, in the order of the mapping."""
        spans, start = {}, 0
        for name, tensor in self.tensors.items():
            spans[name] = (start, tensor)
            start += tensor.nbytes
        return spans


class ShardFile(NamedTuple):
    """The header of a shard that exists."""

    path: Path
    tensors: Mapping[str, ShardTensor]
    offsets: Mapping[str, int]
    """Where each tensor begins in the file."""
    metadata: Mapping[str, Any]
    """The header's metadata, parsed."""

    @property
    def images(self) -> int:
        return len(self.metadata["ids"])

    def span(self, key: str, first: int, last: int) -> tuple[int, int]:
        """Offset and length [bytes] of the images `first` to `last` (exclusive) of a tensor."""
        each = self.tensors[key].bytes_per_image
        return self.offsets[key] + first * each, (last - first) * each


def read_shard(path: Path) -> ShardFile:
    """Reads a shard's header. Raises FluxIRError for a file that is no shard, or is shorter than its header says."""
    with path.open("rb") as file:
        head = file.read(8)
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(head, "little")
        return parse_shard(path, head + (file.read(length) if length < size else b""), size)


def parse_shard(path: Path, head: bytes, size: int) -> ShardFile:
    """A shard by its first bytes, which must reach behind the header, and its size. Raises FluxIRError as above."""
    # By hand, for `safe_open` takes files of this machine only, and does not say at which byte a tensor begins.
    try:
        length = int.from_bytes(head[:8], "little")
        entries = json.loads(head[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise KeyError("format")
        dtypes = {word: dtype for dtype, word in _DTYPES.items()}
        tensors = {name: ShardTensor(dtypes[e["dtype"]], tuple(e["shape"])) for name, e in entries.items()}
        offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}
        known = {word: text if word in ("format", "version") else json.loads(text) for word, text in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FluxIRError(
            f"{path} must be a shard of a collection: {error!r}",
            hint="run flux-ir collect again: it repairs the folder",
        ) from error
    end = max((offsets[name] + tensor.nbytes for name, tensor in tensors.items()), default=8 + length)
    if end != size:
        raise FluxIRError(
            f"{path} must have {end} bytes, as its header says: it has {size}",
            hint="run flux-ir collect again: it repairs the folder",
        )
    return ShardFile(path, tensors, offsets, known)


class ShardWriter:
    """A shard that is being written, under a name of its own. Takes its disk space at once.

    Several threads may write different images. Raises OSError where the disk is full.
    """

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        header = layout.header()
        self._starts = {name: len(header) + start for name, (start, _) in layout._spans().items()}
        self._tensors = layout.tensors
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
        try:
            size = len(header) + sum(tensor.nbytes for tensor in layout.tensors.values())
            _take_space(self._file, size)
            _write_at(self._file, memoryview(header), 0)
        except BaseException:
            self.close()
            path.unlink()
            raise

    def write(self, key: str, first_image: int, value: Tensor) -> None:
        """Writes [images, ...] of one tensor, from image number `first_image` of the shard on."""
        tensor = self._tensors[key]
        if value.dtype != tensor.dtype or tuple(value.shape[1:]) != tensor.shape[1:]:
            raise ValueError(f"{key} is planned as {tensor}: got {value.dtype} {tuple(value.shape)}")
        content = memoryview(value.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data)
        offset = self._starts[key] + first_image * tensor.bytes_per_image
        while len(content):  # a write may take a part
            written = _write_at(self._file, content, offset)
            content, offset = content[written:], offset + written

    def close(self) -> None:
        """Nothing is written after this. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would else write line ends of its own
_SEEKING = Lock()


def _write_at(file: int, content: memoryview, offset: int) -> int:
    """Writes at a place in the file; a write may take a part, and says how much."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, content, offset)
    with _SEEKING:  # Windows: threads share the file's position
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, content)


def _take_space(file: int, size: int) -> None:
    """Reserves disk space where the file system can, so that a full disk is known before anything is computed."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(file, size)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
