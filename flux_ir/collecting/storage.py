"""Where a collection's files go: the one seam between what is computed and the place that keeps it.

A file comes under its name whole or not at all. `LocalStorage` is a folder; every name is relative to it, with
forward slashes. `activations.remote` has the storage of a URL. Next: `collection`, which says what the names are.
"""

import errno
import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from flux_ir.distributed import Ranks, first_rank_value
from flux_ir.errors import FluxIRError
from flux_ir.files import disk_error

SCRATCH = "partial"
"""The folder of files that are being written. It is gone from a finished collection."""
BROKEN = "broken"
"""The folder of files that were found broken."""


@runtime_checkable
class Storage(Protocol):
    """A place for files, by name. What exists is complete. All methods may be called from several threads."""

    @property
    def where(self) -> str:
        """The place in words: a path or a URL."""

    def scratch(self, suffix: str) -> Path:
        """A fresh local path for a file that is to be published: nothing is there yet."""

    def publish(self, source: Path | bytes | memoryview, name: str) -> None:
        """Put a local file (which is gone afterwards) or some bytes under `name`, in place of what was there."""

    def size(self, name: str) -> int | None:
        """Bytes of the file; None: there is no such file."""

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""

    def sha256(self, name: str) -> str:
        """The SHA-256 of the whole file, in hex. Raises FileNotFoundError."""

    def local(self, name: str) -> Path:
        """A local path where the file can be read, and nothing may be written. Raises FileNotFoundError."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    def list(self, folder: str) -> list[str]:
        """The names below a folder, however deep, in order; none if there is no such folder."""

    def move(self, name: str, to: str) -> None:
        """Give a file another name."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def clear_scratch(self, *, everyones: bool) -> None:
        """Remove what dead processes began: of this process' rank, or of all of them."""


class LocalStorage:
    """A folder of this machine, or of a network drive that all ranks see.

    `rank` keeps what different processes are writing apart. Raises FluxIRError where nothing can be written.
    """

    def __init__(self, root: Path, *, rank: int = 0) -> None:
        self.root, self.rank = root, rank
        self._numbers = itertools.count()
        self._made: set[Path] = set()
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    @property
    def _scratch_folder(self) -> Path:
        return self.root / SCRATCH / f"rank_{self.rank}"

    def scratch(self, suffix: str) -> Path:
        """A fresh path on the same disk, so that publishing is a rename."""
        self._make(self._scratch_folder)
        return self._scratch_folder / f"{os.getpid()}_{next(self._numbers)}{suffix}"

    def publish(self, source: Path | bytes | memoryview, name: str) -> None:
        """Renames: whoever looks sees the old file, the new one, or none, and never a part of one."""
        path = self.root / name
        beside = source if isinstance(source, Path) else self.scratch(path.suffix)
        try:
            if not isinstance(source, Path):
                beside.write_bytes(source)
            self._make(path.parent)
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise disk_error(path, error) from error

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None."""
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """The whole file."""
        return (self.root / name).read_bytes()

    def sha256(self, name: str) -> str:
        """The SHA-256 of the file, in hex."""
        with (self.root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def local(self, name: str) -> Path:
        """The file itself."""
        if not self.exists(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root / name))
        return self.root / name

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.root / name).is_file()

    def list(self, folder: str) -> list[str]:
        """The names below a folder, in order."""
        paths = [path for path in (self.root / folder).rglob("*") if path.is_file()]
        return sorted(path.relative_to(self.root).as_posix() for path in paths)

    def move(self, name: str, to: str) -> None:
        """Renames the file."""
        self._make((self.root / to).parent)
        (self.root / name).replace(self.root / to)

    def remove(self, name: str) -> None:
        """Deletes the file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def clear_scratch(self, *, everyones: bool) -> None:
        """Deletes files that were begun and never published."""
        shutil.rmtree(self.root / SCRATCH if everyones else self._scratch_folder, ignore_errors=True)
        with self._lock:
            self._made.clear()

    def _make(self, folder: Path) -> None:
        """Makes a folder once: a call for every file would cost as much as a small file does."""
        if folder in self._made:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error
        with self._lock:
            self._made.add(folder)


def open_storage(url: str, *, rank: int = 0) -> Storage:
    """The place that `--output_dir` names: a folder, or a URL that fsspec has a filesystem for.

    Raises FluxIRError for a place that is not to be had, or cannot be written.
    """
    if "://" in url:
        from flux_ir.activations.remote import RemoteStorage  # loads the filesystem's package

        return RemoteStorage(url, rank=rank)
    return LocalStorage(Path(url).expanduser(), rank=rank)


def move_aside(storage: Storage, name: str) -> None:
    """Puts a broken file below `broken/`, with a number where others of its name lie there already."""
    taken = next(number for number in itertools.count() if not storage.exists(_aside(name, number)))
    storage.move(name, _aside(name, taken))


def _aside(name: str, number: int) -> str:
    return f"{BROKEN}/{name}" + (f".{number}" if number else "")


@contextmanager
def one_job_at(storage: Storage, ranks: Ranks) -> Iterator[None]:
    """Keeps other jobs out of a local folder for as long as the `with` lasts; the ranks of one job are one job.

    The folder itself is locked, so nothing is left in it, and the system unlocks it when the process dies. URLs, and
    network drives and Windows, which know no such locks, are not guarded. Raises FluxIRError if another job is at
    work there.
    """
    local = storage if ranks.is_first and isinstance(storage, LocalStorage) and _can_lock() else None
    folder = None if local is None else _open_folder(local)
    try:
        is_ours = first_rank_value(folder is None or _lock_folder(folder), ranks)
        if not is_ours:
            raise FluxIRError(
                f"another process is at work in {storage.where}",
                hint="wait until it is done, or stop it; the same command then goes on",
            )
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _can_lock() -> bool:
    """Whether the system locks folders. Windows does not: nothing guards them there."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return False
    return True


def _open_folder(storage: LocalStorage) -> int:
    try:
        storage.root.mkdir(parents=True, exist_ok=True)
        return os.open(storage.root, os.O_RDONLY)
    except OSError as error:
        raise disk_error(storage.root, error) from error


def _lock_folder(folder: int) -> bool:
    """Whether the folder is ours now, or cannot be locked at all."""
    import fcntl  # not on Windows

    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network drive without locks: nobody is hindered there
        return True
    return True
