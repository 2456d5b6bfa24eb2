"""Text files that people write: lines, and the rows of tables (.jsonl, .csv), each with the number of its line.

What is wrong in one is a FluxIRError that names the file and the line. `what` says what is read: "prompts", "labels".
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file

TABLES = (".jsonl", ".csv")


class TableRow(NamedTuple):
    """A row of a table. Of a .csv, a missing cell is None, and surplus ones stand under the key None."""

    line: int
    """The number of the line that it ends on, counted from 1: a quoted cell of a .csv may hold line ends."""
    cells: dict[Any, Any]


def read_lines(path: Path, *, what: str) -> Iterator[tuple[int, str]]:
    """The lines of a text, counted from 1. Raises FluxIRError for a file that cannot be read or is not UTF-8.

    Only line feeds end a line: a text may hold the other characters that `str.splitlines` breaks at.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise _unreadable(path, what, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def read_rows(path: Path, *, what: str) -> Iterator[TableRow]:
    """The rows of a .jsonl file, an object per line, or of a .csv file, whose first line names its columns.

    Blank lines are skipped. Raises FluxIRError for anything else.
    """
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, what)
        return
    for number, line in read_lines(path, what=what):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FluxIRError(
                f"{path}, line {number} must be JSON: {error}", hint="write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise FluxIRError(
                f"{path}, line {number} must be a JSON object: got {json.dumps(row)[:80]}",
                hint="write one object per line",
            )
        yield TableRow(number, row)


def _csv_rows(path: Path, what: str) -> Iterator[TableRow]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            try:
                for cells in rows:
                    yield TableRow(rows.reader.line_num, cells)  # `rows.line_num` does not count blank lines
            except csv.Error as error:
                raise FluxIRError(
                    f"{path}, line {rows.reader.line_num} must be CSV: {error}",
                    hint="write the names of the columns into the first line, and quote cells that hold commas",
                ) from error
    except OSError as error:
        raise _unreadable(path, what, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _unreadable(path: Path, what: str, error: OSError) -> FluxIRError:
    return FluxIRError(f"cannot read the {what} in {path}: {error.strerror}", hint="check the path")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> FluxIRError:
    return FluxIRError(
        f"{path} must be UTF-8: byte {error.object[error.start]:#04x} on line {_line_of_bad_byte(path)}",
        hint="save it as UTF-8",
    )


def _line_of_bad_byte(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A .csv with the names of the first row on top; None is an empty cell. Complete or not there at all."""
    with complete_file(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
