"""A file of prompts, and the list of work that follows: every prompt as often as asked, each time with its own noise.

What a generation is called and which noise it starts from follow from its prompt, its repeat and the base seed alone,
by hashing: they stay the same when prompts are added, dropped or put in another order.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flux_ir.errors import FluxIRError

COLUMN = "prompt"
_SEED_BITS = 63


class WorkItem(NamedTuple):
    """One generation to be made."""

    id: str
    """16 hex digits."""
    prompt: str
    repeat: int
    """Counted from 0 for every prompt; a prompt that stands on several lines counts on."""
    seed: int
    """The seed of its noise, 63 bits."""


def work_item(base_seed: int, prompt: str, repeat: int) -> WorkItem:
    """The generation of one prompt and repeat: its seed and its id are hashes of both and of the base seed."""
    seed = int.from_bytes(_hash("seed", base_seed, prompt, repeat)[:8], "big") >> (64 - _SEED_BITS)
    return WorkItem(_hash("id", base_seed, prompt, repeat)[:8].hex(), prompt, repeat, seed)


def _hash(what: str, base_seed: int, prompt: str, repeat: int) -> bytes:
    # The prompt comes last: whatever it holds, no two different triples give the same text.
    return hashlib.sha256(f"{what}\n{base_seed}\n{repeat}\n{prompt}".encode()).digest()


class WorkList:
    """Every generation of a job, in order: the lines of the file one after the other, all repeats of each together.

    Holds the prompts as they are and one small number per line; items are made when they are asked for.
    """

    def __init__(self, prompts: Sequence[str], *, repeats: int, seed: int) -> None:
        self.prompts, self.repeats, self.seed = prompts, repeats, seed
        self._earlier = _earlier_occurrences(prompts)

    def __len__(self) -> int:
        return len(self.prompts) * self.repeats

    def items(self, start: int, stop: int) -> list[WorkItem]:
        """The generations from number `start` up to `stop`, or up to the last."""
        return [self._item(number) for number in range(start, min(stop, len(self)))]

    def _item(self, number: int) -> WorkItem:
        line, repeat = divmod(number, self.repeats)
        return work_item(self.seed, self.prompts[line], self._earlier.get(line, 0) * self.repeats + repeat)


def _earlier_occurrences(prompts: Sequence[str]) -> dict[int, int]:
    """How many earlier lines hold the same prompt, for the lines where any does."""
    counts: dict[str, int] = {}
    earlier: dict[int, int] = {}
    for line, prompt in enumerate(prompts):
        if count := counts.get(prompt, 0):
            earlier[line] = count
        counts[prompt] = count + 1
    return earlier


def prompts_digest(prompts: Sequence[str]) -> str:
    """A sha256 of all prompts in their order: what a collection remembers of them."""
    digest = hashlib.sha256()
    for prompt in prompts:
        encoded = prompt.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt file (one per line), a .jsonl (rows with "prompt") or a .csv (a column "prompt").

    Blank lines are skipped. Raises FluxIRError with the number of the line for whatever is wrong.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise FluxIRError(
            f"--prompts must be a {', '.join(_READERS)} file: got {path}", hint="a .txt file holds one prompt per line"
        )
    try:
        prompts = list(reader(path))
    except OSError as error:
        raise FluxIRError(f"cannot read the prompts in {path}: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise FluxIRError(
            f"{path} must be UTF-8: byte {error.object[error.start]:#04x} on line {_line_of_bad_byte(path)}",
            hint="save it as UTF-8",
        ) from error
    if not prompts:
        raise FluxIRError(f"{path} holds no prompt", hint=_HINTS[path.suffix.lower()])
    return prompts


def _read_txt(path: Path) -> Iterator[str]:
    # Only line feeds end a line: a prompt may hold the other characters that str.splitlines breaks at.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if prompt := line.strip():
                yield prompt


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FluxIRError(
                    f"{path}, line {number} must be JSON: {error}", hint='write rows like {"prompt": "a red circle"}'
                ) from error
            yield _prompt_of(row, path, number)


def _prompt_of(row: object, path: Path, number: int) -> str:
    prompt = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        told = f"the keys {', '.join(row)}" if isinstance(row, dict) and COLUMN not in row else json.dumps(row)[:80]
        raise FluxIRError(
            f'{path}, line {number} must be an object with a text "{COLUMN}": got {told}',
            hint='write rows like {"prompt": "a red circle"}',
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # "\ud800" is JSON, but no text
        raise FluxIRError(
            f"{path}, line {number} must be text that UTF-8 can hold: got {prompt[:40]!r}",
            hint="remove the broken escape",
        ) from None
    return prompt.strip()


def _read_csv(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            if rows.fieldnames is None:
                return
            if COLUMN not in rows.fieldnames:
                raise FluxIRError(
                    f'{path} must have a column "{COLUMN}" in its first line: got {", ".join(rows.fieldnames)}',
                    hint=_HINTS[".csv"],
                )
            for row in rows:
                prompt = (row[COLUMN] or "").strip()
                if not prompt and any(row.values()):
                    raise FluxIRError(
                        f'{path}, line {rows.reader.line_num} has no "{COLUMN}"', hint="fill it in, or remove the line"
                    )
                if prompt:
                    yield prompt
        except csv.Error as error:
            raise FluxIRError(
                f"{path}, line {rows.reader.line_num} must be CSV: {error}", hint=_HINTS[".csv"]
            ) from error


def _line_of_bad_byte(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
_HINTS = {
    ".txt": "write one prompt per line",
    ".jsonl": 'write one row like {"prompt": "a red circle"} per line',
    ".csv": 'write "prompt" into the first line, and a prompt into each that follows',
}
