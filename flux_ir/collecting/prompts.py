"""A file of prompts, and the list of work that follows: every prompt as often as asked, each time with its own noise.

What a generation is called and which noise it starts from follow from its prompt, its repeat and the base seed alone,
by hashing: they stay the same when prompts are added, dropped or put in another order.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.tables import TableRow, read_lines, read_rows

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
        """The generations from number `start` up to `stop` (exclusive), or up to the last."""
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
    suffix = path.suffix.lower()
    if suffix not in _HINTS:
        raise FluxIRError(
            f"--prompts must be a {', '.join(_HINTS)} file: got {path}", hint="a .txt file holds one prompt per line"
        )
    if suffix == ".txt":
        prompts = [line.strip() for _, line in read_lines(path, what="prompts") if line.strip()]
    else:
        rows = read_rows(path, what="prompts")
        # A row of a .csv without any text is a blank line of a spreadsheet.
        prompts = [_prompt_of(row, path) for row in rows if suffix == ".jsonl" or any(row.cells.values())]
    if not prompts:
        raise FluxIRError(f"{path} holds no prompt", hint=_HINTS[suffix])
    return prompts


def _prompt_of(row: TableRow, path: Path) -> str:
    prompt = row.cells.get(COLUMN)
    if not isinstance(prompt, str) or not prompt.strip():
        told = json.dumps(row.cells)[:80] if COLUMN in row.cells else f"only {', '.join(map(str, row.cells))}"
        raise FluxIRError(
            f'{path}, line {row.line} must have a text "{COLUMN}": got {told}', hint=_HINTS[path.suffix.lower()]
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # "\ud800" is JSON, but no text
        raise FluxIRError(
            f"{path}, line {row.line} must be text that UTF-8 can hold: got {prompt[:40]!r}",
            hint="remove the broken escape",
        ) from None
    return prompt.strip()


_HINTS = {
    ".txt": "write one prompt per line",
    ".jsonl": 'write one row like {"prompt": "a red circle"} per line',
    ".csv": 'write "prompt" into the first line, and a prompt into each that follows',
}
