"""The sink that writes the capture file, on a thread of its own, while the network computes the next block.

`CaptureWriter` says what goes where, `RecordFiller` below it is the queue and the thread.
The file is laid out empty and all of its disk space is taken before the first step; then every tensor goes to its place
as it comes. So memory holds what waits to be written and never the capture, and a disk that is too small is known
before anything is computed. `torch.load` gives the dictionary (`plan.contents`); `reader` maps a tensor at a time.
"""

import errno
import os
import shutil
import zlib
from collections import deque
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, disk_error
from flux_ir.recording.file_format import Archive, Record, blank_tensors, laid_out_bytes, lay_out
from flux_ir.recording.plan import (
    CapturePlan,
    Piece,
    TensorName,
    at_step,
    capture_bytes,
    contents,
    not_planned,
    pieces_of_context,
    pieces_of_site,
    planned_tensors,
    positions,
    stored_tensor,
)
from flux_ir.recording.recorder import StepContext
from flux_ir.sites import Site

QUEUE_BYTES = 256 * 2**20  # the most that waits to be written: beyond it the network waits for the disk
# The thread sleeps until so much waits: waking it for every tensor of a small network would cost more than it writes.
BATCH_BYTES = 2**20


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
        self._missing: dict[tuple[int | None, TensorName], Record] = {}

    def __enter__(self) -> "CaptureWriter":
        with ExitStack() as opened:  # undone at once if a later part fails
            beside = opened.enter_context(complete_file(self.path))
            # Without a buffer: whole tensors are written, each at a place of its own.
            file = opened.enter_context(beside.open("r+b", buffering=0))
            _reserve(file, self.plan, self.path)
            archive = Archive(beside)  # read back as laid out: no order of records is taken for granted
            record_of = archive.records()
            self._missing = {
                (step, name): record_of[stored_tensor(archive.contents, name, tensor.step_index).record]
                for (step, name), tensor in planned_tensors(self.plan).items()
            }
            filler = RecordFiller(file, self.path, queue_bytes=self.queue_bytes)
            self._filler = opened.enter_context(filler)
            if (kept := positions(self.plan)) is not None:
                self._put(None, Piece("token_positions", kept))
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
        for piece in pieces_of_site(self.plan, None, site, value):
            self._put(None, piece)

    def _put(self, step: int | None, piece: Piece) -> None:
        record = self._missing.pop((step, piece.of), None)
        if record is None:
            raise not_planned(step, piece.of)
        self._filler.put(record, piece.value)

    def _check_complete(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is None and self._missing:
            step, name = next(iter(self._missing))
            raise FluxIRError(
                f"the capture {self.path} is not complete: "
                f"{len(self._missing)} tensors never came, first {name}{at_step(step)}",
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


class _Waiting(NamedTuple):
    """A tensor in the queue, on its way from the device."""

    record: Record
    value: Tensor
    ready: torch.cuda.Event | None  # None: the value is there already


class RecordFiller:
    """Writes tensors to their records in `file` while its `with` lasts; at its end all of them are written.

    At most `queue_bytes` wait, or one larger tensor alone. What fails on the thread is raised by the next `put`, or at
    the end; a full disk as FluxIRError that names `path` and the file's whole size. After an exception inside the
    `with`, what still waits is dropped.
    """

    def __init__(self, file: FileIO, path: Path, *, queue_bytes: int = QUEUE_BYTES) -> None:
        self.file, self.path, self.queue_bytes = file, path, queue_bytes
        self._size = os.fstat(file.fileno()).st_size
        self._queue: deque[_Waiting] = deque()
        self._held_bytes = 0
        self._producer_waits = False
        self._failure: BaseException | None = None
        self._closing = False
        self._changed = Condition()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread = Thread(target=self._run, name="capture", daemon=True)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that wait to be written or are being written."""
        return self._held_bytes

    def put(self, record: Record, value: Tensor) -> None:
        """Hand a tensor over; waits while the queue is full. CPU tensors are not copied and must not change after."""
        with self._changed:
            while not self._fits(record.nbytes):
                self._producer_waits = True
                self._changed.notify_all()
                self._changed.wait()
            if self._failure:
                raise self._failure
            self._held_bytes += record.nbytes
        waiting = self._staged(record, value.detach())
        with self._changed:
            self._queue.append(waiting)
            if self._producer_waits or self._held_bytes >= BATCH_BYTES:
                self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        room = self._held_bytes == 0 or self._held_bytes + nbytes <= self.queue_bytes
        return room or self._failure is not None

    def _staged(self, record: Record, value: Tensor) -> _Waiting:
        """The value on its way to the CPU. From a GPU it is copied on a side stream: nobody waits for it here."""
        if value.device.type != "cuda":
            return _Waiting(record, value.cpu(), None)
        if value.device not in self._streams:
            self._streams[value.device] = torch.cuda.Stream(value.device)  # type: ignore[no-untyped-call]
        stream = self._streams[value.device]
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            # PyTorch keeps pinned memory for the next tensor of this size: few are ever allocated.
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            value.record_stream(stream)  # or its memory would be used again before it is copied
            return _Waiting(record, pinned, stream.record_event())

    def __enter__(self) -> "RecordFiller":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(drop=kind is not None)
        try:
            self._thread.join()
        except BaseException:  # Ctrl-C while the rest is being written
            self._close(drop=True)
            raise
        if kind is None and self._failure:
            raise self._failure

    def _close(self, *, drop: bool) -> None:
        with self._changed:
            self._closing = True
            if drop:
                self._queue.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            failure: BaseException | None = None
            try:
                if waiting.ready is not None:
                    waiting.ready.synchronize()
                self._write(waiting)
            except OSError as error:
                failure = disk_error(self.path, error, needed_bytes=self._size)
                failure.__cause__ = error
            except BaseException as error:  # noqa: BLE001 (raised in the thread that hands tensors over)
                failure = error
            nbytes = waiting.record.nbytes
            del waiting  # it must not outlive its place in the queue
            with self._changed:
                self._held_bytes -= nbytes
                self._failure = failure
                self._changed.notify_all()
            if failure is not None:
                return

    def _next(self) -> _Waiting | None:
        with self._changed:
            if not self._queue:
                self._producer_waits = False
                self._changed.wait_for(self._is_time)
            return self._queue.popleft() if self._queue else None

    def _is_time(self) -> bool:
        enough = self._producer_waits or self._held_bytes >= BATCH_BYTES
        return self._closing or (enough and len(self._queue) > 0)

    def _write(self, waiting: _Waiting) -> None:
        data = waiting.value.contiguous().view(torch.uint8).flatten().numpy().data
        self._write_at(waiting.record.offset, data)
        # Laid out as zero: a zip has it in its directory, and in the descriptor behind a record that has one.
        crc = zlib.crc32(data).to_bytes(4, "little")
        for offset in waiting.record.crc_offsets:
            self._write_at(offset, memoryview(crc))

    def _write_at(self, offset: int, data: memoryview) -> None:
        self.file.seek(offset)
        while data:  # one call writes 2 GiB at most
            data = data[self.file.write(data) :]
