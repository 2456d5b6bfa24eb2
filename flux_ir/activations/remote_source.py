"""Training on a collection in object storage: its indexes are fetched at once, a capture when it is first read.

What is fetched stays in a folder of the local disk, of bounded size, for the next epoch and the next run.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from flux_ir.activations.capture_source import CaptureSource
from flux_ir.activations.downloads import CACHE_BYTES, Downloads
from flux_ir.activations.remote import open_filesystem
from flux_ir.errors import FluxIRError

CACHE_FOLDER = "FLUX_IR_CACHE"
"""The variable that names the folder for what is fetched; without it ~/.cache/flux_ir."""
MAX_CACHE_BYTES = "FLUX_IR_CACHE_BYTES"
"""The variable that bounds what is kept of one collection [bytes]; without it 64 GB."""
_SETTINGS, _INDEX, _JOURNAL = "collection.json", "index.jsonl", "journal.jsonl"


def open_remote_collection(url: str) -> CaptureSource:
    """The finished generations of a collection at a URL that fsspec has a filesystem for.

    Raises FluxIRError if there is no collection, or a package is missing.
    """
    filesystem, root = open_filesystem(url)
    try:
        settings = filesystem.cat_file(f"{root}/{_SETTINGS}")
    except FileNotFoundError as error:
        raise FluxIRError(f"there is no collection at {url}: no {_SETTINGS}", hint="check the address") from error
    except Exception as error:  # every filesystem has its own for missing rights
        raise FluxIRError(
            f"cannot read {url}: {str(error) or type(error).__name__}", hint="check the address and the credentials"
        ) from error
    # By its settings too: another collection at the same address must not be taken for this one.
    cache = _cache_folder() / hashlib.sha256(url.encode() + b"\n" + settings).hexdigest()[:16]
    shutil.rmtree(cache / "indexes", ignore_errors=True)  # they grow while the collection does
    indexes = _fetch_indexes(filesystem, root, cache / "indexes")
    downloads = Downloads(filesystem, root, cache / "files", max_bytes=_max_bytes())
    return CaptureSource.of_collection(indexes, fetch=downloads.fetch)


def _fetch_indexes(filesystem: Any, root: str, folder: Path) -> Path:
    """The index of the whole, or of every group and what is known of unfinished ones."""
    downloads = Downloads(filesystem, root, folder)
    downloads.fetch(_SETTINGS)
    if filesystem.isfile(f"{root}/{_INDEX}"):
        downloads.fetch(_INDEX)
        return folder
    start = len(root.rstrip("/")) + 1
    for path in filesystem.find(f"{root}/groups"):
        if str(path).endswith((f"/{_INDEX}", f"/{_JOURNAL}")):
            downloads.fetch(str(path)[start:])
    return folder


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_FOLDER)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "flux_ir"


def _max_bytes() -> int:
    text = os.environ.get(MAX_CACHE_BYTES, "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise FluxIRError(
            f"{MAX_CACHE_BYTES} must be a number of bytes: got {text!r}", hint="such as 64000000000 for 64 GB"
        )
    return int(text) if text else CACHE_BYTES
