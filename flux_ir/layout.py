"""The folder of one generation: the only place that knows how its files are called, to write them and to find them."""

import difflib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux_ir.errors import FluxIRError

_GENERATION_ID = re.compile(r"[0-9a-f]{8}")


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
