"""How files come to be, written beside their final name and then renamed; and how JSON is written and read.

So a file that exists is complete: an exception deletes what was begun, and a killed process leaves it under a name that
nothing reads (`*.partial`). This holds for processes that die, not for power cuts: there is no fsync.
"""

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from flux_ir.errors import FluxIRError

_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AGAIN = "it is damaged, or something else: delete it, and make or download it again"


def read_json(path: Path, *, required: tuple[str, ...] = (), hint: str = _AGAIN) -> dict[str, Any]:
    """The JSON object in a file.

    Raises FluxIRError, with `hint`, for a file that is missing, is no JSON or no object, or lacks a `required` key.
    """
    try:
        value = json.loads(path.read_bytes())  # bytes: a UTF-8 file with a byte order mark is read, too
    except OSError as error:
        raise FluxIRError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise FluxIRError(f"{path} must be JSON: {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise FluxIRError(f"{path} must be a JSON object: got {value!r:.40}", hint=hint)
    if missing := [key for key in required if key not in value]:
        wanted = ", ".join(required)
        raise FluxIRError(f"{path} must have the keys {wanted}: it lacks {', '.join(missing)}", hint=hint)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, complete or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with complete_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to: renamed to `path` at the end, deleted on any exception.

    Missing folders are made. Raises FluxIRError at once where nothing can be written, and when the disk runs full.
    """
    beside = path.with_name(f"{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "there is a folder of that name")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(b"")
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield beside
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        reported = isinstance(error, FluxIRError)  # by whoever knows how much is needed
        if not reported and (full := _full_disk_behind(error)) is not None:
            raise disk_error(path, full) from error
        raise


def disk_error(path: Path, error: OSError, *, needed_bytes: int | None = None) -> FluxIRError:
    """What a failed write means to a user: which file, why, how much it needs and how much is free."""
    message = f"cannot write {path}: {error.strerror or error}"
    if needed_bytes is not None:
        message += f" (it needs {needed_bytes} bytes, {_free_bytes(path)} are free)"
    if error.errno not in _DISK_IS_FULL:
        return FluxIRError(message, hint="name a folder that can be written with --output_dir")
    return FluxIRError(message, hint="free some space, keep less with --sites or --steps, or use another --output_dir")


def _full_disk_behind(error: BaseException | None) -> OSError | None:
    """The full disk that made a write fail, if one did.

    safetensors writes the number into the text of an error of its own; torch raises one while it handles the OSError.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
            return error
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number and int(number[1]) in _DISK_IS_FULL:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return None


def _free_bytes(path: Path) -> int:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return shutil.disk_usage(folder).free


def versions(*packages: str) -> dict[str, str]:
    """The versions of this package, of others and of Python, as files say what made them.

    Not from what is installed: a clone that is run in place has no installed package.
    """
    found = {name: str(import_module(name).__version__) for name in ("flux_ir", *packages)}
    return found | {"python": platform.python_version()}
