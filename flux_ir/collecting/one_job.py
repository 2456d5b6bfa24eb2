"""One job at a time in a folder: a second one, started by mistake, would clear away what the first is writing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flux_ir.collecting.storage import LocalStorage, Storage
from flux_ir.distributed import Ranks, first_rank_value
from flux_ir.errors import FluxIRError
from flux_ir.layout import disk_error


@contextmanager
def one_job_at(storage: Storage, ranks: Ranks) -> Iterator[None]:
    """Keeps other jobs out of a local folder for as long as the `with` lasts; the ranks of one job are one job.

    The folder itself is locked, so nothing is left in it, and the system unlocks it when the process dies. URLs, and
    network drives that know no such locks, are not guarded. Raises FluxIRError if another job is at work there.
    """
    folder = _open(storage) if ranks.is_first and isinstance(storage, LocalStorage) else None
    try:
        is_ours = first_rank_value(folder is None or _lock(folder), ranks)
        if not is_ours:
            raise FluxIRError(
                f"another process is collecting into {storage.where}",
                hint="wait until it is done, or stop it; the same command then goes on",
            )
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _open(storage: LocalStorage) -> int:
    try:
        storage.root.mkdir(parents=True, exist_ok=True)
        return os.open(storage.root, os.O_RDONLY)
    except OSError as error:
        raise disk_error(storage.root, error) from error


def _lock(folder: int) -> bool:
    """Whether the folder is ours now, or cannot be locked at all."""
    import fcntl  # not on Windows, where reading a collection works

    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network drive without locks: nobody is hindered there
        return True
    return True
