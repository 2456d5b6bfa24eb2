"""Captions of pictures: from one file (jsonl, csv, txt), or from a text file beside each picture."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from flux_ir.errors import FluxIRError

NAME_KEYS = ("image", "file_name", "file", "name")
CAPTION_KEYS = ("caption", "text", "prompt")
_TOLD = 3  # names in a message


def read_captions(source: Path, names: Sequence[str]) -> list[str]:
    """One caption for each picture, in the order of `names` (paths below the folder of pictures, with slashes).

    `source` is a .jsonl file (rows with the keys image and caption), a .csv file (the same columns), a .txt file (a
    name, a tab and a caption per line; or one caption per line, in the order of the names), or a folder that holds a
    text file for each picture: `cat.txt` for `cat.jpg`.

    Raises FluxIRError for a source that cannot be read (with the line), and for pictures without a caption.
    """
    if source.is_dir():
        return [_beside(source, name) for name in names]
    readers = {".jsonl": _json_rows, ".csv": _csv_rows, ".txt": _text_rows}
    if source.suffix.lower() not in readers:
        raise FluxIRError(
            f"--captions must be a .jsonl, .csv or .txt file, or a folder of text files: got {source}",
            hint="rename the file after what is in it",
        )
    text = _read(source)
    if source.suffix.lower() == ".txt" and not any("\t" in line for line in text.splitlines()):
        return _one_per_line(source, text, names)
    captions: dict[str, str] = {}
    for line, name, caption in readers[source.suffix.lower()](source, text):
        if name in captions:
            raise _wrong(source, line, f"{name} has a caption already", "leave one of them")
        captions[name] = caption
    if missing := [name for name in names if name not in captions]:
        more = f" and {len(missing) - _TOLD} more" if len(missing) > _TOLD else ""
        raise FluxIRError(
            f"every picture needs a caption: {source} has none for {', '.join(missing[:_TOLD])}{more}",
            hint="names are paths below --images, with slashes: cats/1.jpg",
        )
    return [captions[name] for name in names]


def _beside(folder: Path, name: str) -> str:
    path = (folder / name).with_suffix(".txt")
    if not path.is_file():
        raise FluxIRError(f"every picture needs a caption: there is no {path}", hint="write it, or pass one file")
    return _read(path).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FluxIRError(
            f"{path} must be UTF-8 text: {error.reason} at byte {error.start}", hint="convert it"
        ) from error
    except OSError as error:
        raise FluxIRError(f"cannot read the captions {path}: {error.strerror}", hint="check --captions") from error


def _json_rows(source: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _wrong(source, number, f"no JSON: {error}", "write one object per line") from error
            yield number, *_name_and_caption(source, number, row)


def _csv_rows(source: Path, text: str) -> Iterator[tuple[int, str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    for row in rows:
        number = rows.reader.line_num  # `rows.line_num` does not count blank lines
        yield number, *_name_and_caption(source, number, row)


def _text_rows(source: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab:
                raise _wrong(
                    source, number, "no tab", "write a name, a tab and a caption on every line, or only captions"
                )
            yield number, name.strip(), caption.strip()


def _one_per_line(source: Path, text: str, names: Sequence[str]) -> list[str]:
    captions = text.splitlines()
    if len(captions) != len(names):
        raise FluxIRError(
            f"a list of captions has one line per picture: {source} has {len(captions)}, --images has {len(names)}",
            hint="or write a name, a tab and a caption on every line",
        )
    return [caption.strip() for caption in captions]


def _name_and_caption(source: Path, line: int, row: object) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise _wrong(source, line, f"got {type(row).__name__}", 'write {"image": "cat.jpg", "caption": "a cat"}')
    name = next((row[key] for key in NAME_KEYS if isinstance(row.get(key), str)), None)
    caption = next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)), None)
    if name is None or caption is None:
        raise _wrong(source, line, f"got {', '.join(map(str, row))}", f"name them {NAME_KEYS[0]} and {CAPTION_KEYS[0]}")
    return name, caption


def _wrong(source: Path, line: int, problem: str, hint: str) -> FluxIRError:
    return FluxIRError(f"{source}, line {line}: a picture and its caption are needed: {problem}", hint=hint)
