"""The file format of `torch.save`, from both sides: laid out empty to be filled in later, and read a tensor at a time.

The file is a zip without compression: a pickled dictionary (`data.pkl`) and one record of bytes per tensor. Laying it
out empty costs no memory and, where the file system has holes, no disk. Reading it here rather than with `torch.load`
(which works as well) touches no tensor before it is asked for, and maps files larger than memory, which `torch.load`
may refuse.
"""

import io
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.recording.plan import Shape

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_CENTRAL_HEADER_BYTES = 46
_CRC_IN_CENTRAL_HEADER = 16
_CRC_IN_DESCRIPTOR = 4
_HAS_DESCRIPTOR = 0x8
# Linux: no memory is set aside for pages that nobody writes to, or maps larger than memory would be refused. The
# module mmap has a name for it from Python 3.13 on.
_MAP_NORESERVE = 0x4000


class StoredTensor(NamedTuple):
    """A tensor of the file's dictionary: which record holds its bytes, and how to read them."""

    record: str
    dtype: torch.dtype
    shape: Shape
    stride: Shape
    storage_offset: int


class Record(NamedTuple):
    """Where a tensor's bytes lie in the file, and every place that keeps their CRC-32."""

    offset: int
    nbytes: int
    crc_offsets: tuple[int, ...]


def blank_tensors() -> Callable[[Shape, torch.dtype], Tensor]:
    """Makes tensors to lay a file out with: each has a storage of its own, and all of one dtype share the same memory.

    That memory is as large as the largest of them and is never touched.
    """
    scratch: dict[torch.dtype, Any] = {}

    def make(shape: Shape, dtype: torch.dtype) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if not nbytes:  # the pooled text of a model that has none
            return torch.empty(shape, dtype=dtype)
        if dtype not in scratch or scratch[dtype].nbytes < nbytes:
            scratch[dtype] = np.empty(nbytes, np.uint8)
        return torch.frombuffer(scratch[dtype], dtype=dtype, count=prod(shape)).view(shape)

    return make


def lay_out(file: io.RawIOBase | io.BytesIO, contents: Mapping[str, Any]) -> None:
    """Write the file without the bytes of its tensors: their places are skipped, and their CRC-32 is zero."""
    with torch.serialization.skip_data():
        torch.save(contents, file)  # type: ignore[arg-type]


def laid_out_bytes(contents: Mapping[str, Any]) -> int:
    """The size in bytes of the file that `lay_out` would write."""
    counter = _Counter()
    lay_out(counter, contents)
    return counter.size


class _Counter(io.RawIOBase):
    """A file that keeps nothing but its length."""

    size = 0
    _position = 0

    def write(self, data: Any) -> int:
        nbytes = memoryview(data).nbytes
        self._position += nbytes
        self.size = max(self.size, self._position)
        return nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position


def _record_name(info: zipfile.ZipInfo) -> str:
    return info.filename.partition("/")[2]  # the first folder is named after the file


def header_bytes(header: bytes) -> int:
    """How long a record's header is, by its first bytes. Raises zipfile.BadZipFile if it is none."""
    if len(header) < LOCAL_HEADER.size:
        raise zipfile.BadZipFile("it ends where a record should begin")
    signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile("a record does not begin where the directory says")
    return LOCAL_HEADER.size + name_bytes + extra_bytes


def records_in(file: io.BufferedReader | io.BytesIO) -> dict[str, Record]:
    """Every record of a file of `torch.save`, by the name that `StoredTensor.record` has."""
    with zipfile.ZipFile(file) as archive:
        infos, central = archive.infolist(), archive.start_dir
    found = {}
    for info in infos:
        file.seek(info.header_offset)
        offset = info.header_offset + header_bytes(file.read(LOCAL_HEADER.size))
        crcs = [central + _CRC_IN_CENTRAL_HEADER]
        if info.flag_bits & _HAS_DESCRIPTOR:
            crcs.append(offset + info.file_size + _CRC_IN_DESCRIPTOR)
        found[_record_name(info)] = Record(offset, info.file_size, tuple(crcs))
        name_bytes = len(info.orig_filename.encode())
        central += _CENTRAL_HEADER_BYTES + name_bytes + len(info.extra) + len(info.comment)
    return found


def unpickled(data: bytes) -> dict[str, Any]:
    """The dictionary of a `data.pkl`, with a `StoredTensor` for every tensor."""
    contents: dict[str, Any] = _Unpickler(io.BytesIO(data)).load()
    return contents


_AGAIN = "capture again, or take an undamaged copy of the file"


def _extent(stored: StoredTensor) -> int:
    """How many elements of its record a tensor reaches over."""
    if 0 in stored.shape:
        return 0
    return stored.storage_offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True)) + 1


class Archive:
    """A file of `torch.save`: `contents` is its dictionary with a `StoredTensor` for every tensor, `tensor` reads one.

    Raises zipfile.BadZipFile or pickle.UnpicklingError for a file that is broken, or holds more than tensors and plain
    values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.infos = {_record_name(info): info for info in archive.infolist()}
            """The directory's entries in its order, by the name that `StoredTensor.record` has."""
            self.directory_start = archive.start_dir
            if "data.pkl" not in self.infos:
                raise zipfile.BadZipFile("it is a zip, but not one of torch.save")
            data = archive.read(self.infos["data.pkl"])
            order = archive.read(self.infos["byteorder"]).decode() if "byteorder" in self.infos else "little"
        if order != sys.byteorder:
            raise zipfile.BadZipFile(f"its numbers are {order}-endian, and this machine is {sys.byteorder}-endian")
        self.contents = unpickled(data)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor, mapped from the file. Writing to it changes this process' memory and never the file.

        A record that was compressed, as when the file was zipped again, is unpacked into memory instead.
        """
        if stored.record not in self.infos:
            raise FluxIRError(f"{self.path} lacks the record {stored.record} of one of its tensors", hint=_AGAIN)
        info = self.infos[stored.record]
        needed = stored.dtype.itemsize * _extent(stored)
        if needed > info.file_size:
            raise FluxIRError(
                f"{self.path} is damaged: {stored.record} has {info.file_size} bytes and its tensor {needed}",
                hint=_AGAIN,
            )
        if not needed:
            return torch.empty(stored.shape, dtype=stored.dtype)
        count = info.file_size // stored.dtype.itemsize
        if info.compress_type == zipfile.ZIP_STORED:
            header = self._map[info.header_offset : info.header_offset + LOCAL_HEADER.size]
            offset = info.header_offset + header_bytes(header)
            storage = torch.frombuffer(self._map, dtype=stored.dtype, count=count, offset=offset)
        else:
            storage = torch.frombuffer(bytearray(self._unpacked(info)), dtype=stored.dtype, count=count)
        return storage.as_strided(stored.shape, stored.stride, stored.storage_offset)

    def _unpacked(self, info: zipfile.ZipInfo) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise FluxIRError(f"{self.path} cannot be unpacked: {error}", hint=_AGAIN) from error

    def records(self) -> dict[str, Record]:
        """Every record, by the name that `StoredTensor.record` has."""
        with self.path.open("rb") as file:
            return records_in(file)

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            if sys.platform != "linux":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)


class _Unpickler(pickle.Unpickler):
    """Builds the dictionary with `StoredTensor`s. It can make nothing but these, plain values and containers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MAKERS:
            return _MAKERS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and a capture holds tensors and plain values only")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype | None, str]:
        _, dtype, key, _, _ = pid  # 'storage', type, key, device, number of elements
        return dtype, f"data/{key}"


def _rebuild(
    storage: tuple[torch.dtype, str], storage_offset: int, shape: Shape, stride: Shape, *unused: Any
) -> StoredTensor:
    dtype, record = storage
    return StoredTensor(record, dtype, shape, stride, storage_offset)


def _rebuild_untyped(
    storage: tuple[None, str],
    storage_offset: int,
    shape: Shape,
    stride: Shape,
    requires_grad: bool,  # noqa: FBT001 (torch's order of arguments)
    hooks: Any,
    dtype: torch.dtype,
    *unused: Any,
) -> StoredTensor:
    return StoredTensor(storage[1], dtype, shape, stride, storage_offset)


# Everything a pickled dictionary of tensors names. Storage types stand for their dtype.
_MAKERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch.storage", "UntypedStorage"): None,
}
