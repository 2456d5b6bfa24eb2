"""Short trials for `--plan`: a few forwards of the model itself, with everything that a run does to what it records."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from flux_ir.api.capture import Job, embed
from flux_ir.api.progress import unwatched
from flux_ir.api.room import Room
from flux_ir.collecting.batch_size import cpu_batch, gpu_batch
from flux_ir.collecting.collection import CollectSettings
from flux_ir.collecting.collector import Collector
from flux_ir.collecting.live import live_blocks
from flux_ir.collecting.recipe import recorded_bytes
from flux_ir.collecting.storage import LocalStorage, open_storage
from flux_ir.commands.report import bytes_at, peak_memory
from flux_ir.distributed import Ranks
from flux_ir.models.suite import Suite
from flux_ir.recording.plan import CapturePlan, capture_bytes
from flux_ir.recording.recorder import MemorySink, Recorder
from flux_ir.sampling.generate import decode, noise_for, prepare, sample

TRIAL_STEPS = 3
"""Forwards of a capture's trial; the first is not counted, for it wakes everything up."""
PROBE_BYTES = 32 * 2**20


class Pace(NamedTuple):
    """What a trial measured, per unit of work: a step of a capture, a generation of a collection."""

    once: dict[str, float]
    """Seconds of what is done once."""
    compute: float
    """Seconds of the network, per unit."""
    copy: float
    """Seconds of bringing values to the CPU, rounding, and checksums."""
    disk: float
    """Seconds of writing at the speed of the disk."""
    unit: float
    """Seconds per unit, with as much at the same time as there is at the same time."""
    memory: dict[str, int]
    """Peak bytes of each device, of the trial."""
    extras: dict[str, int]
    """Bytes in all of what was only measured: pictures."""

    def seconds(self, units: int) -> float:
        """How long the whole work takes."""
        return sum(self.once.values()) + units * self.unit

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "copy": self.copy, "disk": self.disk}
        return max(parts, key=lambda name: parts[name])


def measure_capture(job: Job, planned: CapturePlan, suite: Suite, room: Room, *, pictures: int) -> Pace:
    """Loads the model, encodes the prompt, runs a few steps with everything recorded, and decodes one picture."""
    with _timed() as load:
        for _ in suite.load():
            pass
    with _timed() as text_seconds:
        text = job.text or embed(suite, job.prompt, unwatched)
    noise = noise_for([job.seed], job.height, job.width, job.placement.transformer, job.compute.dtype)
    inputs = prepare(noise, text, job.height, job.width)
    sink, seconds, latent = MemorySink(), [0.0], inputs.img
    with suite.transformer() as model, Recorder(model, job.sites, sink, steps=[0]):
        begun = time.perf_counter()
        for step in islice(sample(model, inputs, job.timesteps, job.guidance), TRIAL_STEPS):
            latent = step.after
            _wait(latent.device)
            seconds.append(time.perf_counter() - begun)
    with _timed() as copying:
        for value in sink.values.values():
            value.cpu()
    later = len(seconds) > 2
    compute = (seconds[-1] - seconds[1]) / (len(seconds) - 2) if later else seconds[1]
    copy = copying.seconds if latent.device.type == "cuda" else 0.0
    disk = capture_bytes(planned) / len(planned.kept_steps) / disk_speed(room)
    with _timed() as decoding, suite.autoencoder() as autoencoder:
        decode(autoencoder, latent, job.height, job.width, suite.dtype)
    once = {"load": load.seconds, "text": text_seconds.seconds, "pictures": decoding.seconds * (1 + pictures)}
    kept = len(planned.kept_steps) / (len(job.timesteps) - 1)  # other steps are neither copied nor written
    unit = max(compute, copy * kept, disk * kept)
    return Pace(once, compute, copy * kept, disk * kept, unit, peak_memory(), {})


def measure_collection(settings: CollectSettings, suite: Suite, where: str, room: Room) -> Pace:
    """Collects a few batches twice: as a stream that is dropped, and into a folder that is deleted."""
    settings, first = _sample(settings, suite)
    generations = len(settings.prompts) * settings.repeats
    compute = _seconds_each(_generations(settings, suite), first)
    device = torch.device(suite.placement.transformer)
    copy = recorded_bytes(settings.recipe) / _copy_speed(device) if device.type == "cuda" else 0.0
    with tempfile.TemporaryDirectory(prefix=".flux_ir_plan_", dir=room.folder) as folder:
        job = Collector(settings, suite, LocalStorage(Path(folder)), Ranks())
        for _ in job.verify():
            pass
        prompts = max(1, job.prompts_to_encode)
        with _timed() as text:
            for _ in job.encode():
                pass
        whole = _seconds_each(job.record(), first)
        written = sum(bytes_at(path) for path in Path(folder).glob("shards/*"))
        drawn = sum(bytes_at(path) for path in Path(folder).glob("pictures/*/*"))
    disk = written / generations / disk_speed(room, where)
    copy += max(0.0, whole - compute)
    return Pace(
        {"text": text.seconds / prompts},
        compute,
        copy,
        disk,
        max(whole, disk),
        peak_memory(),
        {"pictures": drawn // generations} if drawn else {},
    )


def disk_speed(room: Room, where: str = "") -> float:
    """Bytes per second that the place takes, down to the platter; for a URL, that are uploaded."""
    data = os.urandom(PROBE_BYTES)
    if room.folder is None:
        storage = open_storage(where)
        with _timed() as writing:
            storage.publish(data, "partial/probe")
        storage.remove("partial/probe")
    else:
        with tempfile.TemporaryFile(dir=room.folder) as file, _timed() as writing:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return PROBE_BYTES / writing.seconds


def _sample(settings: CollectSettings, suite: Suite) -> tuple[CollectSettings, int]:
    """The beginning of the work: two rounds of a batch for each worker, where there are so many; and one round."""
    recipe = settings.recipe
    with suite.transformer() as model:
        on_cpu = model.img_in.weight.device.type == "cpu"
        size = settings.batch_size or (cpu_batch(recipe) if on_cpu else gpu_batch(model, recipe))
    first = size * (torch.get_num_threads() if on_cpu else 1)
    prompts = settings.prompts[: 2 * first]
    repeats = min(settings.repeats, -(-2 * first // len(prompts)))
    return replace(settings, prompts=prompts, repeats=repeats, batch_size=size), first


def _generations(settings: CollectSettings, suite: Suite) -> Iterator[str]:
    """The ids of a stream's generations, each as it is done."""
    last = (settings.recipe.steps[-1], settings.recipe.sites[-1])
    with ExitStack() as stack:
        blocks = live_blocks(settings, suite)
        stack.callback(getattr(blocks, "close", lambda: None))
        for block in blocks:
            if (block.step, block.site) == last:
                yield block.generation


def _seconds_each(done: Iterator[object], first: int) -> float:
    """Seconds for each, over those behind the first round; over all, if there is only one round."""
    begun, after_first, count = time.perf_counter(), 0.0, 0
    for _ in done:
        count += 1
        if count == first:
            after_first = time.perf_counter()
    ended = time.perf_counter()
    return (ended - after_first) / (count - first) if count > first else (ended - begun) / max(count, 1)


def _copy_speed(device: torch.device) -> float:
    value = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    pinned = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(value)
    _wait(device)
    with _timed() as copying:
        pinned.copy_(value, non_blocking=True)
        _wait(device)
    return PROBE_BYTES / copying.seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _timed:  # noqa: N801 (used like a function)
    """Measures the `with` block: `seconds`, afterwards."""

    seconds = 0.0

    def __enter__(self) -> "_timed":
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = max(time.perf_counter() - self._begun, 1e-9)
