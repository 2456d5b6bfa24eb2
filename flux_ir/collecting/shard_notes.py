"""The notes of a shard: its checksum, its statistics, and what the index says of its generations besides.

They are a small file in `stats/`, of the shard's name: the sums of every site and step as tensors, the facts as JSON in
the header, and a checksum of both, by which a broken file is recognised. It is written before the shard, and only
resuming and merging read it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flux_ir.collecting.storage import Storage, move_aside
from flux_ir.recording.statistics import SiteStatistics

Statistics = dict[str, SiteStatistics]
"""By the keys of what they are of in a shard: `{site}/step_{s}`, or `clip.image`."""

_END_BYTES = 2**20


class FileFacts(NamedTuple):
    """What is noted of a file when it is written."""

    bytes: int
    sha256: str


class ShardNotes(NamedTuple):
    """What is noted of a shard."""

    file: FileFacts
    """Those of the shard itself."""
    used_txt: list[int]
    extras: dict[str, list[FileFacts]]
    """The files of every generation, by the kind of file."""
    statistics: Statistics


def facts_of(content: bytes) -> FileFacts:
    """The facts of a file with this content."""
    return FileFacts(len(content), hashlib.sha256(content).hexdigest())


def facts_of_path(path: Path) -> FileFacts:
    """The facts of a local file."""
    with path.open("rb") as file:
        return FileFacts(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def file_is_intact(storage: Storage, name: str, facts: FileFacts, *, checksums: bool) -> bool:
    """Whether a file is as it was written: its size, and its checksum where asked. A broken one is moved aside."""
    size = storage.size(name)
    if size is None:
        return False
    if size == facts.bytes and (not checksums or storage.sha256(name) == facts.sha256):
        return True
    move_aside(storage, name)
    return False


def files_digest(files: Iterable[Path]) -> str:
    """16 hex digits that stand for the content of large files, wherever they lie.

    From the name, the size, the first and the last MiB of each: reading 24 GB whole would take longer than many a job.
    """
    ends = sorted((file.name, *_ends(file)) for file in files)
    return hashlib.sha256(repr(ends).encode()).hexdigest()[:16]


def _ends(file: Path) -> tuple[int, str]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_END_BYTES))
        opened.seek(max(0, size - _END_BYTES))
        digest.update(opened.read(_END_BYTES))
    return size, digest.hexdigest()


def merge_statistics(into: Statistics, more: Statistics) -> None:
    """Count what `more` has counted, too. The order of merging is part of the result."""
    for of, sums in more.items():
        into.setdefault(of, SiteStatistics(sums.d)).merge(sums)


def shard_name(number: int) -> str:
    """The name of a shard in its collection."""
    return f"shards/{number:06d}.safetensors"


def notes_name(number: int) -> str:
    """The name of a shard's notes in its collection."""
    return f"stats/{number:06d}.safetensors"


def notes_content(notes: ShardNotes) -> bytes:
    """The file of a shard's notes: its bytes are a function of them alone."""
    facts = json.dumps({"file": notes.file, "used_txt": notes.used_txt, "extras": notes.extras})
    tensors: dict[str, Tensor] = {}
    for key, sums in notes.statistics.items():
        tensors |= sums.sums(key)
    tensors["sha256"] = _digest(facts, tensors)
    return safetensors.torch.save(tensors, metadata={"shard": facts})  # one entry: the library keeps no order


def read_notes(storage: Storage, number: int) -> ShardNotes | None:
    """The notes of a shard; None where there are none, or their file is broken."""
    try:
        content = storage.read(notes_name(number))
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")  # the library gives no metadata of bytes in memory
        facts = json.loads(content[8 : 8 + length])["__metadata__"]["shard"]
        intact = torch.equal(tensors.pop("sha256"), _digest(facts, tensors))
    except (FileNotFoundError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    if not intact:
        return None
    noted = json.loads(facts)
    prefixes = sorted({name.rpartition("/")[0] for name in tensors})
    statistics = {prefix: SiteStatistics.from_tensors(tensors, prefix) for prefix in prefixes}
    extras = {extra: [FileFacts(*file) for file in files] for extra, files in noted["extras"].items()}
    return ShardNotes(FileFacts(*noted["file"]), noted["used_txt"], extras, statistics)


def _digest(facts: str, tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
