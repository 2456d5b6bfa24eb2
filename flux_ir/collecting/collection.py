"""A collection: a folder of captures, all made with one set of settings, that can always be gone on with.

    collection.json         everything that the bits of its files depend on
    index.jsonl             a row per generation; where it is, the collection is complete
    stats.safetensors       statistics of every site and step, over all generations
    groups/000012/          64 generations each: {id}.pt, index.jsonl, stats.safetensors
    text/ab/{sha256}.safetensors    embedded prompts
    broken/                 files that were found broken and made again

Files are a function of the settings: how many processes or threads made them, and how often they were interrupted,
changes no byte. Next: `groups`, and `collector`, which does the work.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flux_ir.collecting.batches import Recipe
from flux_ir.collecting.groups import (
    CHECKSUM,
    GROUP,
    INDEX,
    STATISTICS,
    Group,
    Kept,
    Row,
    Statistics,
    group_folder,
    merge_statistics,
    publish_statistics,
)
from flux_ir.collecting.prompts import WorkList, prompts_digest
from flux_ir.collecting.storage import Storage
from flux_ir.errors import FluxIRError
from flux_ir.recording.statistics import read_statistics

COLLECTION = "collection.json"
VERSION = 1
"""Of the folder's layout."""


@dataclass(frozen=True)
class CollectSettings:
    """What is to be collected."""

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
        if self.batch_size is not None and not 1 <= self.batch_size <= GROUP:
            raise FluxIRError(f"--batch_size must be from 1 to {GROUP}: got {self.batch_size}", hint="try 8")

    @property
    def kept(self) -> Kept:
        """What every generation leaves."""
        recipe = self.recipe
        return Kept(recipe.spec.name, recipe.sites, recipe.steps, self.save_images, self.save_latents)

    def described(self, *, device: str, weights: str) -> dict[str, Any]:
        """Everything that the bits of the files depend on, as JSON says it: by the names of the flags.

        `device` is its kind; `weights` stands for the content of the model's files.
        """
        recipe = self.recipe
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
            "sites": [str(site) for site in recipe.sites],
            "steps": list(recipe.steps),
            "dtype": str(recipe.stored_dtype).removeprefix("torch."),
            "network_dtype": str(recipe.network_dtype).removeprefix("torch."),
            "tokens_per_image": recipe.tokens_per_image,
            "save_images": self.save_images,
            "save_latents": self.save_latents,
            "device": device,
            "batch_size": self.batch_size,
        }


class Collection:
    """The folder of a collection and the work that belongs into it."""

    def __init__(self, storage: Storage, settings: CollectSettings, *, batch_size: int) -> None:
        self.storage, self.settings, self.batch_size = storage, settings, batch_size
        self.work = WorkList(settings.prompts, repeats=settings.repeats, seed=settings.seed)
        self.groups = -(-len(self.work) // GROUP)

    def group(self, number: int) -> Group:
        """One group, with what is noted of it."""
        items = self.work.items(number * GROUP, (number + 1) * GROUP)
        return Group(self.storage, number, items, self.settings.kept, batch_size=self.batch_size)

    @property
    def is_complete(self) -> bool:
        """Whether everything is there (and was intact when it was written)."""
        return self.storage.exists(INDEX) and self.storage.exists(STATISTICS)

    def reopen(self) -> None:
        """Something is missing after all."""
        self.storage.remove(INDEX)

    def merge(self) -> Iterator[int]:
        """Write the index and the statistics of the whole, group after group; yields how many are merged.

        Raises FluxIRError if a group is not finished.
        """
        statistics: Statistics = {}
        path = self.storage.scratch(".jsonl")
        with path.open("wb") as index:
            for number in range(self.groups):
                folder = group_folder(number)
                try:
                    index.write(self.storage.read(f"{folder}/{INDEX}"))
                    of_group = read_statistics(self.storage.local(f"{folder}/{STATISTICS}"))
                except FileNotFoundError as error:
                    raise FluxIRError(
                        f"{folder} of {self.storage.where} is not finished",
                        hint="all processes must see the same folder; the same command goes on from here",
                    ) from error
                merge_statistics(statistics, of_group)
                yield number + 1
        publish_statistics(self.storage, statistics, STATISTICS, checksum=CHECKSUM)
        self.storage.publish(path, INDEX)


def stored_description(storage: Storage) -> dict[str, Any] | None:
    """What `collection.json` says; None where there is none. Raises FluxIRError for a broken one."""
    try:
        described = json.loads(storage.read(COLLECTION))
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


def check_same(storage: Storage, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises FluxIRError that shows every difference, if a folder was collected with other settings.

    A batch size of None agrees with any.
    """
    before = stored["settings"]
    keys = [key for key in {**before, **wanted} if key != "batch_size" or wanted["batch_size"] is not None]
    differences = [
        f"{key} {_told(key, before.get(key))} there, {_told(key, wanted.get(key))} now"
        for key in keys
        if before.get(key) != wanted.get(key)
    ]
    if differences:
        raise FluxIRError(
            f"{storage.where} was collected with other settings: {'; '.join(differences)}",
            hint="give the same settings to go on with it, or another --output_dir",
        )


def _told(key: str, value: Any) -> str:
    if key == "prompts" and isinstance(value, dict):
        return f"{value.get('count')} (sha256 {str(value.get('sha256'))[:8]})"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def publish_description(
    storage: Storage, settings: CollectSettings, described: dict[str, Any], *, versions: dict[str, str]
) -> None:
    """Write `collection.json`: the settings, and what a reader wants to know of the model besides."""
    recipe = settings.recipe
    value = {
        "version": VERSION,
        "settings": described,
        "generations": len(settings.prompts) * settings.repeats,
        "group": GROUP,
        "model": asdict(recipe.spec.flux),
        "txt_tokens": recipe.spec.text_tokens,
        "img_tokens": recipe.img_tokens,
        "kept_img_tokens": recipe.plan().kept_img_tokens,
        "timesteps": recipe.timesteps,
        "versions": versions,
    }
    text = json.dumps(value, indent=2, ensure_ascii=False)
    storage.publish(f"{text}\n".encode(), COLLECTION)


def read_index(storage: Storage) -> Iterator[Row]:
    """The rows of a complete collection. Raises FileNotFoundError for another."""
    with storage.local(INDEX).open("rb") as lines:
        for line in lines:
            yield json.loads(line)
