"""The folder of one generation: the only place that knows how its files are called, to write them and to find them."""

import difflib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.files import disk_error

Lens = Literal["euler", "x0", "tuned", "jacobian", "jacobian_summed"]
Kind = Literal["double", "single"]

LATEST = "latest"
"""What `find_run` takes for the newest run."""
DECODED_NAME = "step_{step}/{kind}_block_{block}.jpg"
"""A decoded picture, below the folder of its lens."""

_GENERATION_ID = re.compile(r"[0-9a-f]{8}")
_DECODED_NAME = re.compile(r"step_(0|[1-9]\d*)/(double|single)_block_(0|[1-9]\d*)\.jpg")
_INTERMEDIATES, _CAPTURE, _METADATA = "intermediates", "capture_*.pt", "metadata_*.json"
_TIMESTAMP_ENDS = len("metadata_YYYYmmdd_HHMMSS")


def new_generation_id() -> str:
    """A fresh name for a run: 8 random hex digits."""
    return secrets.token_hex(4)


def check_generation_id(text: str) -> str:
    """The text, if it is a generation id. Anything else (`../x` above all) raises FluxIRError."""
    if not is_generation_id(text):
        raise FluxIRError(
            f"a generation id is 8 hex digits in lower case: got {text!r}",
            hint="it was printed when the picture was made, and is the name of its folder",
        )
    return text


def is_generation_id(text: str) -> bool:
    """Whether a folder of this name is a run's."""
    return _GENERATION_ID.fullmatch(text) is not None


class DecodedImage(NamedTuple):
    """A decoded picture that exists, and the step and the block that its name says."""

    step: int
    kind: Kind
    block: int
    path: Path


@dataclass(frozen=True)
class RunFolder:
    """The folder of one generation: it names paths, and only `made` makes any.

    Raises FluxIRError for a malformed id.
    """

    output_dir: Path
    generation_id: str

    def __post_init__(self) -> None:
        check_generation_id(self.generation_id)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.output_dir / self.generation_id

    @contextmanager
    def made(self) -> Iterator[None]:
        """Makes the folder. Whatever was made here and is still empty at the end, however that comes, is removed.

        Raises FluxIRError where no folder can be made.
        """
        made: list[Path] = []
        try:
            try:
                made = [path for path in (self.intermediates, *self.intermediates.parents) if not path.exists()]
                self.intermediates.mkdir(parents=True)
            except OSError as error:
                raise disk_error(self.path, error) from error
            yield
        finally:
            for path in made:
                with suppress(OSError):  # it has something in it
                    path.rmdir()

    @property
    def intermediates(self) -> Path:
        """The folder of what lies behind the picture: the capture, its metadata, what the lens made of it."""
        return self.path / _INTERMEDIATES

    @property
    def lens_json(self) -> Path:
        """The numbers that go with the decoded pictures."""
        return self.intermediates / "lens.json"

    @property
    def difference_json(self) -> Path:
        """How far each block is from that of another run, where the two were compared."""
        return self.intermediates / "difference.json"

    def given_picture(self, name: str) -> Path:
        """A picture that the run was given, as it was encoded: `init_image` or `reference_image`."""
        return self.intermediates / f"{name}.png"

    def image(self, index: int = 0) -> Path:
        """The picture itself."""
        return self.path / _image(index)

    def capture_file(self, timestamp: str, model: str) -> Path:
        """Where a capture goes; `timestamp` is YYYYmmdd_HHMMSS."""
        return self.intermediates / f"capture_{timestamp}_{model}.pt"

    def metadata_file(self, timestamp: str, model: str) -> Path:
        """Every option and version of the run, under the same name as its capture."""
        return self.intermediates / f"metadata_{timestamp}_{model}.json"

    def decoded(self, lens: Lens) -> Path:
        """The folder of pictures decoded with this lens."""
        return self.intermediates / f"decoded{_suffix(lens)}"

    def decoded_image(self, lens: Lens, step: int, kind: str, block: int) -> Path:
        """What one block would have drawn at one step; `kind` is double or single."""
        return self.decoded(lens) / DECODED_NAME.format(step=step, kind=kind, block=block)

    def decoded_images(self, lens: Lens) -> Iterator[DecodedImage]:
        """The pictures of this lens that are there, in no order."""
        for path in self.decoded(lens).glob("step_*/*_block_*.jpg"):
            if named := _DECODED_NAME.fullmatch(f"{path.parent.name}/{path.name}"):
                kind: Kind = "double" if named[2] == "double" else "single"
                yield DecodedImage(int(named[1]), kind, int(named[3]), path)

    def sheet(self, lens: Lens) -> Path:
        """All decoded pictures on one: steps across, blocks down."""
        return self.path / f"contact_sheet{_suffix(lens)}.jpg"

    def find_capture(self) -> Path:
        """The newest capture of this run. Raises FluxIRError if there is no such run, or no capture in it."""
        self._check_exists()
        return newest_capture(self.path)

    def find_metadata(self) -> Path:
        """The newest metadata of this run. Raises FluxIRError if there is no such run, or none in it."""
        self._check_exists()
        return _newest(self.intermediates, _METADATA)

    def has_metadata(self) -> bool:
        """Whether `find_metadata` would find it."""
        return any(self.intermediates.glob(_METADATA))

    def _check_exists(self) -> None:
        if self.path.is_dir():
            return
        if not self.output_dir.is_dir():
            raise FluxIRError(
                f"the folder {self.output_dir} does not exist, so there is no generation {self.generation_id} in it",
                hint="name the folder the picture was made in with --output_dir",
            )
        known = sorted(path.name for path in self.output_dir.iterdir() if is_generation_id(path.name))
        nearest = difflib.get_close_matches(self.generation_id, known, n=3, cutoff=0.0)
        raise FluxIRError(
            f"there is no generation {self.generation_id} in {self.output_dir}, which has {len(known)} others",
            hint=f"the nearest are {', '.join(nearest)}" if nearest else "make one with capture_sample.py",
        )


def _image(index: int) -> str:
    return f"img_{index}.jpg"


def _suffix(lens: str) -> str:
    # "euler" is the original program's only view, so its names are the plain ones.
    return "" if lens == "euler" else f"_{lens}"


def find_runs(output_dir: Path) -> list[RunFolder]:
    """Every run below a folder, by its id."""
    names = sorted(path.name for path in output_dir.iterdir() if is_generation_id(path.name) and path.is_dir())
    return [RunFolder(output_dir, name) for name in names]


def find_run(output_dir: Path, generation_id: str) -> RunFolder:
    """The folder of a run by its id, or of the newest run for "latest".

    Raises FluxIRError if the id is malformed, or if there is no such run (naming the nearest).
    """
    folder = _latest_run(output_dir) if generation_id == LATEST else RunFolder(output_dir, generation_id)
    folder._check_exists()
    return folder


def is_run_name(text: str) -> bool:
    """Whether `find_run` looks for a run of this name: a generation id, or "latest"."""
    return text == LATEST or is_generation_id(text)


def _latest_run(output_dir: Path) -> RunFolder:
    """The run whose metadata is newest: by the time in its name, which outlives copying, then by the file's."""
    newest: tuple[str, int, str] | None = None
    for path in output_dir.glob(f"*/{_INTERMEDIATES}/{_METADATA}"):
        name = path.parents[1].name
        if is_generation_id(name):
            newest = max(newest or ("", 0, ""), (path.name[:_TIMESTAMP_ENDS], path.stat().st_mtime_ns, name))
    if newest is None:
        raise FluxIRError(f"there is no generation in {output_dir}", hint="make one with capture_sample.py")
    return RunFolder(output_dir, newest[-1])


# ---- Runs whose folder was renamed: found by what is in it.


def is_run_folder(path: Path) -> bool:
    """Whether a folder is laid out as a run's, whatever it is called."""
    return (path / _INTERMEDIATES).is_dir()


def folders_with_captures(folder: Path) -> list[Path]:
    """The folders of runs below this one that hold captures, whatever they are called, by name."""
    return sorted({path.parents[1] for path in folder.glob(f"*/{_INTERMEDIATES}/{_CAPTURE}")})


def run_of(capture: Path) -> RunFolder:
    """The run that a capture lies in. Raises FluxIRError if its folder has another name than a run's."""
    return RunFolder(capture.parents[2], capture.parents[1].name)


def picture_of(capture: Path) -> Path | None:
    """The picture of the run that a capture lies in; None if there is none, or the capture lies elsewhere."""
    picture = capture.parents[1] / _image(0)
    return picture if capture.parent.name == _INTERMEDIATES and picture.is_file() else None


def newest_capture(run_folder: Path) -> Path:
    """The newest capture below a run's folder, whatever that folder is called. Raises FluxIRError if there is none."""
    return _newest(run_folder / _INTERMEDIATES, _CAPTURE)


def _newest(folder: Path, pattern: str) -> Path:
    # The time stands first in the name, so the last name in order is the newest.
    found = sorted(folder.glob(pattern), key=lambda path: path.name)
    if not found:
        raise FluxIRError(
            f"{folder} must hold a file {pattern}: there is none",
            hint="the run was interrupted before it was complete, or the file was moved: make it again",
        )
    return found[-1]
