"""One folder of a collection: a fixed slice of the generations, and what of it is finished.

While a group is being worked on, its journal has a row for every generation whose files are there; at the end the rows
stand in its index. Nobody but the rank a group belongs to ever writes to it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

from flux_ir.collecting.prompts import WorkItem
from flux_ir.collecting.storage import Storage, move_aside
from flux_ir.collecting.workers import in_order
from flux_ir.recording.statistics import SiteStatistics, write_statistics
from flux_ir.sites import Site

GROUP = 64
"""Generations per folder. A million of them make 15,625 folders of some hundred files, which no file system minds; the
longest batch fits in; and ranks are dealt equal shares to within the work of a minute or so."""

JOURNAL, INDEX, STATISTICS, CHECKSUM = "journal.jsonl", "index.jsonl", "stats.safetensors", "stats.sha256"
EXTRAS = ("image", "latent")
"""What a row may name besides the capture."""

Row = dict[str, Any]
Statistics = dict[tuple[Site, int], SiteStatistics]


@dataclass(frozen=True)
class Kept:
    """What every generation of a collection leaves: its files, and the part of its row that is known before."""

    model: str
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    images: bool = False
    latents: bool = False

    def row(self, item: WorkItem, folder: str) -> Row:
        """The row of a generation, but for what its files turned out to be: their bytes and sha256, and `used_txt`."""
        return {
            **item._asdict(),
            "model": self.model,
            "path": f"{folder}/{item.id}.pt",
            "sites": [str(site) for site in self.sites],
            "steps": list(self.steps),
        }

    def extras(self, item: WorkItem, folder: str) -> dict[str, str]:
        """The names of the files beside the capture. The row has an object with path, bytes and sha256 for each."""
        names = {}
        if self.images:
            names["image"] = f"{folder}/{item.id}.jpg"
        if self.latents:
            names["latent"] = f"{folder}/{item.id}.latent.safetensors"
        return names


class Group:
    """A slice of the generations, in batches. `rows` are those that are finished, by their id."""

    def __init__(
        self, storage: Storage, number: int, items: Sequence[WorkItem], kept: Kept, *, batch_size: int
    ) -> None:
        self.storage, self.number, self.items, self.kept = storage, number, items, kept
        self.batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        self.rows: dict[str, Row] = {}
        self.finished = False
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def folder(self) -> str:
        """Its name in the collection."""
        return group_folder(self.number)

    def name(self, file: str) -> str:
        """The name of one of its files."""
        return f"{self.folder}/{file}"

    def load(self) -> None:
        """Read what is finished, without looking at the files."""
        self.finished = self.storage.exists(self.name(INDEX))
        rows = read_rows(self.storage, self.name(INDEX if self.finished else JOURNAL))
        wanted = {item.id for item in self.items}
        self.rows = {row["id"]: row for row in rows if row.get("id") in wanted}

    def has(self, batch: Sequence[WorkItem]) -> bool:
        """Whether every generation of a batch is finished."""
        return all(item.id in self.rows for item in batch)

    def keep(self, rows: Iterable[Row]) -> None:
        """Note that these generations are finished: their files are there. May be called by several threads."""
        with self._lock:
            self.rows |= {row["id"]: row for row in rows}
            self._write_journal()

    def close(self, statistics: Statistics) -> None:
        """Everything is there: write the statistics and the index, in the order of the work, and drop the journal."""
        publish_statistics(self.storage, statistics, self.name(STATISTICS), checksum=self.name(CHECKSUM))
        self.storage.publish(as_lines(self.rows[item.id] for item in self.items), self.name(INDEX))
        self.storage.remove(self.name(JOURNAL))
        self.finished = True

    def check(self, *, checksums: bool, workers: int) -> Iterator[bool]:
        """Look at the files of every generation that counts as finished, and yield whether they are as they were.

        Broken ones are moved aside and count as finished no more; the group is then open again.
        """
        self.load()
        if not self.rows and not self.finished:
            return
        intact = partial(self._is_intact, checksums=checksums)
        good: dict[str, Row] = {}
        for item, is_intact in zip(self.items, in_order(intact, self.items, workers), strict=True):
            if is_intact:
                good[item.id] = self.rows[item.id]
            yield is_intact
        if self.finished and len(good) == len(self.items) and self._ends_are_intact():
            self.storage.remove(self.name(JOURNAL))
        elif self.finished or len(good) < len(self.rows):
            self._reopen(good)

    def _is_intact(self, item: WorkItem, *, checksums: bool) -> bool:
        row = self.rows.get(item.id)
        if row is None or row | self.kept.row(item, self.folder) != row:
            return False
        files = [row]
        for extra, name in self.kept.extras(item, self.folder).items():
            files.append(row.get(extra) or {})
            if files[-1].get("path") != name:
                return False
        broken = [file for file in files if not _file_is_intact(self.storage, file, checksums=checksums)]
        return not broken

    def _ends_are_intact(self) -> bool:
        """Whether index and statistics are as `close` wrote them."""
        try:
            wanted = {
                self.name(CHECKSUM): checksum_line(self.storage.sha256(self.name(STATISTICS))),
                self.name(INDEX): as_lines(self.rows[item.id] for item in self.items),
            }
            return all(self.storage.read(name) == content for name, content in wanted.items())
        except FileNotFoundError:
            return False

    def _reopen(self, good: dict[str, Row]) -> None:
        with self._lock:
            self.rows, self.finished = good, False
            self._write_journal()
        self.storage.remove(self.name(INDEX))

    def _write_journal(self) -> None:
        self.storage.publish(as_lines(self.rows.values()), self.name(JOURNAL))


def group_folder(number: int) -> str:
    """The name of a group's folder."""
    return f"groups/{number:06d}"


def as_lines(rows: Iterable[Row]) -> bytes:
    """Rows as JSON Lines."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def read_rows(storage: Storage, name: str) -> list[Row]:
    """The rows of a JSON Lines file; none if there is no such file. Lines that are broken are left out."""
    try:
        lines = storage.read(name).splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if isinstance(row := _parsed(line), dict)]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def publish_statistics(storage: Storage, statistics: Statistics, name: str, *, checksum: str) -> None:
    """Write statistics, and beside them their checksum as the program sha256sum writes and checks it."""
    path = storage.scratch(".safetensors")
    write_statistics(path, statistics)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    storage.publish(path, name)
    storage.publish(checksum_line(digest), checksum)


def checksum_line(digest: str) -> bytes:
    """The line of sha256sum for the statistics."""
    return f"{digest}  {STATISTICS}\n".encode()


def merge_statistics(into: Statistics, more: Statistics) -> None:
    """Count what `more` has counted, too. The order of merging is part of the result."""
    for of, sums in more.items():
        into.setdefault(of, SiteStatistics(sums.d)).merge(sums)


def _file_is_intact(storage: Storage, file: Row, *, checksums: bool) -> bool:
    """Whether a file is as its row says. One that is not is moved aside, where it can be looked at."""
    name = file["path"]
    size = storage.size(name)
    if size is None:
        return False
    if size == file.get("bytes") and (not checksums or storage.sha256(name) == file.get("sha256")):
        return True
    move_aside(storage, name)
    return False
