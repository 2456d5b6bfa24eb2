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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flux_ir.capture.archive import Archive, Record, blank_tensors, laid_out_bytes, lay_out
from flux_ir.capture.filler import QUEUE_BYTES, RecordFiller
from flux_ir.capture.plan import CapturePlan, Shape, capture_bytes, contents, stored_sites, stored_value
from flux_ir.capture.recorder import StepContext
from flux_ir.errors import FluxIRError
from flux_ir.layout import complete_file, disk_error, newest_capture
from flux_ir.shapes import PackedLatent, Pooled, Tokens
from flux_ir.sites import Site, nearest_names

__all__ = ["Capture", "CaptureContext", "CapturePlan", "CaptureWriter", "capture_bytes", "file_bytes", "load_capture"]

# What one tensor of the file is of: a site, or a part of the step's context.
_Of = Site | Literal["img_state", "y"]


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
        self._missing: dict[tuple[int, _Of], Record] = {}

    def __enter__(self) -> "CaptureWriter":
        with ExitStack() as opened:  # undone at once if a later part fails
            beside = opened.enter_context(complete_file(self.path))
            file = opened.enter_context(beside.open("r+b", buffering=0))
            _reserve(file, self.plan, self.path)
            self._missing = _places(beside, self.plan)
            filler = RecordFiller(file, self.path, queue_bytes=self.queue_bytes)
            self._filler = opened.enter_context(filler)
            opened.push(self._check_complete)
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def begin_step(self, step: int, context: StepContext) -> None:
        """Writes what the step began with."""
        if context.txt_tokens != self.plan.txt_tokens:
            raise FluxIRError(
                f"step {step} must have {self.plan.txt_tokens} text tokens, as planned: got {context.txt_tokens}",
                hint="plan the capture with the text this prompt is encoded to",
            )
        dtype = self.plan.context_dtype or self.plan.dtype
        self._put(step, "img_state", context.img, self.plan.img_shape, dtype)
        self._put(step, "y", context.y, self.plan.y_shape, dtype)

    def write(self, step: int, site: Site, value: Tensor) -> None:
        """Writes one site of one step."""
        self._put(step, site, value, self.plan.shape(site), self.plan.dtype)

    def _put(self, step: int, of: _Of, value: Tensor, shape: Shape, dtype: torch.dtype) -> None:
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise FluxIRError(
                f"{of} at step {step} must be {dtype} {list(shape)}, as planned: got {value.dtype} {list(value.shape)}",
                hint="plan the capture with the sizes and the dtype the network runs with",
            )
        record = self._missing.pop((step, of), None)
        if record is None:
            raise FluxIRError(
                f"{of} at step {step} is not in the plan of this capture, or came twice",
                hint="record the sites and the steps of the plan, one forward for each step",
            )
        self._filler.put(record, value)

    def _check_complete(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is None and self._missing:
            step, of = next(iter(self._missing))
            raise FluxIRError(
                f"the capture {self.path} is not complete: "
                f"{len(self._missing)} tensors never came, first {of} at step {step}",
                hint="run every step of the schedule while the capture is open",
            )


def _reserve(file: FileIO, plan: CapturePlan, path: Path) -> None:
    """Lay the file out and take its disk space, so that a full disk is known before anything is computed."""
    needed = capture_bytes(plan)
    try:
        disk = shutil.disk_usage(path.parent)
        if disk.total and disk.free < needed:  # asked first: taking space till there is none would trouble others
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lay_out(file, contents(plan, blank_tensors()))
        needed = os.fstat(file.fileno()).st_size
        _take_space(file, needed)
    except OSError as error:
        raise disk_error(path, error, needed_bytes=needed) from error


def _take_space(file: FileIO, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return  # a full disk shows while writing
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # this file system cannot reserve
            raise


def _places(beside: Path, plan: CapturePlan) -> dict[tuple[int, _Of], Record]:
    """Where each tensor belongs, read back from the file as laid out: no order of records is taken for granted."""
    archive = Archive(beside)
    record_of, stored = archive.records(), archive.contents
    places: dict[tuple[int, _Of], Record] = {}
    for index, step in enumerate(plan.kept_steps):
        for part in ("img_state", "y"):
            places[step, part] = record_of[stored["denoising_context"][part][index].record]
        for site in plan.sites:
            places[step, site] = record_of[stored_value(stored, site, index).record]
    return places


class CaptureContext(NamedTuple):
    """What a step began with, and where it went: state before it, pooled text, from and to flow time."""

    img: PackedLatent
    y: Pooled
    t_curr: float
    t_prev: float
    guidance: float
    txt_tokens: int


class Capture:
    """A capture file, open for reading. Tensors are mapped from the file when they are asked for.

    Steps are numbered as the sampler numbered them, also where only some were kept.
    """

    def __init__(self, path: Path, archive: Archive) -> None:
        self.path = path
        self._archive, self._contents = archive, archive.contents
        self._context = self._contents["denoising_context"]
        self.metadata: dict[str, Any] = self._contents["metadata"]
        self.sites: list[Site] = stored_sites(self._contents)
        """What is stored. The halves of a stored single block can be read as well."""
        count = len(self._context["timestep_pairs"])
        self.steps: list[int] = list(self.metadata.get("captured_steps", range(count)))
        self._index = {step: index for index, step in enumerate(self.steps)}
        self._known = frozenset(self.sites)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the sites put out."""
        dtype: torch.dtype = stored_value(self._contents, self.sites[0], 0).dtype
        return dtype

    def shape(self, site: Site) -> Shape:
        """[batch, tokens, width] of one site, as at the first kept step."""
        return tuple(self.read(site, self.steps[0]).shape)

    def read(self, site: Site, step: int) -> Tokens:
        """One site at one step: [batch, tokens, width], mapped from the file.

        Raises FluxIRError for a site or a step that was not captured.
        """
        index, stored = self._index_of(step), site if site in self._known else site.whole
        if stored not in self._known:
            raise FluxIRError(
                f"{site} was not captured in {self.path}, which holds {len(self.sites)} sites",
                hint=f"the nearest are {nearest_names(str(site), map(str, self.sites))}",
            )
        value = self._archive.tensor(stored_value(self._contents, stored, index))
        if stored == site:
            return value
        txt_tokens = self._context["txt_seq_len"][index]
        return value[:, :txt_tokens] if site.stream == "txt" else value[:, txt_tokens:]

    def context(self, step: int) -> CaptureContext:
        """What one step began with."""
        index, of = self._index_of(step), self._context
        img, y = (self._archive.tensor(of[part][index]) for part in ("img_state", "y"))
        t_curr, t_prev = of["timestep_pairs"][index]
        return CaptureContext(img, y, t_curr, t_prev, float(of["guidance"]), of["txt_seq_len"][index])

    def check(self) -> None:
        """Raises FluxIRError unless there are sites, and as many tensors of each as there are steps."""
        lists = {part: self._context[part] for part in ("img_state", "y", "txt_seq_len", "timestep_pairs")}
        for group in ("double_blocks", "single_blocks", "sites"):
            lists |= {f"{group}.{name}": values for name, values in self._contents.get(group, {}).items()}
        wrong = {name: len(values) for name, values in lists.items() if len(values) != len(self.steps)}
        if wrong or not self.sites or not self.steps:
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
        raise FluxIRError(f"cannot read the capture {file}: {error.strerror}", hint="check the path") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        hint = "it is cut short or was never a capture: capture again"
        raise FluxIRError(f"{file} is not a complete capture file: {error}", hint=hint) from error
    except (KeyError, TypeError, AttributeError) as error:
        hint = "name a file called capture_*.pt, or the folder of a run"
        raise FluxIRError(f"{file} is a file of PyTorch, but no capture ({error!r})", hint=hint) from error
    return capture
