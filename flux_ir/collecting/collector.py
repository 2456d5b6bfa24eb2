"""Collecting: every generation of a job computed once, by any number of processes, and never again.

A job has four parts: `verify` what is there, `encode` the prompts (and free the encoders), `record` what is missing,
`merge`. Each is an iterator that says how far it has come; `collect` is all of them in a row.

Bits never depend on who computes: groups and the batches in them are fixed slices of the work, and on a CPU each batch
is computed by one thread, on a copy of the network that shares its weights.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import NamedTuple

import torch

from flux_ir.collecting.batches import record_batch
from flux_ir.collecting.collection import (
    Collection,
    CollectSettings,
    check_same,
    publish_description,
    stored_description,
)
from flux_ir.collecting.embeddings import EmbeddedPrompt, encode_prompts, needs_encoding, read_embedding
from flux_ir.collecting.fitting import cpu_batch, gpu_batch
from flux_ir.collecting.groups import GROUP, Group, Row, Statistics, merge_statistics
from flux_ir.collecting.one_job import one_job_at
from flux_ir.collecting.prompts import WorkItem
from flux_ir.collecting.provenance import versions, weights_digest
from flux_ir.collecting.storage import Storage
from flux_ir.collecting.workers import borrowed, in_order, replicas
from flux_ir.collecting.writing import DrawnBatch, WrittenBatch, read_batch, write_batch
from flux_ir.distributed import Ranks, arrivals, first_rank_value
from flux_ir.errors import FluxIRError
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.suite import Suite
from flux_ir.models.transformer import Flux
from flux_ir.sampling.generate import decode

GPU_WRITERS = 4
"""Threads that write what one GPU records: rounding, checksums and statistics of a batch take longer than its copy."""


def collect(settings: CollectSettings, suite: Suite, storage: Storage, ranks: Ranks) -> Iterator[Row]:
    """All four parts: yields the row of every generation that this rank makes, and ends when the whole is complete.

    Raises FluxIRError for a folder that was collected with other settings, or where another job is at work: also one
    of this process, whose iterator is neither at its end nor closed.
    """
    with one_job_at(storage, ranks):
        job = Collector(settings, suite, storage, ranks)
        for _ in job.verify():
            pass
        for _ in job.encode():
            pass
        yield from job.record()
        for _ in job.merge():
            pass


class _Job(NamedTuple):
    """A batch to be made, or to be read again for its statistics where it is there."""

    group: Group
    items: list[WorkItem]
    is_last: bool
    """Whether the group is finished with it."""


class Collector:
    """One rank's share of a job. Its methods are called one after the other, in the order they stand here.

    Raises FluxIRError for a folder that was collected with other settings.
    """

    def __init__(self, settings: CollectSettings, suite: Suite, storage: Storage, ranks: Ranks) -> None:
        self.settings, self.suite, self.storage, self.ranks = settings, suite, storage, ranks
        self.recipe = settings.recipe
        self.device = torch.device(suite.placement.transformer)
        self.two_stages = self.device.type != "cpu"
        self.workers = GPU_WRITERS if self.two_stages else torch.get_num_threads()
        self._described = settings.described(device=self.device.type, weights=weights_digest(suite.source))
        stored = first_rank_value(stored_description(storage) if ranks.is_first else None, ranks)
        if stored is not None:
            check_same(storage, stored, self._described)
            self._described = stored["settings"]
        self.was_begun = self._is_described = stored is not None
        storage.clear_scratch(everyones=False)
        on_cpu = cpu_batch(self.recipe) if self.device.type == "cpu" else None
        self._begin(self._described["batch_size"] or on_cpu)
        self._open: list[int] = []
        self._to_encode: dict[str, None] = {}
        self.found, self.missing = 0, 0
        """Generations of this rank that were there, and that have to be made. Known after `verify`."""

    def _begin(self, batch_size: int | None) -> None:
        """Fix the batch size (None: not known yet, and until then nothing is there) and say what is collected."""
        self.collection = Collection(self.storage, self.settings, batch_size=batch_size or GROUP)
        self._described["batch_size"] = batch_size
        if batch_size is not None and not self._is_described and self.ranks.is_first:
            publish_description(self.storage, self.settings, self._described, versions=versions(self.device))
        self._is_described = batch_size is not None

    @property
    def groups(self) -> range:
        """The numbers of this rank's groups: dealt in turns."""
        return range(self.ranks.rank, self.collection.groups, self.ranks.world_size)

    @property
    def generations(self) -> int:
        """How many generations this rank has, finished or not."""
        return sum(min(GROUP, len(self.collection.work) - number * GROUP) for number in self.groups)

    def verify(self) -> Iterator[bool]:
        """Looks at what is there; yields whether it is intact, for each generation that counted as finished.

        Broken files are moved aside.
        """
        checksums = self.settings.verify == "checksums"
        for number in self.groups:
            group = self.collection.group(number)
            for is_intact in group.check(checksums=checksums, workers=max(2, self.workers)):
                self.found += is_intact
                yield is_intact
            missing = [item for batch in group.batches if not group.has(batch) for item in batch]
            self.missing += sum(item.id not in group.rows for item in missing)
            if not group.finished:
                self._open.append(number)
            self._look_at_prompts(group, {item.prompt for item in missing}, checksums=checksums)
        if self._open:
            self.collection.reopen()

    def _look_at_prompts(self, group: Group, needed: set[str], *, checksums: bool) -> None:
        prompts = list(dict.fromkeys(item.prompt for item in group.items))
        look = partial(needs_encoding, self.storage, needed=needed, checksums=checksums)
        for prompt, to_encode in zip(prompts, in_order(look, prompts, max(2, self.workers)), strict=True):
            if to_encode:
                self._to_encode[prompt] = None

    @property
    def open_generations(self) -> int:
        """How many generations `record` yields: all of the groups that are not finished."""
        return sum(len(self.collection.group(number)) for number in self._open)

    @property
    def prompts_to_encode(self) -> int:
        """How many prompts `encode` is going to encode."""
        return len(self._to_encode)

    def new_prompts(self, most: int) -> list[str]:
        """The first of those."""
        return list(islice(self._to_encode, most))

    def encode(self) -> Iterator[str]:
        """Encodes the prompts that this rank lacks, and frees the encoders; yields each when it is kept."""
        if not self._to_encode:
            return
        with self.suite.text_encoders() as encoders:
            yield from encode_prompts(encoders, list(self._to_encode), self.storage)
        self._to_encode = {}
        self.suite.free_text_encoders()

    def record(self) -> Iterator[Row]:
        """Makes what is missing; yields the row of every generation as it is finished, in the order of the work.

        In groups that were begun before, also the rows of those that were there.
        """
        with ExitStack() as loaded:
            model = loaded.enter_context(self.suite.transformer()) if self._needs_network() else None
            draws = self.settings.save_images and self.missing
            autoencoder = loaded.enter_context(self.suite.autoencoder()) if draws else None
            if not self._is_described:
                tried = gpu_batch(model, self.recipe) if model is not None and self.ranks.is_first else None
                self._begin(first_rank_value(tried, self.ranks))
            statistics: Statistics = {}
            for job, written in self._written(model, autoencoder):
                merge_statistics(statistics, written.statistics)
                yield from written.rows
                if job.is_last:
                    job.group.close(statistics)
                    statistics = {}

    def _needs_network(self) -> bool:
        # A batch size that is to be found by trying is found by rank 0, whatever its share is.
        return self.missing > 0 or (not self._is_described and self.ranks.is_first)

    def _written(self, model: Flux | None, autoencoder: AutoEncoder | None) -> Iterator[tuple[_Job, WrittenBatch]]:
        """Every batch of the open groups, in order."""
        if self.two_stages:
            # The GPU samples the next batch while threads write the last ones.
            networks = replicas(model, 1) if model else None
            with closing(in_order(partial(self._draw, networks, autoencoder), self._jobs(), 1)) as drawn:
                yield from in_order(self._write, drawn, self.workers)
            return
        networks = replicas(model, self.workers) if model else None

        def make(job: _Job) -> tuple[_Job, WrittenBatch]:
            return self._write(self._draw(networks, autoencoder, job))

        yield from in_order(make, self._jobs(), self.workers)

    def _jobs(self) -> Iterator[_Job]:
        for number in self._open:
            group = self.collection.group(number)
            group.load()
            for items in group.batches:
                yield _Job(group, list(items), is_last=items is group.batches[-1])

    def _draw(
        self, networks: "SimpleQueue[Flux] | None", autoencoder: AutoEncoder | None, job: _Job
    ) -> tuple[_Job, DrawnBatch | None]:
        """Samples and records a batch; nothing, if it is there."""
        if networks is None or job.group.has(job.items):
            return job, None
        embedded = [self._embedded(item.prompt) for item in job.items]
        with borrowed(networks) as network:
            recorded = record_batch(network, self.recipe, job.items, embedded)
        pixels = None
        if autoencoder is not None and recorded.latent is not None:
            pixels = decode(
                autoencoder, recorded.latent, self.recipe.height, self.recipe.width, self.recipe.network_dtype
            )
        if not self.settings.save_latents:
            recorded = recorded._replace(latent=None)
        return job, DrawnBatch(recorded, pixels)

    def _embedded(self, prompt: str) -> EmbeddedPrompt:
        embedded = read_embedding(self.storage, prompt)
        if embedded is None:
            raise FluxIRError(
                f"the embedding of {prompt[:40]!r} in {self.storage.where} is broken or gone",
                hint="the same command with --verify checksums makes it again",
            )
        return embedded

    def _write(self, made: tuple[_Job, DrawnBatch | None]) -> tuple[_Job, WrittenBatch]:
        job, drawn = made
        if drawn is None:
            return job, read_batch(job.group, self.recipe, job.items)
        return job, write_batch(job.group, self.recipe, drawn)

    def merge(self) -> Iterator[int]:
        """Waits for all ranks, then rank 0 writes the index and the statistics of the whole; yields merged groups."""
        for _ in arrivals("recorded", self.ranks):
            pass
        if self.ranks.is_first:
            yield from self.collection.merge()
            self.storage.clear_scratch(everyones=True)
        for _ in arrivals("merged", self.ranks):
            pass
