"""Which generations a source of captures has: rows in little memory, from files or from the indexes of a collection."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from flux_ir.activations.token_blocks import Generation
from flux_ir.errors import FluxIRError


class Row(NamedTuple):
    """One generation of a source, in little memory: there may be a million."""

    id: str
    prompt: str
    path: str
    used_txt: int | None


class Generations(Sequence[Generation]):
    """The rows as `Generation`s, made when they are asked for."""

    def __init__(self, root: Path, rows: Sequence[Row]) -> None:
        self._root, self._rows = root, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Generation]: ...
    def __getitem__(self, index: int | slice) -> Generation | Sequence[Generation]:
        if isinstance(index, slice):
            return Generations(self._root, self._rows[index])
        row = self._rows[index]
        return Generation(row.id, row.prompt, self._root / row.path)


def is_collection(folder: Path) -> bool:
    """Whether `flux-ir collect` has been at work in this folder."""
    return (folder / "collection.json").is_file() or (folder / "index.jsonl").is_file()


def rows_of(folder: Path) -> list[Row]:
    """The finished generations, in order: from the index at the end, before that from groups and their journals."""
    rows: list[Row] = []
    prompts: dict[str, str] = {}  # repeats share one text
    first: dict[str, Any] | None = None
    for found in _json_rows(folder):
        first = first or found
        for word in ("model", "sites", "steps"):
            if found.get(word) != first.get(word):
                raise FluxIRError(
                    f"a collection has one list of {word}: generation {found['id']} of {folder} has {found.get(word)}, "
                    f"{first['id']} has {first.get(word)}",
                    hint="two collections were put into one folder: keep them apart",
                )
        prompt = prompts.setdefault(found["prompt"], found["prompt"])
        rows.append(Row(found["id"], prompt, found["path"], found.get("used_txt")))
    return rows


def _json_rows(folder: Path) -> Iterator[dict[str, Any]]:
    if (folder / "index.jsonl").is_file():
        yield from _lines(folder / "index.jsonl")
        return
    for group in sorted(folder.glob("groups/*")):
        index = group / "index.jsonl"
        if index.is_file():
            yield from _lines(index)
        elif (group / "journal.jsonl").is_file():
            yield from _lines(group / "journal.jsonl", growing=True)


def _lines(file: Path, *, growing: bool = False) -> Iterator[dict[str, Any]]:
    """One dictionary per line; the last line of a `growing` file may be cut short."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if growing and not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
                row["id"], row["path"], row["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise FluxIRError(
                    f"{file}, line {number}, is no row of a collection: {error!r}",
                    hint="run flux-ir collect again in this folder: it repairs what is broken",
                ) from error
            yield row
