"""Where everything of a run lies, and how files come to be: written beside their final name, then renamed.

So a file that exists is complete: an exception deletes what was begun, and a killed process leaves it under a name that
nothing reads (`*.partial`). This holds for processes that die, not for power cuts: nothing is forced to the platter.
"""

import difflib
import errno
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from flux_ir.errors import FluxIRError

_GENERATION_ID = re.compile(r"[0-9a-f]{8}")
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def new_generation_id() -> str:
    """A fresh name for a run: 8 random hex digits."""
    return secrets.token_hex(4)


def check_generation_id(text: str) -> str:
    """The text, if it is a generation id. Anything else (`../x` above all) raises FluxIRError."""
    if not _GENERATION_ID.fullmatch(text):
        raise FluxIRError(
            f"a generation id is 8 hex digits in lower case: got {text!r}",
            hint="it was printed when the picture was made, and is the name of its folder",
        )
    return text


@dataclass(frozen=True)
class RunFolder:
    """The folder of one generation: it names paths and makes nothing. Raises FluxIRError for a malformed id."""

    output_dir: Path
    generation_id: str

    def __post_init__(self) -> None:
        check_generation_id(self.generation_id)

    @property
    def path(self) -> Path:
        return self.output_dir / self.generation_id

    @property
    def intermediates(self) -> Path:
        """The folder of what lies behind the picture: the capture, its metadata, what the lens made of it."""
        return self.path / "intermediates"

    @property
    def lens_json(self) -> Path:
        """The numbers that go with the decoded pictures."""
        return self.intermediates / "lens.json"

    def image(self, index: int = 0) -> Path:
        """The picture itself."""
        return self.path / f"img_{index}.jpg"

    def capture_file(self, timestamp: str, model: str) -> Path:
        """Where a capture goes; `timestamp` is YYYYmmdd_HHMMSS."""
        return self.intermediates / f"capture_{timestamp}_{model}.pt"

    def metadata_file(self, timestamp: str, model: str) -> Path:
        """Every option and version of the run, under the same name as its capture."""
        return self.intermediates / f"metadata_{timestamp}_{model}.json"

    def decoded(self, lens: Literal["euler", "x0"]) -> Path:
        """The folder of pictures decoded with this lens."""
        return self.intermediates / f"decoded{_suffix(lens)}"

    def decoded_image(self, lens: Literal["euler", "x0"], step: int, kind: str, block: int) -> Path:
        """What one block would have drawn at one step; `kind` is double or single."""
        return self.decoded(lens) / f"step_{step}" / f"{kind}_block_{block}.jpg"

    def sheet(self, lens: Literal["euler", "x0"]) -> Path:
        """All decoded pictures on one: steps across, blocks down."""
        return self.path / f"contact_sheet{_suffix(lens)}.jpg"

    def find_capture(self) -> Path:
        """The newest capture of this run. Raises FluxIRError if there is no such run, or no capture in it."""
        self._check_exists()
        return newest_capture(self.path)

    def find_metadata(self) -> Path:
        """The newest metadata of this run, likewise."""
        self._check_exists()
        return _newest(self.intermediates, "metadata_*.json")

    def _check_exists(self) -> None:
        if self.path.is_dir():
            return
        if not self.output_dir.is_dir():
            raise FluxIRError(
                f"the folder {self.output_dir} does not exist, so there is no generation {self.generation_id} in it",
                hint="name the folder the picture was made in with --output_dir",
            )
        known = sorted(path.name for path in self.output_dir.iterdir() if _GENERATION_ID.fullmatch(path.name))
        nearest = difflib.get_close_matches(self.generation_id, known, n=3, cutoff=0.0)
        raise FluxIRError(
            f"there is no generation {self.generation_id} in {self.output_dir}, which has {len(known)} others",
            hint=f"the nearest are {', '.join(nearest)}" if nearest else "make one with capture_sample.py",
        )


def _suffix(lens: str) -> str:
    # "euler" is the original program's only view, so its names are the plain ones.
    return "" if lens == "euler" else f"_{lens}"


def newest_capture(run_folder: Path) -> Path:
    """The newest capture below a run's folder, whatever that folder is called. Raises FluxIRError if there is none."""
    return _newest(run_folder / "intermediates", "capture_*.pt")


def _newest(folder: Path, pattern: str) -> Path:
    # The time stands first in the name, so the last name in order is the newest.
    found = sorted(folder.glob(pattern), key=lambda path: path.name)
    if not found:
        raise FluxIRError(
            f"{folder} must hold a file {pattern}: there is none",
            hint="the run was interrupted before it was complete, or the file was moved: make it again",
        )
    return found[-1]


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
        said = isinstance(error, FluxIRError)  # by whoever knows how much is needed
        if not said and (full := _full_disk_behind(error)) is not None:
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
    """The full disk that made a write fail, if one did: safetensors says it in words, torch on top of what it was."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
            return error
        said = re.search(r"\(os error (\d+)\)", str(error))
        if said and int(said[1]) in _DISK_IS_FULL:
            return OSError(int(said[1]), os.strerror(int(said[1])))
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
