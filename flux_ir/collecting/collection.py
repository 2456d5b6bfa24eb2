"""A collection: a folder of shards, all made with one set of settings, that can always be gone on with.

    collection.json                 everything that the bits of its files depend on
    index.jsonl                     a row per generation; where it is, the collection is complete
    stats.safetensors, .sha256      statistics of every site and step, over all generations
    shards/000012.safetensors       a fixed run of generations, complete or absent: see `activations.shards`
    stats/000012.safetensors        the notes of each shard: checksum, statistics, and what the index needs besides
    pictures/000012/{id}.jpg        the pictures of a shard's generations, where they are kept
    latents/000012/{id}.safetensors their finished latents, likewise
    text/ab/{sha256}.safetensors    embedded prompts
    broken/                         files that were found broken and made again

Everything of a shard is published before the shard itself, so where a shard is, its files are. Files are a function of
the settings: how many processes or threads made them, and how often they were interrupted, changes no byte.
Next: `collector`, which does the work.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from flux_ir.activations.shard_source import STATISTICS
from flux_ir.activations.shards import SHARD_IMAGES, ShardLayout, images_per_shard
from flux_ir.collecting.batches import batches_of
from flux_ir.collecting.prompts import WorkItem, WorkList, prompts_digest
from flux_ir.collecting.recipe import Recipe
from flux_ir.collecting.shard_notes import (
    ShardNotes,
    Statistics,
    facts_of_path,
    file_is_intact,
    files_digest,
    merge_statistics,
    notes_content,
    notes_name,
    read_notes,
    shard_name,
)
from flux_ir.collecting.storage import Storage, move_aside
from flux_ir.errors import FluxIRError
from flux_ir.files import versions
from flux_ir.models.checkpoints.locate import ModelSource
from flux_ir.models.checkpoints.lora.read import LoRA
from flux_ir.models.quantisation import CODES_VERSION, Method
from flux_ir.recording.statistics import write_statistics

COLLECTION, INDEX, CHECKSUM = "collection.json", "index.jsonl", "stats.sha256"
VERSION = 2
"""The version of the folder's layout. Version 1 had a capture file for every generation."""

EXTRAS = {"image": ("pictures", ".jpg"), "latent": ("latents", ".safetensors")}
"""What may be kept of a generation besides its shard, each in a folder of its own."""

Row = dict[str, Any]


@dataclass(frozen=True)
class CollectSettings:
    """What is to be collected: of which prompts, how often, and what is kept besides the shards."""

    recipe: Recipe
    prompts: Sequence[str]
    repeats: int = 1
    seed: int = 0
    batch_size: int | None = None
    """Generations that go through the network together; None: chosen for the device."""
    save_images: bool = False
    save_latents: bool = False
    verify: Literal["checksums", "sizes"] = "checksums"
    """How files that are there already are looked at."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and not 1 <= self.batch_size <= SHARD_IMAGES:
            raise FluxIRError(f"--batch_size must be from 1 to {SHARD_IMAGES}: got {self.batch_size}", hint="try 8")

    @property
    def extras(self) -> list[str]:
        """Which of `EXTRAS` every generation leaves."""
        return [extra for extra, kept in (("image", self.save_images), ("latent", self.save_latents)) if kept]

    @property
    def shard_images(self) -> int:
        """Generations of a shard; the last may have fewer."""
        return images_per_shard(self.recipe.generation_bytes)

    def described(
        self, *, device: str, weights: str, loras: Sequence[LoRA] = (), quantize: Method | None = None
    ) -> dict[str, Any]:
        """The settings as `collection.json` keeps them: all that the bits of the files depend on, by names of flags.

        `device` is its kind; `weights` stands for the content of the model's files, `loras` and `quantize` included.
        """
        recipe, edits = self.recipe, self.recipe.edits
        more: dict[str, Any] = {} if edits is None else {"edits": edits.described(with_strength=True)}
        more |= recipe.given.identity()
        if loras:
            more["loras"] = [lora.to_json() for lora in loras]
        if recipe.compiled:
            more["compile"] = True
        if recipe.attention != "auto":
            more["attention"] = recipe.attention
        if quantize is not None:
            more["quantize"] = quantize
        return {
            "model": recipe.spec.name,
            "weights": weights,
            "prompts": {"count": len(self.prompts), "sha256": prompts_digest(self.prompts)},
            "repeats": self.repeats,
            "seed": self.seed,
            "width": recipe.width,
            "height": recipe.height,
            "num_steps": recipe.num_steps,
            "guidance": recipe.guidance,
            "sites": [str(site) for site in (*recipe.text_sites, *recipe.sites)],
            "steps": list(recipe.steps),
            "dtype": str(recipe.network_dtype).removeprefix("torch."),
            "store_dtype": str(recipe.stored_dtype).removeprefix("torch."),
            "tokens_per_image": recipe.tokens_per_image,
            "save_images": self.save_images,
            "save_latents": self.save_latents,
            "device": device,
            "batch_size": self.batch_size,
        } | more


class ShardWork(NamedTuple):
    """One shard of a collection as work: its generations, in the batches they are computed in."""

    number: int
    items: Sequence[WorkItem]
    batches: Sequence[Sequence[WorkItem]]

    @property
    def name(self) -> str:
        """The name of the shard's file in the collection."""
        return shard_name(self.number)

    def layout(self, recipe: Recipe, used_txt: Sequence[int]) -> ShardLayout:
        """What its file holds; `used_txt` has an entry per generation."""
        rows: dict[str, Sequence[Any]] = {
            "ids": [item.id for item in self.items],
            "prompts": [item.prompt for item in self.items],
            "seeds": [item.seed for item in self.items],
            "repeats": [item.repeat for item in self.items],
            "used_txt": used_txt,
        }
        facts = {
            "model": recipe.spec.name,
            "txt_tokens": recipe.spec.text_tokens,
            "sites": [str(site) for site in (*recipe.text_sites, *recipe.sites)],
            "steps": list(recipe.steps),
            "width": recipe.width,
            "height": recipe.height,
        }
        return ShardLayout(recipe.tensors(len(self.items)), rows, facts)

    def extra_name(self, extra: str, item: WorkItem) -> str:
        """The name of a generation's picture or latent."""
        folder, suffix = EXTRAS[extra]
        return f"{folder}/{self.number:06d}/{item.id}{suffix}"


class Collection:
    """The folder of a collection and the work that belongs into it, cut into shards, and these into batches."""

    def __init__(self, storage: Storage, settings: CollectSettings, *, batch_size: int) -> None:
        self.storage, self.settings, self.batch_size = storage, settings, batch_size
        self.work = WorkList(settings.prompts, repeats=settings.repeats, seed=settings.seed)
        self.shard_images = settings.shard_images
        self.shards = -(-len(self.work) // self.shard_images)

    def shard(self, number: int) -> ShardWork:
        """One shard's work: a function of the settings and the number alone."""
        items = self.work.items(number * self.shard_images, (number + 1) * self.shard_images)
        return ShardWork(number, items, batches_of(items, self.batch_size))

    def has(self, shard: ShardWork) -> bool:
        """Whether the shard's file is there."""
        return self.storage.exists(shard.name)

    def remove_index(self) -> None:
        """Removes the index, which would say that the collection is complete: something has to be made again."""
        self.storage.remove(INDEX)

    def publish(self, shard: ShardWork, path: Path, notes: ShardNotes) -> None:
        """The notes first, then the shard at `path` under its name: where a shard is, all that belongs to it is."""
        self.storage.publish(notes_content(notes), notes_name(shard.number))
        self.storage.publish(path, shard.name)

    def is_intact(self, shard: ShardWork, *, checksums: bool) -> bool:
        """Whether the shard and everything that belongs to it is as it was written. Broken files are moved aside."""
        notes = read_notes(self.storage, shard.number)
        if notes is None:
            if self.storage.exists(notes_name(shard.number)):
                move_aside(self.storage, notes_name(shard.number))
            return False
        files = {shard.name: notes.file}
        for extra in self.settings.extras:
            each = zip(shard.items, notes.extras.get(extra, []), strict=False)
            files |= {shard.extra_name(extra, item): facts for item, facts in each}
        complete = len(files) == 1 + len(self.settings.extras) * len(shard.items)
        broken = [
            name for name, facts in files.items() if not file_is_intact(self.storage, name, facts, checksums=checksums)
        ]
        return complete and not broken

    def rows(self, shard: ShardWork, notes: ShardNotes) -> Iterator[Row]:
        """The rows of a shard's generations in the index."""
        for number, item in enumerate(shard.items):
            row = {**item._asdict(), "shard": shard.name, "row": number, "used_txt": notes.used_txt[number]}
            for extra in self.settings.extras:
                facts = notes.extras[extra][number]
                row[extra] = {"path": shard.extra_name(extra, item), **facts._asdict()}
            yield row

    def merge(self) -> Iterator[int]:
        """Write the index and the statistics of the whole, shard after shard; yields how many are merged.

        Raises FluxIRError if a shard is not finished.
        """
        statistics: Statistics = {}
        path = self.storage.scratch(".jsonl")
        with path.open("wb") as index:
            for number in range(self.shards):
                shard = self.shard(number)
                notes = read_notes(self.storage, number)
                if notes is None or not self.has(shard):
                    raise FluxIRError(
                        f"{shard.name} of {self.storage.where} is not finished",
                        hint="all processes must see the same folder; the same command goes on from here",
                    )
                index.write(as_lines(self.rows(shard, notes)))
                merge_statistics(statistics, notes.statistics)
                yield number + 1
        publish_statistics(self.storage, statistics)
        self.storage.publish(path, INDEX)


def publish_statistics(storage: Storage, statistics: Statistics) -> None:
    """Write the statistics of the whole, and beside them their checksum as the program sha256sum checks it."""
    path = storage.scratch(".safetensors")
    write_statistics(path, statistics)
    facts = facts_of_path(path)
    storage.publish(path, STATISTICS)
    storage.publish(f"{facts.sha256}  {STATISTICS}\n".encode(), CHECKSUM)


def as_lines(rows: Iterable[Row]) -> bytes:
    """Rows as JSON Lines."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def read_index(storage: Storage) -> Iterator[Row]:
    """The rows of a complete collection. Raises FileNotFoundError for another."""
    with storage.local(INDEX).open("rb") as lines:
        for line in lines:
            yield json.loads(line)


# ---- collection.json: with which settings it was collected


def stored_description(storage: Storage) -> dict[str, Any] | None:
    """What `collection.json` says; None where there is none. Raises FluxIRError for a broken or an old one."""
    try:
        described = json.loads(storage.read(COLLECTION))
        if described["version"] == 1:
            raise FluxIRError(
                f"{storage.where} is an old collection, with a file for every generation (version 1): "
                f"this program makes shards (version {VERSION})",
                hint=f"convert it: flux-ir convert-collection --captures {storage.where} --output_dir NEW",
            )
        if described["version"] != VERSION:
            raise FluxIRError(
                f"{storage.where} is a collection of version {described['version']}: this program knows {VERSION}",
                hint="use the program that made it, or another --output_dir",
            )
        dict(described["settings"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise FluxIRError(
            f"{COLLECTION} in {storage.where} must say what was collected: {error!r}",
            hint="it is broken: use another --output_dir, or restore it",
        ) from error
    return described


def check_same(storage: Storage, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises FluxIRError that shows every difference, if the folder was collected with other settings than these.

    A batch size of None agrees with any.
    """
    before = stored["settings"]
    keys = [key for key in {**before, **settings} if key != "batch_size" or settings.get("batch_size") is not None]
    differences = [
        f"{key} {_in_words(key, before.get(key))} there, {_in_words(key, settings.get(key))} now"
        for key in keys
        if _content(key, before.get(key)) != _content(key, settings.get(key))
    ]
    if differences:
        raise FluxIRError(
            f"{storage.where} was collected with other settings: {'; '.join(differences)}",
            hint="give the same settings to go on with it, or another --output_dir",
        )


def _content(key: str, value: Any) -> Any:
    """What of a setting the bits of the files depend on: of a LoRA, not where its file lies."""
    return [{**lora, "path": None} for lora in value] if key == "loras" and value else value


def _in_words(key: str, value: Any) -> str:
    if key == "loras" and value:
        return ",".join(f"{lora['path']} at {lora['strength']:g}" for lora in value)
    if key == "prompts" and isinstance(value, dict):
        return f"{value.get('count')} (sha256 {str(value.get('sha256'))[:8]})"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def publish_description(
    storage: Storage, settings: CollectSettings, described: dict[str, Any], *, versions: dict[str, str]
) -> None:
    """Write `collection.json`: the settings, and what a reader wants to know of the model besides."""
    recipe, generations = settings.recipe, len(settings.prompts) * settings.repeats
    value = {
        "version": VERSION,
        "kind": "flux",
        "settings": described,
        "generations": generations,
        "images_per_shard": settings.shard_images,
        "shards": -(-generations // settings.shard_images),
        "model": asdict(recipe.spec.flux),
        "txt_tokens": recipe.spec.text_tokens,
        "img_tokens": recipe.img_tokens,
        "kept_img_tokens": recipe.plan().kept_img_tokens,
        "timesteps": recipe.timesteps,
        "versions": versions,
    }
    publish_json(storage, value, COLLECTION)


def publish_json(storage: Storage, value: Any, name: str) -> None:
    """Write a value as JSON for people."""
    storage.publish(f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode(), name)


def weights_digest(source: ModelSource, *, autoencoder: bool) -> str:
    """16 hex digits that stand for the content of the model's files; those of the autoencoder only if it is used.

    LoRAs count with their content, whatever they are called, and their strengths, in their order, and the method that
    blocks are quantised with; without, or at strength 0, the digits are those of the files alone.
    """
    parts = [source.transformer, *([source.autoencoder] if source.autoencoder and autoencoder else [])]
    files = {entry.file for part in parts for entry in part.entries.values()}
    for encoder in source.text or ():
        files |= set(encoder.files())
    digest = files_digest(files)
    changes: list[tuple[str, float]] = [(lora.sha256, lora.strength) for lora in source.loras if lora.strength]
    if source.quantize is not None:
        changes.append((source.quantize, CODES_VERSION))
    return hashlib.sha256(repr([digest, *changes]).encode()).hexdigest()[:16] if changes else digest


def versions_of(device: torch.device) -> dict[str, str]:
    """The versions of the programs that compute and, for a GPU, its name: they may decide about the last bit too."""
    return versions("torch", "tokenizers") | (
        {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    )
