"""Files of a remote folder on the local disk, fetched when they are asked for, in bounded space.

Training reads a shard from end to end and then not again for an epoch, so what was fetched longest ago goes first.

fsspec's own caches (`filecache`, `simplecache`, 2026.9) do not serve: they know an age at which a file goes and no size
that the whole may have, four threads that ask for one file fetch it four times, and a file that arrives short is kept
and read as if it were whole.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from flux_ir.errors import FluxIRError

CACHE_BYTES = 64 * 10**9


class Downloads:
    """The files of `root` on an fsspec filesystem, as local paths below `folder`.

    At most `max_bytes` are kept, or one larger file alone: the file fetched longest ago is deleted first (who has
    mapped it reads on). Files that an earlier process fetched are found again: a name always means the same file. May
    be used by several threads.
    """

    def __init__(self, filesystem: Any, root: str, folder: Path, *, max_bytes: int = CACHE_BYTES) -> None:
        self._fs, self._root, self.folder, self.max_bytes = filesystem, root.rstrip("/"), folder, max_bytes
        self._sizes: OrderedDict[str, int] | None = None
        self._lock = threading.RLock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the files that are here."""
        with self._lock:
            return sum(self._found().values())

    def fetch(self, name: str) -> Path:
        """The local path of a file, downloaded unless it is there. Raises FileNotFoundError if there is no such file.

        Raises FluxIRError for a file that does not arrive whole, or cannot be kept.
        """
        path = self.folder / name
        with self._lock:
            if name not in self._found():
                self._download(name, path)
                self._found()[name] = path.stat().st_size
                self._make_room(name)
        return path

    def forget(self, name: str) -> None:
        """Delete the local copy, if there is one."""
        with self._lock:
            self._found().pop(name, None)
            (self.folder / name).unlink(missing_ok=True)

    def _download(self, name: str, path: Path) -> None:
        beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        remote = f"{self._root}/{name}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(remote, str(beside))
            wanted = self._fs.info(remote)["size"]
            if wanted is not None and beside.stat().st_size != wanted:
                raise FluxIRError(
                    f"{remote} did not arrive whole: {beside.stat().st_size} of {wanted} bytes", hint="try again"
                )
            beside.replace(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise FluxIRError(
                f"cannot fetch {remote} to {path}: {error}", hint="check the network, and the space on the local disk"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def _make_room(self, newest: str) -> None:
        sizes = self._found()
        held = sum(sizes.values())
        while held > self.max_bytes and next(iter(sizes)) != newest:
            name, size = sizes.popitem(last=False)
            held -= size
            (self.folder / name).unlink(missing_ok=True)

    def _found(self) -> "OrderedDict[str, int]":
        """Sizes by name, in the order they were fetched; at first what earlier processes left."""
        if self._sizes is None:
            files = [path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
            stats = sorted((path.stat().st_mtime_ns, path) for path in files)
            sizes = ((path.relative_to(self.folder).as_posix(), path.stat().st_size) for _, path in stats)
            self._sizes = OrderedDict(sizes)
        return self._sizes
