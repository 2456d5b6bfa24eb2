"""What stands beside a shard: its checksum, its statistics, and what the index says of its generations besides.

One safetensors file with the sums of every site and step, the facts as JSON in its header, and a checksum of both, so
that a broken file is known for one. It is small, it is written before the shard, and only resuming and merging read it.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flux_ir.collecting.storage import Storage
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.sites import Site

Statistics = dict[tuple[Site, int], SiteStatistics]


class FileFacts(NamedTuple):
    """What is noted of a file when it is written."""

    bytes: int
    sha256: str


class ShardNotes(NamedTuple):
    """What stands beside a shard."""

    file: FileFacts
    used_txt: list[int]
    extras: dict[str, list[FileFacts]]
    """Of every generation, by the kind of file."""
    statistics: Statistics


def facts_of(content: bytes) -> FileFacts:
    """Those of a file with this content."""
    return FileFacts(len(content), hashlib.sha256(content).hexdigest())


def facts_of_path(path: Path) -> FileFacts:
    """Those of a local file."""
    with path.open("rb") as file:
        return FileFacts(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def merge_statistics(into: Statistics, more: Statistics) -> None:
    """Count what `more` has counted, too. The order of merging is part of the result."""
    for of, sums in more.items():
        into.setdefault(of, SiteStatistics(sums.d)).merge(sums)


def notes_name(number: int) -> str:
    """The name of the file beside a shard."""
    return f"stats/{number:06d}.safetensors"


def notes_content(notes: ShardNotes) -> bytes:
    """The file: a function of the notes alone."""
    facts = json.dumps({"file": notes.file, "used_txt": notes.used_txt, "extras": notes.extras})
    tensors: dict[str, Tensor] = {}
    for (site, step), sums in sorted(notes.statistics.items()):
        tensors |= sums.sums(f"{site}/step_{step}")
    tensors["sha256"] = _digest(facts, tensors)
    return safetensors.torch.save(tensors, metadata={"shard": facts})  # one entry: the library keeps no order


def read_notes(storage: Storage, number: int) -> ShardNotes | None:
    """What stands beside a shard; None where there is nothing, or it is broken."""
    try:
        content = storage.read(notes_name(number))
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        facts = json.loads(content[8 : 8 + length])["__metadata__"]["shard"]
        intact = torch.equal(tensors.pop("sha256"), _digest(facts, tensors))
    except (FileNotFoundError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    if not intact:
        return None
    told = json.loads(facts)
    prefixes = sorted({name.rpartition("/")[0] for name in tensors})
    statistics = {_site_and_step(prefix): SiteStatistics.from_tensors(tensors, prefix) for prefix in prefixes}
    extras = {extra: [FileFacts(*file) for file in files] for extra, files in told["extras"].items()}
    return ShardNotes(FileFacts(*told["file"]), told["used_txt"], extras, dict(sorted(statistics.items())))


def _digest(facts: str, tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _site_and_step(prefix: str) -> tuple[Site, int]:
    site, _, step = prefix.partition("/step_")
    return Site.parse(site), int(step)
