"""An old collection, a capture file for every generation, becomes one of shards: the bytes that collecting anew gives.

What the old files hold is taken as it is: values, states and embeddings are copied, statistics are summed again in the
order in which the collector sums them. A shard is complete or absent, so the same command goes on where it was stopped.
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from flux_ir.activations.shards import POSITIONS_KEY, scale_key, site_key, state_key
from flux_ir.collecting.collection import (
    COLLECTION,
    EXTRAS,
    INDEX,
    Collection,
    CollectSettings,
    Row,
    ShardWork,
    check_same,
    publish_description,
    stored_description,
)
from flux_ir.collecting.collector import OpenShard, WrittenBatch, open_shards
from flux_ir.collecting.prompts import WorkItem, prompts_digest
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.shard_notes import FileFacts, Statistics
from flux_ir.collecting.storage import Storage, one_job_at
from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.models.registry import get_spec
from flux_ir.recording.reader import load_capture
from flux_ir.sites import Site
from flux_ir.threads import in_order

OLD_VERSION = 1


class Conversion:
    """An old collection and the new one that comes of it.

    Raises FluxIRError for a folder that holds no old collection or an unfinished one, and for a new folder with other
    things in it.
    """

    def __init__(self, old: Storage, new: Storage) -> None:
        self.old, self.new = old, new
        described = _old_description(old)
        told = described["settings"]
        prompts = [row["prompt"] for number, row in enumerate(_old_rows(old)) if number % told["repeats"] == 0]
        if len(prompts) * told["repeats"] != described["generations"]:
            raise FluxIRError(
                f"an old collection must be complete: {INDEX} of {old.where} has fewer than its "
                f"{described['generations']} generations",
                hint="finish it with the program that made it, or collect anew",
            )
        if prompts_digest(prompts) != told["prompts"]["sha256"]:
            raise _changed(old)
        self.settings = _settings_of(told, prompts)
        self.collection = Collection(new, self.settings, batch_size=told["batch_size"])
        self._settings_as_kept = self.settings.described(device=told["device"], weights=told["weights"])
        self._versions = described["versions"]

    def run(self) -> Iterator[int]:
        """Converts, shard after shard; yields how many generations the new collection has by then."""
        with one_job_at(self.new, Ranks()):
            stored = stored_description(self.new)
            if stored is not None:
                check_same(self.new, stored, self._settings_as_kept)
            else:
                publish_description(self.new, self.settings, self._settings_as_kept, versions=self._versions)
            self.new.clear_scratch(everyones=True)
            for name in self.old.list("text"):
                if self.new.size(name) != self.old.size(name):
                    self.new.publish(self.old.read(name), name)
            done, rows = 0, _old_rows(self.old)
            for number in range(self.collection.shards):
                shard = self.collection.shard(number)
                self._convert(shard, list(islice(rows, len(shard.items))))
                done += len(shard.items)
                yield done
            for _ in self.collection.merge():
                pass
            self.new.clear_scratch(everyones=True)

    def _convert(self, shard: ShardWork, rows: list[Row]) -> None:
        if [row["id"] for row in rows] != [item.id for item in shard.items]:
            raise _changed(self.old)
        if self.collection.is_intact(shard, checksums=False):
            return
        with open_shards() as opened:
            opened.append(OpenShard(self.collection, shard, lambda: [row["used_txt"] for row in rows]))
            ends = list(accumulate(map(len, shard.batches)))
            spans = [range(end - len(batch), end) for end, batch in zip(ends, shard.batches, strict=True)]
            convert = partial(self._convert_batch, opened[0], rows)
            for written in in_order(convert, spans, torch.get_num_threads(), torch_threads=1):
                opened[0].note(written)
            opened[0].finish()

    def _convert_batch(self, shard: OpenShard, rows: list[Row], span: range) -> WrittenBatch:
        statistics: Statistics = {}
        extras: dict[str, list[FileFacts]] = {extra: [] for extra in self.settings.extras}
        for number in span:
            row, item = rows[number], shard.work.items[number]
            shard.write(number, _tensors(self._checked(row), self.settings.recipe), statistics)
            for extra in extras:
                content = self.old.read(self._checked(row[extra])["path"])
                self.new.publish(content, shard.work.extra_name(extra, item))
                extras[extra].append(FileFacts(row[extra]["bytes"], row[extra]["sha256"]))
        items: list[WorkItem] = [shard.work.items[number] for number in span]
        return WrittenBatch(shard, items, extras, statistics, is_last=span.stop == len(rows))

    def _checked(self, file: Row) -> Row:
        """The row of a file of the old collection, with its local path. Raises FluxIRError for a broken file."""
        try:
            intact = self.old.sha256(file["path"]) == file["sha256"]
        except FileNotFoundError:
            intact = False
        if not intact:
            raise FluxIRError(
                f"{file['path']} of {self.old.where} is broken or gone",
                hint="repair the old collection with the program that made it (flux-ir collect, before shards)",
            )
        return file | {"local": self.old.local(file["path"])}


def _tensors(row: Row, recipe: Recipe) -> dict[str, Tensor]:
    """What the capture file of one generation holds, by its keys in a shard."""
    capture = load_capture(row["local"])
    tensors: dict[str, Tensor] = {}
    if (kept := capture.img_positions) is not None:
        tensors[POSITIONS_KEY] = kept[None]
    for step in recipe.steps:
        tensors[state_key(step)] = capture.context(step).img
        for site in recipe.sites:
            values, scale = capture.read_stored(site, step)
            tensors[site_key(site, step)] = values
            if scale is not None:
                tensors[scale_key(site_key(site, step))] = scale
    return tensors


def _old_description(old: Storage) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads(old.read(COLLECTION))
        version = described["version"]
    except FileNotFoundError as error:
        raise FluxIRError(
            f"{old.where} must be a collection: it has no {COLLECTION}", hint="name the folder that holds it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FluxIRError(f"{COLLECTION} in {old.where} is broken: {error!r}", hint="restore it") from error
    if version != OLD_VERSION:
        raise FluxIRError(
            f"{old.where} must be an old collection, of version {OLD_VERSION}: it is of version {version}",
            hint="it needs no conversion" if version == 2 else None,
        )
    return described


def _old_rows(old: Storage) -> Iterator[Row]:
    """The rows of the index, one by one; none where there is no index."""
    try:
        with old.local(INDEX).open("rb") as lines:
            for line in lines:
                yield json.loads(line)
    except FileNotFoundError:
        return


def _changed(old: Storage) -> FluxIRError:
    return FluxIRError(
        f"{INDEX} of {old.where} must hold every generation that {COLLECTION} tells of, in order: it holds others",
        hint="restore the index, or collect anew",
    )


def _settings_of(told: dict[str, Any], prompts: list[str]) -> CollectSettings:
    extras = {extra: told[f"save_{extra}s"] for extra in EXTRAS}
    recipe = Recipe(
        spec=get_spec(told["model"]),
        width=told["width"],
        height=told["height"],
        num_steps=told["num_steps"],
        guidance=told["guidance"],
        sites=tuple(map(Site.parse, told["sites"])),
        steps=tuple(told["steps"]),
        stored_dtype=getattr(torch, told["dtype"]),
        network_dtype=getattr(torch, told["network_dtype"]),
        tokens_per_image=told["tokens_per_image"],
        to_the_end=any(extras.values()),
    )
    return CollectSettings(
        recipe,
        prompts,
        repeats=told["repeats"],
        seed=told["seed"],
        batch_size=told["batch_size"],
        save_images=extras["image"],
        save_latents=extras["latent"],
    )
