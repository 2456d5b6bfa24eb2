"""Opens collections, on this machine or at a URL: the shards there are become a `ShardSource`.

A shard is complete or absent, so an unfinished collection is read as far as it is. From a URL, all headers are fetched
when the collection is opened, and a whole shard when it is first read; it stays on the local disk, in bounded space,
for the next epoch and the next run.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flux_ir.activations.downloads import CACHE_BYTES, Downloads
from flux_ir.activations.remote import open_filesystem
from flux_ir.activations.shard_source import CLIP_IMAGE, ShardSource, listed
from flux_ir.activations.shards import ShardFile, parse_shard, read_shard
from flux_ir.errors import FluxIRError

CACHE_FOLDER = "FLUX_IR_CACHE"
"""The variable that names the folder for what is fetched; without it ~/.cache/flux_ir."""
MAX_CACHE_BYTES = "FLUX_IR_CACHE_BYTES"
"""The variable that bounds what is kept of one collection [bytes]; without it 64 GB."""

_SETTINGS, _SHARDS = "collection.json", "shards"
_HEADER_BYTES = 2**17  # fetched at first: nearly all headers fit


def is_collection(folder: Path) -> bool:
    """Whether `flux-ir collect` or `collect-clip` has been at work in this folder."""
    return (folder / _SETTINGS).is_file() or (folder / _SHARDS).is_dir()


def open_collection(folder: Path, *, key: str | None = None) -> ShardSource:
    """The generations of a collection that are finished. Raises FluxIRError for an old one, and one without any."""
    path = folder / _SETTINGS
    settings = path.read_bytes() if path.is_file() else b""
    _check_version(str(folder), settings, old=(folder / "groups").is_dir())
    shards = [read_shard(file) for file in sorted((folder / _SHARDS).glob("*.safetensors"))]
    return _source(str(folder), shards, settings, key, None)


def open_remote_collection(url: str, *, key: str | None = None) -> ShardSource:
    """The finished generations of a collection at a URL that fsspec has a filesystem for.

    Raises FluxIRError if there is no collection, or a package is missing.
    """
    filesystem, root = open_filesystem(url)
    try:
        settings: bytes = filesystem.cat_file(f"{root}/{_SETTINGS}")
    except FileNotFoundError as error:
        raise FluxIRError(f"there is no collection at {url}: no {_SETTINGS}", hint="check the address") from error
    except Exception as error:  # every filesystem has its own for missing rights
        raise FluxIRError(
            f"cannot read {url}: {str(error) or type(error).__name__}", hint="check the address and the credentials"
        ) from error
    _check_version(url, settings, old=False)
    # By its settings too: another collection at the same address must not be taken for this one.
    cache = _cache_folder() / hashlib.sha256(url.encode() + b"\n" + settings).hexdigest()[:16]
    downloads = Downloads(filesystem, root, cache / "files", max_bytes=_max_bytes())
    return _source(url, list(_remote_shards(filesystem, root)), settings, key, downloads.fetch)


def _source(
    where: str,
    shards: Sequence[ShardFile],
    settings: bytes,
    key: str | None,
    fetch: Callable[[str], Path] | None,
) -> ShardSource:
    if not shards:
        raise FluxIRError(
            f"the collection {where} holds no finished shard yet", hint="let flux-ir collect go on for a while"
        )
    if key is None and CLIP_IMAGE in shards[0].tensors:
        key = CLIP_IMAGE
    if key is not None and key not in shards[0].tensors:
        raise FluxIRError(f"the collection {where} holds no {key}", hint=f"it holds {listed(shards[0].tensors)}")
    return ShardSource(shards, settings=settings, key=key, fetch=fetch)


def _remote_shards(filesystem: Any, root: str) -> Iterator[ShardFile]:
    """The headers of all shards, by their paths within the collection."""
    start = len(root.rstrip("/")) + 1
    found = filesystem.find(f"{root}/{_SHARDS}", detail=True)
    paths = [path for path in sorted(found) if path.endswith(".safetensors")]
    ends = [min(_HEADER_BYTES, found[path]["size"]) for path in paths]
    for path, head in zip(paths, filesystem.cat_ranges(paths, 0, ends) if paths else [], strict=True):
        length = 8 + int.from_bytes(head[:8], "little")
        if len(head) < length <= found[path]["size"]:
            head = filesystem.cat_file(path, 0, length)
        yield parse_shard(Path(PurePosixPath(path[start:])), head, found[path]["size"])


def _check_version(where: str, settings: bytes, *, old: bool) -> None:
    """Raises FluxIRError for a collection of the layout before shards."""
    try:
        version = json.loads(settings).get("version") if settings else None
    except (ValueError, AttributeError) as error:
        raise FluxIRError(
            f"{where}/{_SETTINGS} is no description of a collection: {error}", hint="run flux-ir collect again there"
        ) from error
    if version == 1 or old:
        raise FluxIRError(
            f"{where} is an old collection, with a file for every generation: this program reads shards",
            hint=f"convert it: flux-ir convert-collection --captures {where} --output_dir NEW",
        )


def _cache_folder() -> Path:
    folder = os.environ.get(CACHE_FOLDER)
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "flux_ir"


def _max_bytes() -> int:
    text = os.environ.get(MAX_CACHE_BYTES, "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise FluxIRError(
            f"{MAX_CACHE_BYTES} must be a number of bytes: got {text!r}", hint="such as 64000000000 for 64 GB"
        )
    return int(text) if text else CACHE_BYTES
