"""The work of a collection: every generation computed once, by any number of processes, and never again.

A rank's share is five calls, which `api.collect` makes in this order:

    verify   what is there; shards are dealt to the ranks in turns
    encode   the prompts that lack an embedding, and free the encoders
    load     the network
    record   shard by shard what is missing: sample a batch -> write it into the shard's scratch file -> note it, and
             publish the shard with its last batch
    merge    the index and the statistics of the whole, by rank 0

Bits never depend on who computes: shards and the batches in them are fixed slices of the work, and on a CPU each batch
is computed by one thread, on a copy of the network that shares its weights. A batch is written as soon as it is
recorded, so memory holds batches and never shards.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from flux_ir.activations.shards import POSITIONS_KEY, ShardWriter, scale_key, site_key, state_key
from flux_ir.collecting.batches import (
    NO_PICTURES,
    RecordedBatch,
    RecordedGeneration,
    batches_under_way,
    borrowed,
    check_finite,
    cpu_batch,
    gpu_batch,
    record_batch,
    replicas,
    run_along,
)
from flux_ir.collecting.collection import (
    Collection,
    CollectSettings,
    ShardWork,
    check_same,
    publish_description,
    stored_description,
    versions_of,
    weights_digest,
)
from flux_ir.collecting.embeddings import (
    EmbeddedPrompt,
    encode_prompts,
    needs_encoding,
    read_embedding,
    read_used_txt,
)
from flux_ir.collecting.prompts import WorkItem
from flux_ir.collecting.recipe import Recipe, edited_text
from flux_ir.collecting.shard_notes import (
    FileFacts,
    ShardNotes,
    Statistics,
    facts_of,
    facts_of_path,
    merge_statistics,
)
from flux_ir.collecting.storage import Storage
from flux_ir.distributed import Ranks, all_max, arrivals, first_rank_value
from flux_ir.errors import FluxIRError
from flux_ir.files import disk_error
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.sharded import ShardedFlux, current_device
from flux_ir.models.split import SplitFlux
from flux_ir.models.suite import Suite
from flux_ir.recording.plan import ScaleOf, pieces_of_context, pieces_of_site, positions
from flux_ir.recording.statistics import SiteStatistics
from flux_ir.sampling.generate import decode
from flux_ir.sampling.image import jpeg_bytes
from flux_ir.sampling.latents import unpack
from flux_ir.sampling.pictures import EncodedPictures
from flux_ir.shapes import PackedLatent, Pixels
from flux_ir.threads import in_order

GPU_WRITERS = 4
"""Threads that write what one GPU records: rounding, checksums and statistics of a batch take longer than its copy."""
MOST_EXIF_BYTES = 60_000  # of a prompt: a JPEG's EXIF data hold 64 kB in all


class Collector:
    """One rank's share of a job. Its methods are called one after the other, in the order they stand here.

    Raises FluxIRError for a folder that was collected with other settings.
    """

    def __init__(self, settings: CollectSettings, suite: Suite, storage: Storage, ranks: Ranks) -> None:
        self.settings, self.suite, self.storage, self.ranks = settings, suite, storage, ranks
        self.recipe = settings.recipe
        self.device = torch.device(suite.placement.transformer)
        self.on_gpu = self.device.type != "cpu"
        self.workers = GPU_WRITERS if self.on_gpu else torch.get_num_threads()
        # Given pictures are encoded by the autoencoder, so what is recorded depends on it as well.
        given = bool(self.recipe.given.given())
        weights = weights_digest(suite.source, autoencoder=settings.save_images or given)
        self._settings_as_kept = settings.described(
            device=self.device.type, weights=weights, loras=suite.source.loras, quantize=suite.source.quantize
        )
        stored = first_rank_value(stored_description(storage) if ranks.is_first else None, ranks)
        if stored is not None:
            check_same(storage, stored, self._settings_as_kept)
            self._settings_as_kept = stored["settings"]
        self.was_begun = self._description_is_there = stored is not None
        storage.clear_scratch(everyones=False)
        on_cpu = cpu_batch(self.recipe) if self.device.type == "cpu" else None
        batch_size = self._settings_as_kept["batch_size"] or on_cpu
        if batch_size is None and suite.sharded_over > 1:
            raise FluxIRError(
                "on GPUs --fsdp needs a --batch_size: a rank that tries what fits would leave the others waiting",
                hint="--batch_size 4, for example",
            )
        self._begin(batch_size)
        self._missing_shards: list[int] = []
        self._to_encode: dict[str, None] = {}
        self.missing = 0
        """Generations of this rank that have to be made. Known after `verify`."""
        self._pictures: EncodedPictures | None = None
        self._needs_network = False  # of the work, or because another rank does and all run it together

    def _begin(self, batch_size: int | None) -> None:
        """Fix the batch size, and say in the folder what is collected.

        None: it is found by `load`, before the first batch. Until then no collection.json is written, and the batches
        of `collection` are not those that will be computed.
        """
        self.collection = Collection(self.storage, self.settings, batch_size=batch_size or self.settings.shard_images)
        self._settings_as_kept["batch_size"] = batch_size
        if batch_size is not None and not self._description_is_there and self.ranks.is_first:
            publish_description(self.storage, self.settings, self._settings_as_kept, versions=versions_of(self.device))
        self._description_is_there = batch_size is not None

    @property
    def shards(self) -> range:
        """The numbers of this rank's shards: dealt in turns."""
        return range(self.ranks.rank, self.collection.shards, self.ranks.world_size)

    def verify(self) -> Iterator[bool]:
        """Looks at what is there; yields whether it is there and intact, for each of this rank's shards.

        Broken files are moved aside.
        """
        checksums = self.settings.verify == "checksums"
        workers = max(2, self.workers)
        shards = map(self.collection.shard, self.shards)
        look = partial(self._look_at, checksums=checksums)
        for shard, intact in in_order(look, shards, workers, torch_threads=1):
            if not intact:
                self._missing_shards.append(shard.number)
                self.missing += len(shard.items)
            prompts = list(dict.fromkeys(item.prompt for item in shard.items))
            # An intact shard needs no embeddings any more: they may be gone (they take much space), but not broken.
            needed = set() if intact else set(prompts)
            needs = partial(needs_encoding, self.storage, needed=needed, checksums=checksums)
            for prompt, to_encode in zip(prompts, in_order(needs, prompts, workers, torch_threads=1), strict=True):
                if to_encode:
                    self._to_encode[prompt] = None
            yield intact
        if self._missing_shards:
            self.collection.remove_index()
        self._needs_network = bool(all_max(self.missing, self.ranks) if self.suite.sharded_over > 1 else self.missing)

    def _look_at(self, shard: ShardWork, *, checksums: bool) -> tuple[ShardWork, bool]:
        return shard, self.collection.is_intact(shard, checksums=checksums)

    @property
    def prompts_to_encode(self) -> int:
        """How many prompts `encode` is going to encode."""
        return len(self._to_encode)

    def new_prompts(self, most: int) -> list[str]:
        """The first ones that `encode` is going to encode, at most so many."""
        return list(islice(self._to_encode, most))

    def encode(self) -> Iterator[str]:
        """Encodes the prompts that this rank lacks, and frees the encoders; yields each when it is kept."""
        if not self._to_encode:
            return
        with self.suite.text_encoders() as encoders, edited_text(self.recipe, encoders):
            yield from encode_prompts(encoders, list(self._to_encode), self.storage, self.recipe.text_sites)
        self._to_encode = {}
        self.suite.free_text_encoders()

    def load(self) -> None:
        """Loads what `record` runs, and finds by trying how many generations go together where nobody says it."""
        if self._needs_network:
            self.suite.load_part("transformer")
        if self.missing and self.settings.save_images:
            self.suite.load_part("autoencoder")
        if self._needs_network and self._pictures is None:
            self._pictures = self._encoded_pictures()
        if not self._description_is_there:
            # Rank 0 tries for all, whatever its share is: batches, and so bits, must not depend on the rank.
            tried = None
            if self.ranks.is_first:
                with self._networks() as networks:  # with the autoencoder: both are on the GPU while recording
                    tried = gpu_batch(networks[0], self.recipe, self._pictures or NO_PICTURES)
            self._begin(first_rank_value(tried, self.ranks))

    def _encoded_pictures(self) -> EncodedPictures:
        """The latents of the pictures that every generation is given."""
        given = self.recipe.given
        if not given.given():
            return NO_PICTURES
        with self.suite.autoencoder() as autoencoder:
            return given.encoded(autoencoder, self.recipe.timesteps)

    def record(self) -> Iterator[WorkItem]:
        """Makes the shards that are missing; yields every generation as it is recorded, in the order of the work.

        The last of a shard is yielded when the shard is there. Raises FluxIRError for values that are not finite: they
        are never kept.
        """
        self.load()  # what `load` has loaded already costs nothing
        if not self._needs_network:
            return
        shards = [self.collection.shard(number) for number in self._missing_shards]
        along = self._batches_of_others(shards)
        with self._networks() as networks, closing(self._written(*networks, shards)) as batches:
            for written in batches:
                written.shard.note(written)
                if written.is_last:
                    written.shard.finish()
                yield from written.items
            for _ in range(along):
                with current_device(self.device):
                    run_along(networks[0], self.recipe, self._pictures or NO_PICTURES)

    def _batches_of_others(self, shards: Sequence[ShardWork]) -> int:
        """How many batches this rank runs along with others where a sharded network is in step: until the rank that has
        most of them is done. All batches make the same forwards, for their recipe is the same.
        """
        if self.suite.sharded_over == 1:
            return 0
        own = sum(len(shard.batches) for shard in shards)
        return all_max(own, self.ranks) - own

    @contextmanager
    def _networks(self) -> Iterator[tuple[Transformer, AutoEncoder | None]]:
        """The transformer, and the autoencoder where pictures are kept, on their devices."""
        with ExitStack() as loaded:
            model = loaded.enter_context(self.suite.transformer())
            decodes = self.settings.save_images and self.missing
            yield model, loaded.enter_context(self.suite.autoencoder()) if decodes else None

    def _written(
        self, model: Transformer, autoencoder: AutoEncoder | None, shards: Iterable[ShardWork]
    ) -> "Generator[WrittenBatch, None, None]":
        """Every batch of these shards, in order, once it is in its shard's scratch file."""
        under_way = batches_under_way(model)
        networks = replicas(model, under_way)
        sample = partial(self._sample, networks, autoencoder)
        with ExitStack() as stack:
            batches = self._batches(shards, stack.enter_context(open_shards()))
            if self.on_gpu or isinstance(model, SplitFlux | ShardedFlux):
                # One thread keeps the GPU busy with the next batch while others write the last ones. It does not wait
                # where a shard ends: batches of the next one follow at once. For blocks on several devices there is a
                # thread, and so a batch, for each device.
                sampled = stack.enter_context(closing(in_order(sample, batches, under_way, torch_threads=1)))
                yield from in_order(self._write, sampled, self.workers, torch_threads=1)
            else:
                # A CPU's threads do all of a batch, side by side: on one thread each, so its bits do not depend on how
                # many there are.
                yield from in_order(lambda batch: self._write(sample(batch)), batches, self.workers, torch_threads=1)

    def _batches(self, shards: Iterable[ShardWork], opened: "list[OpenShard]") -> "Iterator[_ShardBatch]":
        """The batches to record. Puts the shards that they are written to into `opened`, whose owner drops them if the
        work is cut short; several are open at once, because writing lags behind sampling.
        """
        for shard in shards:
            opened[:] = [each for each in opened if not each.is_finished]  # the notes of finished ones are let go
            opened.append(OpenShard(self.collection, shard, partial(self._used_txt, shard)))
            first = 0
            for items in shard.batches:
                yield _ShardBatch(opened[-1], first, list(items), is_last=items is shard.batches[-1])
                first += len(items)

    def _sample(
        self, networks: "SimpleQueue[Transformer]", autoencoder: AutoEncoder | None, batch: "_ShardBatch"
    ) -> "_Sampled":
        """Samples and records a batch, and decodes its pictures where they are kept."""
        embedded = [self._embedded(item.prompt) for item in batch.items]
        with borrowed(networks) as network, current_device(self.device):
            recorded = record_batch(network, self.recipe, batch.items, embedded, self._pictures or NO_PICTURES)
        pixels = None
        if autoencoder is not None and recorded.latent is not None:
            height, width, dtype = self.recipe.height, self.recipe.width, self.recipe.network_dtype
            pixels = decode(autoencoder, recorded.latent, height, width, dtype)
        return _Sampled(batch, recorded, pixels)

    def _embedded(self, prompt: str) -> EmbeddedPrompt:
        embedded = read_embedding(self.storage, prompt)
        if embedded is None:
            raise _broken_embedding(self.storage, prompt)
        return embedded

    def _used_txt(self, shard: ShardWork) -> list[int]:
        """For each generation of the shard, how many of its text tokens are the prompt's and not padding."""
        used: dict[str, int] = {}
        for prompt in dict.fromkeys(item.prompt for item in shard.items):
            tokens = read_used_txt(self.storage, prompt)
            if tokens is None:
                raise _broken_embedding(self.storage, prompt)
            used[prompt] = tokens
        return [used[item.prompt] for item in shard.items]

    def _write(self, sampled: "_Sampled") -> "WrittenBatch":
        """Rounds what was recorded into the shard's scratch file, and sums its statistics.

        Pictures and latents are published at once: they lie there before the shard does.
        """
        batch, recorded = sampled.batch, sampled.recorded
        check_finite(self.recipe, recorded)
        statistics: Statistics = {}
        extras: dict[str, list[FileFacts]] = {extra: [] for extra in self.settings.extras}
        for number, generation in enumerate(recorded.generations()):
            batch.shard.write(batch.first_row + number, _kept_tensors(self.recipe, generation), statistics)
            for extra in extras:
                content = self._extra_content(extra, generation, sampled.pixels, number)
                self.storage.publish(content, batch.shard.work.extra_name(extra, generation.item))
                extras[extra].append(facts_of(content))
        return WrittenBatch(batch.shard, batch.items, extras, statistics, batch.is_last)

    def _extra_content(self, extra: str, generation: RecordedGeneration, pixels: Pixels | None, number: int) -> bytes:
        if extra == "image":
            assert pixels is not None
            prompt = generation.item.prompt
            short = prompt if len(prompt.encode()) <= MOST_EXIF_BYTES else None  # the index has those that are longer
            return jpeg_bytes(pixels, number, model=self.recipe.spec.name, prompt=short)
        assert generation.latent is not None
        return latent_content(self.recipe, generation.latent)

    def merge(self) -> Iterator[int]:
        """Waits for all ranks, then rank 0 writes the index and the statistics of the whole; yields merged shards."""
        for _ in arrivals("recorded", self.ranks):
            pass
        if self.ranks.is_first:
            yield from self.collection.merge()
            self.storage.clear_scratch(everyones=True)
        for _ in arrivals("merged", self.ranks):
            pass


class _ShardBatch(NamedTuple):
    """A batch to be sampled and written, and where it belongs in its shard."""

    shard: "OpenShard"
    first_row: int
    items: list[WorkItem]
    is_last: bool
    """Whether the shard is whole with it."""


class _Sampled(NamedTuple):
    """A recorded batch, and the pictures of it where they are asked for."""

    batch: _ShardBatch
    recorded: RecordedBatch
    pixels: Pixels | None


class WrittenBatch(NamedTuple):
    """A batch that is in its shard's scratch file, and what is noted of it."""

    shard: "OpenShard"
    items: list[WorkItem]
    extras: dict[str, list[FileFacts]]
    statistics: Statistics
    is_last: bool


class OpenShard:
    """A shard that is being written into a scratch file. Several threads may write different generations.

    `work` says which generations belong into it. `used_txt` is called when the file is laid out: it gives, for each of
    them, how many text tokens are the prompt's.
    """

    def __init__(self, collection: Collection, work: ShardWork, used_txt: Callable[[], list[int]]) -> None:
        self.collection, self.work = collection, work
        self.storage, self.recipe = collection.storage, collection.settings.recipe
        self.is_finished = False
        self._find_used_txt = used_txt
        self._used_txt: list[int] = []
        self._extras: dict[str, list[FileFacts]] = {extra: [] for extra in collection.settings.extras}
        self._statistics: Statistics = {}
        self._writer: ShardWriter | None = None
        self._lock = Lock()

    def write(self, row: int, tensors: Mapping[str, Tensor], statistics: Statistics) -> None:
        """Writes what is kept of one generation, [1, ...] by its keys in the shard, and counts it in `statistics`."""
        writer = self._opened()
        for key, tensor in tensors.items():
            try:
                writer.write(key, row, tensor)
            except OSError as error:
                raise disk_error(writer.path, error) from error
        for step, site in self.recipe.steps_and_sites:
            key = site_key(site, step)
            sums = statistics.setdefault(key, SiteStatistics(tensors[key].shape[-1]))
            sums.add(tensors[key], tensors.get(scale_key(key)))

    def _opened(self) -> ShardWriter:
        """The file, laid out by the first thread that writes."""
        # The header stands first in the file and is known before any tensor, for prompts are encoded before. So batches
        # go to their places as they come, from any thread, and memory stays flat: 912 MB after 10 prompts, 923 MB after
        # 200 (flux-tiny).
        with self._lock:
            if self._writer is None:
                self._used_txt = self._find_used_txt()
                path = self.storage.scratch(".safetensors")
                try:
                    self._writer = ShardWriter(path, self.work.layout(self.recipe, self._used_txt))
                except OSError as error:
                    raise disk_error(path, error) from error
            return self._writer

    def note(self, batch: WrittenBatch) -> None:
        """Notes a batch that is written. Called in the order of the batches, on which the statistics' bits depend."""
        merge_statistics(self._statistics, batch.statistics)
        for extra, facts in batch.extras.items():
            self._extras[extra] += facts

    def finish(self) -> None:
        """Every batch is written and noted: publishes the shard."""
        writer = self._opened()
        writer.close()
        notes = ShardNotes(facts_of_path(writer.path), self._used_txt, self._extras, self._statistics)
        self.collection.publish(self.work, writer.path, notes)
        self.is_finished = True

    def drop(self) -> None:
        """Deletes the scratch file, unless the shard is published."""
        if not self.is_finished and self._writer is not None:
            self._writer.close()
            self._writer.path.unlink(missing_ok=True)


@contextmanager
def open_shards() -> Iterator[list[OpenShard]]:
    """A list of the shards that are being written; those that are not whole at the end are dropped."""
    shards: list[OpenShard] = []
    try:
        yield shards
    finally:
        for shard in shards:
            shard.drop()


def _kept_tensors(recipe: Recipe, generation: RecordedGeneration) -> dict[str, Tensor]:
    """What is kept of one generation, as it is rounded and with the tokens that are kept, by its keys in a shard."""
    plan = recipe.plan(generation.item)
    tensors: dict[str, Tensor] = {}
    if (kept := positions(plan)) is not None:
        tensors[POSITIONS_KEY] = kept[None]
    for step, context in generation.contexts.items():
        tensors[state_key(step)] = pieces_of_context(plan, step, context)[0].value
    for (site_step, site), value in generation.values.items():  # a layer of a text encoder has no step: None
        pieces = {piece.of: piece.value for piece in pieces_of_site(plan, site_step, site, value)}
        tensors[site_key(site, site_step)] = pieces[site]
        if (scale := pieces.get(ScaleOf(site))) is not None:
            tensors[scale_key(site_key(site, site_step))] = scale
    return tensors


def latent_content(recipe: Recipe, latent: PackedLatent) -> bytes:
    """The file of a finished latent: it has the same size for every generation."""
    unpacked = unpack(latent, recipe.height, recipe.width)[0]
    return safetensors.torch.save({"latent": unpacked.contiguous()})


def _broken_embedding(storage: Storage, prompt: str) -> FluxIRError:
    return FluxIRError(
        f"the embedding of {prompt[:40]!r} in {storage.where} is broken or gone",
        hint="the same command with --verify checksums makes it again",
    )
