"""Fills the records of a laid-out file on a thread of its own, while the network computes the next block.

Waiting tensors are bounded in bytes, so a disk slower than the network slows the network down and never fills memory.
"""

import os
import zlib
from collections import deque
from io import FileIO
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.files import disk_error
from flux_ir.recording.archive import Record

QUEUE_BYTES = 256 * 2**20
# The thread sleeps until so much waits: waking it for every tensor of a small network would cost more than it writes.
BATCH_BYTES = 2**20


class _Job(NamedTuple):
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
        self._jobs: deque[_Job] = deque()
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
        job = self._staged(record, value.detach())
        with self._changed:
            self._jobs.append(job)
            if self._producer_waits or self._held_bytes >= BATCH_BYTES:
                self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        room = self._held_bytes == 0 or self._held_bytes + nbytes <= self.queue_bytes
        return room or self._failure is not None

    def _staged(self, record: Record, value: Tensor) -> _Job:
        """The value on its way to the CPU. From a GPU it is copied on a side stream: nobody waits for it here."""
        if value.device.type != "cuda":
            return _Job(record, value.cpu(), None)
        if value.device not in self._streams:
            self._streams[value.device] = torch.cuda.Stream(value.device)  # type: ignore[no-untyped-call]
        stream = self._streams[value.device]
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            # PyTorch keeps pinned memory for the next tensor of this size: few are ever allocated.
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            pinned.copy_(value, non_blocking=True)
            value.record_stream(stream)  # or its memory would be used again before it is copied
            return _Job(record, pinned, stream.record_event())

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
                self._jobs.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            failure: BaseException | None = None
            try:
                if job.ready is not None:
                    job.ready.synchronize()
                self._write(job)
            except OSError as error:
                failure = disk_error(self.path, error, needed_bytes=self._size)
                failure.__cause__ = error
            except BaseException as error:  # noqa: BLE001 (raised in the thread that hands tensors over)
                failure = error
            nbytes = job.record.nbytes
            del job  # it must not outlive its place in the queue
            with self._changed:
                self._held_bytes -= nbytes
                self._failure = failure
                self._changed.notify_all()
            if failure is not None:
                return

    def _next_job(self) -> _Job | None:
        with self._changed:
            if not self._jobs:
                self._producer_waits = False
                self._changed.wait_for(self._is_time)
            return self._jobs.popleft() if self._jobs else None

    def _is_time(self) -> bool:
        enough = self._producer_waits or self._held_bytes >= BATCH_BYTES
        return self._closing or (enough and len(self._jobs) > 0)

    def _write(self, job: _Job) -> None:
        data = job.value.contiguous().view(torch.uint8).flatten().numpy().data
        self._write_at(job.record.offset, data)
        crc = zlib.crc32(data).to_bytes(4, "little")
        for offset in job.record.crc_offsets:
            self._write_at(offset, memoryview(crc))

    def _write_at(self, offset: int, data: memoryview) -> None:
        self.file.seek(offset)
        while data:  # one call writes 2 GiB at most
            data = data[self.file.write(data) :]
