"""A collection in object storage, or on anything else fsspec has a filesystem for: `s3://`, `gs://`, `sftp://` ...

Files are made on the local disk, in the folder for temporary files, and uploaded when they are whole. Object stores
show an upload when it is complete; elsewhere a file is uploaded beside its name and then moved. Credentials, endpoints
and retries are the filesystem's own business: its variables and configuration files are read as ever.
"""

import getpass
import hashlib
import itertools
import os
import re
import shutil
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.core import url_to_fs

from flux_ir.activations.downloads import Downloads
from flux_ir.errors import FluxIRError

SCRATCH = "partial"
_SHOWN_WHEN_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"}
_URL = re.compile(r"([a-z][a-z0-9+]+):/+")  # two letters at least: one is a drive
_PIECE_BYTES = 2**22
_DOWNLOADED_BYTES = 8 * 10**9  # of files that are looked at again when a collection is resumed
# The extra of this package that brings a filesystem, where there is one.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class RemoteStorage:
    """A folder of a filesystem that fsspec knows, to read and write: a `Storage` as `collecting.storage` has it.

    `rank` keeps what different processes are writing apart. Raises FluxIRError where the filesystem's package is
    missing, and where nothing can be written.
    """

    def __init__(self, url: str, *, rank: int = 0) -> None:
        self.url, self.rank = url.rstrip("/"), rank
        self._fs, root = open_filesystem(url)
        self._root = root.rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._uploads_beside = not protocols & _SHOWN_WHEN_WHOLE
        self._numbers = itertools.count()
        self._made: set[str] = set()
        self._lock = threading.Lock()
        # Of this process alone: what another one fetched may have been replaced since.
        own = _everyones_scratch(self.url) / f"downloads_{os.getpid()}_{uuid4().hex}"
        self._downloads = Downloads(self._fs, self._root, own, max_bytes=_DOWNLOADED_BYTES)
        weakref.finalize(self, _discard, own)
        self._try_to_write()

    @property
    def where(self) -> str:
        """The URL."""
        return self.url

    def scratch(self, suffix: str) -> Path:
        """A fresh path on the local disk."""
        folder = _everyones_scratch(self.url) / f"rank_{self.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{os.getpid()}_{next(self._numbers)}{suffix}"

    def publish(self, source: Path | bytes | memoryview, name: str) -> None:
        """Uploads. Raises FluxIRError if that fails, whatever the filesystem calls it."""
        path = self._path(name)
        beside = self._path(f"{SCRATCH}/rank_{self.rank}/{os.getpid()}_{next(self._numbers)}")
        target = beside if self._uploads_beside else path
        try:
            self._make_parent(target)
            if isinstance(source, Path):
                self._fs.put_file(str(source), target)
                source.unlink()
            else:
                self._fs.pipe_file(target, bytes(source))
            if self._uploads_beside:
                self._make_parent(path)
                self._fs.mv(beside, path)
            self._downloads.forget(name)
        except Exception as error:
            raise _cannot("write", f"{self.url}/{name}", error) from error

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None."""
        try:
            size = self._fs.info(self._path(name))["size"]
        except FileNotFoundError:
            return None
        return None if size is None else int(size)

    def read(self, name: str) -> bytes:
        """The whole file."""
        content: bytes = self._fs.cat_file(self._path(name))
        return content

    def sha256(self, name: str) -> str:
        """The SHA-256 of the whole file, in hex: it is read for that, but never in memory as a whole."""
        digest = hashlib.sha256()
        with self._fs.open(self._path(name), "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def local(self, name: str) -> Path:
        """The file, downloaded."""
        return self._downloads.fetch(name)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return bool(self._fs.isfile(self._path(name)))

    def list(self, folder: str) -> list[str]:
        """The names below a folder, in order."""
        found = self._fs.find(self._path(folder))
        return sorted(str(path)[len(self._root) + 1 :] for path in found)

    def move(self, name: str, to: str) -> None:
        """Moves the file; an object store copies it for that."""
        self._make_parent(self._path(to))
        self._fs.mv(self._path(name), self._path(to))
        self._downloads.forget(name)

    def remove(self, name: str) -> None:
        """Deletes the file, if it is there."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return
        finally:
            self._downloads.forget(name)

    def clear_scratch(self, *, everyones: bool) -> None:
        """Deletes files that were begun and never published: here, and on the filesystem what was uploaded beside."""
        local = _everyones_scratch(self.url)
        shutil.rmtree(local if everyones else local / f"rank_{self.rank}", ignore_errors=True)
        remote = self._path(SCRATCH if everyones else f"{SCRATCH}/rank_{self.rank}")
        if self._uploads_beside and self._fs.exists(remote):
            self._fs.rm(remote, recursive=True)
            with self._lock:
                self._made.clear()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_parent(self, path: str) -> None:
        """Makes a folder once, where there are such: object stores have none."""
        parent = str(PurePosixPath(path).parent)
        if not self._uploads_beside or parent in self._made:
            return
        self._fs.makedirs(parent, exist_ok=True)
        with self._lock:
            self._made.add(parent)

    def _try_to_write(self) -> None:
        """Missing rights and buckets show here, and not after hours."""
        name = f"{SCRATCH}/probe_{self.rank}"
        self.publish(b"", name)
        self.remove(name)


def as_url(path: Path | str) -> str | None:
    """The URL that a path was before it became one (`Path` drops a slash of `s3://`); None for a folder's path."""
    found = _URL.match(str(path))
    if found is None:
        return None
    slashes = ":///" if found[1] in ("file", "local") else "://"
    return found[1] + slashes + str(path)[found.end() :]


def open_filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path that its rest is there. Raises FluxIRError where it is not to be had."""
    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = f"pip install 'flux-ir[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else "install it with pip"
        raise FluxIRError(f"{url} needs a package that is not installed: {error}", hint=extra) from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "abfs", "sftp", "memory", "file"))
        raise FluxIRError(
            f"there is no filesystem for {url}: {error}",
            hint=f"fsspec {fsspec.__version__} knows {known} and others; a folder is named by its path",
        ) from error


def _cannot(do: str, what: str, error: Exception) -> FluxIRError:
    told = str(error) or type(error).__name__
    return FluxIRError(f"cannot {do} {what}: {told}", hint="check the address, the credentials and the rights to it")


def _discard(folder: Path) -> None:
    """Deletes a folder, and those above it that nobody else uses any more."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it has something in it, or was never made
        folder.parent.rmdir()
        folder.parent.parent.rmdir()


def _everyones_scratch(url: str) -> Path:
    """Where all ranks of this machine keep what is not uploaded yet: found again after a crash."""
    return Path(tempfile.gettempdir()) / f"flux_ir_{getpass.getuser()}" / hashlib.sha256(url.encode()).hexdigest()[:16]
