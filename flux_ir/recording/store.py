"""The capture file: written while the network runs, complete or absent, and read back a tensor at a time.

`torch.load` gives the same dictionary (`plan.contents` says what is in it). The parts: `plan` is what is known in
advance, `archive` the format, `filler` the thread that writes.
"""

import errno
import os
import pickle
import shutil
import zipfile
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, disk_error
from flux_ir.layout import newest_capture
from flux_ir.recording.archive import Archive, Record, StoredTensor, blank_tensors, laid_out_bytes, lay_out
from flux_ir.recording.filler import QUEUE_BYTES, RecordFiller
from flux_ir.recording.pieces import (
    Of,
    Piece,
    at_step,
    not_planned,
    pieces_of_context,
    pieces_of_site,
    pieces_of_text,
    places,
    positions,
)
from flux_ir.recording.plan import CapturePlan, Shape, capture_bytes, contents, stored_sites, stored_value
from flux_ir.recording.precision import READ_AS, dequantised
from flux_ir.recording.recorder import StepContext, check_step
from flux_ir.shapes import PackedLatent, Pooled, Tokens
from flux_ir.sites import Site, as_site, nearest_names

__all__ = ["Capture", "CaptureContext", "CapturePlan", "CaptureWriter", "capture_bytes", "file_bytes", "load_capture"]


def file_bytes(plan: CapturePlan) -> int:
    """The exact size of the capture file."""
    return laid_out_bytes(contents(plan, blank_tensors()))


class CaptureWriter:
    """The sink that writes the capture file, while the network computes the next block.

    On entering, the file is laid out beside its final name and all of its disk space is taken; at the end it is
    renamed. After any exception there is no file.

    Raises FluxIRError for a disk that is full or cannot be written, for tensors that are not as planned, and at the end
    if one never came.
    """

    def __init__(self, path: Path, plan: CapturePlan, *, queue_bytes: int = QUEUE_BYTES) -> None:
        self.path, self.plan, self.queue_bytes = path, plan, queue_bytes
        self._open = ExitStack()
        self._missing: dict[tuple[int | None, Of], Record] = {}

    def __enter__(self) -> "CaptureWriter":
        with ExitStack() as opened:  # undone at once if a later part fails
            beside = opened.enter_context(complete_file(self.path))
            file = opened.enter_context(beside.open("r+b", buffering=0))
            _reserve(file, self.plan, self.path)
            archive = Archive(beside)  # read back as laid out: no order of records is taken for granted
            record_of = archive.records()
            self._missing = {at: record_of[of.record] for at, of in places(self.plan, archive.contents).items()}
            filler = RecordFiller(file, self.path, queue_bytes=self.queue_bytes)
            self._filler = opened.enter_context(filler)
            if (kept := positions(self.plan)) is not None:
                filler.put(record_of[archive.contents["token_positions"].record], kept)
            opened.push(self._check_complete)
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def begin_step(self, step: int, context: StepContext) -> None:
        """Writes what the step began with."""
        for piece in pieces_of_context(self.plan, step, context):
            self._put(step, piece)

    def write(self, step: int, site: Site, value: Tensor) -> None:
        """Writes one site of one step."""
        for piece in pieces_of_site(self.plan, step, site, value):
            self._put(step, piece)

    def write_text(self, site: Site, value: Tensor) -> None:
        """Writes one layer of a text encoder."""
        for piece in pieces_of_text(self.plan, site, value):
            self._put(None, piece)

    def _put(self, step: int | None, piece: Piece) -> None:
        record = self._missing.pop((step, piece.of), None)
        if record is None:
            raise not_planned(step, piece.of)
        self._filler.put(record, piece.value)

    def _check_complete(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is None and self._missing:
            step, of = next(iter(self._missing))
            raise FluxIRError(
                f"the capture {self.path} is not complete: "
                f"{len(self._missing)} tensors never came, first {of}{at_step(step)}",
                hint="run every step of the schedule while the capture is open",
            )


def _reserve(file: FileIO, plan: CapturePlan, path: Path) -> None:
    """Lay the file out and take its disk space, so that a full disk is known before anything is computed."""
    needed = capture_bytes(plan)
    try:
        disk = shutil.disk_usage(path.parent)
        if disk.total and disk.free < needed:  # asked first: taking space till there is none would trouble others
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _check_size(file, needed)
        lay_out(file, contents(plan, blank_tensors()))
        needed = os.fstat(file.fileno()).st_size
        _take_space(file, needed)
    except OSError as error:
        raise disk_error(path, error, needed_bytes=needed) from error


def _check_size(file: FileIO, size: int) -> None:
    """Raises OSError for a file larger than may be: while it is laid out, torch would say so in words of its own."""
    os.ftruncate(file.fileno(), size)
    os.ftruncate(file.fileno(), 0)


def _take_space(file: FileIO, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return  # a full disk shows while writing
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # this file system cannot reserve
            raise


class CaptureContext(NamedTuple):
    """What a step began with, and where it went: state before it, pooled text, from and to flow time."""

    img: PackedLatent
    y: Pooled
    t_curr: float
    t_prev: float
    guidance: float
    txt_tokens: int


class StoredSite(NamedTuple):
    """What of the file holds one site at one step: its values, their scales if they are float8, and which tokens of
    these: half of them, if the site is half of a single block.
    """

    values: StoredTensor
    scale: StoredTensor | None
    tokens: slice


class Capture:
    """A capture file, open for reading. Tensors are mapped from the file when they are asked for.

    Steps are numbered as the sampler numbered them, also where only some were kept.
    """

    def __init__(self, path: Path, archive: Archive) -> None:
        self.path = path
        self.archive, self._contents = archive, archive.contents
        self._context = self._contents["denoising_context"]
        self.metadata: dict[str, Any] = self._contents["metadata"]
        self.sites: list[Site] = stored_sites(self._contents)
        """What is stored of the transformer. The halves of a stored single block can be read as well."""
        self.text_sites: list[Site] = sorted(map(Site.parse, self._contents.get("text_sites", {})))
        """The layers of the text encoders that are stored: they are read without a step."""
        count = len(self._context["timestep_pairs"])
        self.steps: list[int] = list(self.metadata.get("captured_steps", range(count)))
        self._index = {step: index for index, step in enumerate(self.steps)}
        self._known = frozenset(self.sites)

    def __repr__(self) -> str:
        model, dtype = self.metadata["model"], str(self.dtype).removeprefix("torch.")
        sites = len(self.sites) + len(self.text_sites)
        return f"<capture of {model}: {sites} sites, steps {_listed(self.steps)}, {dtype}, {self.path}>"

    @property
    def dtype(self) -> torch.dtype:
        """What `read` gives: the dtype of the file, but bfloat16 for float8 with scales."""
        return READ_AS if "scales" in self._contents else self.stored_dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the sites' values in the file."""
        dtype: torch.dtype = self._stored((*self.sites, *self.text_sites)[0], 0).dtype
        return dtype

    @property
    def img_positions(self) -> Tensor | None:
        """The places on the image grid, row by row, of the image tokens that were kept: int32. None: all of them."""
        kept = self._contents.get("token_positions")
        return None if kept is None else self.archive.tensor(kept)

    def shape(self, site: str | Site) -> Shape:
        """[batch, tokens, width] of one site, as at the first kept step."""
        site = as_site(site)
        batch, tokens, width = self._stored(site, 0).shape
        if site.per_prompt:
            return batch, tokens, width
        txt_tokens = self._context["txt_seq_len"][0]
        if site not in self._known:  # a half
            tokens = txt_tokens if site.stream == "txt" else tokens - txt_tokens
        return batch, tokens, width

    def read(self, site: str | Site, step: int | None = None) -> Tokens:
        """One site at one step: [batch, tokens, width], mapped from the file; float8 with scales becomes bfloat16.

        Layers of the text encoders (`t5.12`) have no step. Raises FluxIRError for a site or a step that was not
        captured.
        """
        return dequantised(*self.read_stored(site, step))

    def read_stored(self, site: str | Site, step: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The values as the file holds them, mapped from it, and the scales [batch, tokens] of float8 values."""
        place = self.place_of(as_site(site), step)
        values = self.archive.tensor(place.values)[:, place.tokens]
        return values, None if place.scale is None else self.archive.tensor(place.scale)[:, place.tokens]

    def place_of(self, site: Site, step: int | None) -> StoredSite:
        """Where the file holds one site at one step. Raises FluxIRError for a site or a step that was not captured."""
        check_step(site, step)
        if step is None:
            scale = self._contents.get("text_scales", {}).get(str(site))
            return StoredSite(self._stored(site, 0), scale, slice(None))
        index, scale = self._index_of(step), None
        values = self._stored(site, index)
        if "scales" in self._contents:
            stored = site if site in self._known else site.whole
            scale = self._contents["scales"][str(stored)][index]
        return StoredSite(values, scale, self._tokens(site, index))

    def _stored(self, site: Site, index: int) -> StoredTensor:
        """What holds the site, or the single block it is half of. Raises FluxIRError if it was not captured."""
        stored = site if site in self._known else site.whole
        if stored not in self._known and site not in self.text_sites:
            sites = (*self.text_sites, *self.sites)
            raise FluxIRError(
                f"{site} was not captured in {self.path}, which holds {len(sites)} sites",
                hint=f"the nearest are {nearest_names(str(site), map(str, sites))}",
            )
        if site.per_prompt:
            layer: StoredTensor = self._contents["text_sites"][str(site)]
            return layer
        found: StoredTensor = stored_value(self._contents, stored, index)
        return found

    def _tokens(self, site: Site, index: int) -> slice:
        if site in self._known:
            return slice(None)
        txt_tokens = self._context["txt_seq_len"][index]
        return slice(txt_tokens) if site.stream == "txt" else slice(txt_tokens, None)

    def context(self, step: int) -> CaptureContext:
        """What one step began with."""
        index, of = self._index_of(step), self._context
        img, y = (self.archive.tensor(of[part][index]) for part in ("img_state", "y"))
        t_curr, t_prev = of["timestep_pairs"][index]
        return CaptureContext(img, y, t_curr, t_prev, float(of["guidance"]), of["txt_seq_len"][index])

    def check(self) -> None:
        """Raises FluxIRError unless there are sites, and as many tensors of each as there are steps."""
        lists = {part: self._context[part] for part in ("img_state", "y", "txt_seq_len", "timestep_pairs")}
        for group in ("double_blocks", "single_blocks", "sites", "scales"):
            lists |= {f"{group}.{name}": values for name, values in self._contents.get(group, {}).items()}
        wrong = {name: len(values) for name, values in lists.items() if len(values) != len(self.steps)}
        if wrong or not (self.sites or self.text_sites) or not self.steps:
            raise FluxIRError(
                f"{self.path} must hold one tensor per site and step: got {len(self.sites)} sites, "
                f"{len(self.steps)} steps, and other lengths of {wrong or 'nothing'}",
                hint="the file was not written by a finished capture: capture again",
            )

    def _index_of(self, step: int) -> int:
        if step not in self._index:
            raise FluxIRError(
                f"step {step} was not captured in {self.path}", hint=f"it holds the steps {_listed(self.steps)}"
            )
        return self._index[step]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 12 else f"{steps[0]} ... {steps[-1]} ({len(steps)} of them)"


def load_capture(path: Path | str) -> Capture:
    """Open a capture: the file itself, or the folder of its run (where there are several, the newest).

    Raises FluxIRError for a file that is missing, broken, or no capture.
    """
    file = newest_capture(Path(path)) if Path(path).is_dir() else Path(path)
    try:
        capture = Capture(file, Archive(file))
        capture.check()
    except OSError as error:
        hint = "name a file called capture_*.pt, or the folder of a run, such as output/GENERATION_ID"
        raise FluxIRError(f"cannot read the capture {file}: {error.strerror}", hint=hint) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        hint = "it is cut short or was never a capture: capture again"
        raise FluxIRError(f"{file} is not a complete capture file: {error}", hint=hint) from error
    except (KeyError, TypeError, AttributeError) as error:
        hint = "name a file called capture_*.pt, or the folder of a run"
        raise FluxIRError(f"{file} is a file of PyTorch, but no capture ({error!r})", hint=hint) from error
    return capture
