"""The user's pictures, with their captions: a folder of files, or shards of (image, caption), parquet or webdataset.

Nothing is read into memory as a whole: a folder is a list of names, and shards are streamed by the library `datasets`.
Every picture has a number, so that reading may begin at any of them. Errors name the file and the key of what is wrong.
These shards are the source's; what is made of them is kept in shards of a collection (`clip_images`).
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image

from flux_ir.collecting.shard_notes import files_digest
from flux_ir.errors import FluxIRError
from flux_ir.models.clip import broken_image
from flux_ir.tables import TABLES, read_lines, read_rows

NAME_KEYS = ("image", "file_name", "file", "name")
CAPTION_KEYS = ("caption", "text", "prompt")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHARD_SUFFIXES = (".parquet", ".tar")
IMAGE_COLUMNS = ("image", "img", *(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
CAPTION_COLUMNS = (*CAPTION_KEYS, "txt", *(f"json.{key}" for key in CAPTION_KEYS))

# The name of an example in a tar is what stands before the first point of a file's name, as webdataset has it.
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


class Picture(NamedTuple):
    """One picture that is not decoded yet."""

    id: str
    """Its path below the folder, or its shard and its key there."""
    content: Path | bytes
    caption: str | None
    where: str
    """For messages."""


@runtime_checkable
class ImageSource(Protocol):
    """Numbered pictures."""

    @property
    def has_captions(self) -> bool:
        """Whether every picture has a caption."""

    def __len__(self) -> int: ...

    def described(self) -> dict[str, Any]:
        """What stands for the content of all pictures and captions in `collection.json`."""

    def pictures(self, start: int) -> Iterator[Picture]:
        """The pictures from number `start` on. Raises FluxIRError for one that has no content or no caption."""


def open_images(images: Path, captions: Path | None) -> ImageSource:
    """What `--images` names: a folder of pictures, or one of shards (or one shard alone).

    Raises FluxIRError for a path that holds neither or both, and for captions that do not go with the pictures.
    """
    if images.is_file() and images.suffix.lower() in SHARD_SUFFIXES:
        files, names = [images], []
    elif images.is_dir():
        below = sorted(path for path in images.rglob("*") if path.is_file())
        files = [path for path in below if path.suffix.lower() in SHARD_SUFFIXES]
        names = [path.relative_to(images).as_posix() for path in below if path.suffix.lower() in IMAGE_SUFFIXES]
    else:
        raise FluxIRError(
            f"--images must be a folder of pictures, or of .parquet or .tar shards: got {images}", hint="check the path"
        )
    if files and names:
        raise FluxIRError(
            f"{images} must hold pictures or shards of pictures: it holds both, such as {names[0]} and {files[0].name}",
            hint="name a folder that holds one of them",
        )
    if not files and not names:
        raise FluxIRError(
            f"{images} must hold pictures: there is no file that ends in {', '.join(IMAGE_SUFFIXES + SHARD_SUFFIXES)}",
            hint="name the folder of pictures with --images",
        )
    if not files:
        return FolderImages(images, names, None if captions is None else read_captions(captions, names))
    if captions is not None:
        raise FluxIRError(
            f"the captions of shards are in the shards: got --captions {captions} for {files[0].name}",
            hint="leave out --captions",
        )
    return ShardedImages(files)


class FolderImages:
    """A folder of picture files, in the order of their names."""

    def __init__(self, folder: Path, names: Sequence[str], captions: Sequence[str] | None) -> None:
        self.folder, self.names, self.captions = folder, names, captions

    @property
    def has_captions(self) -> bool:
        return self.captions is not None

    def __len__(self) -> int:
        return len(self.names)

    def described(self) -> dict[str, Any]:
        """Names and sizes stand for the pictures."""
        files = [f"{name} {(self.folder / name).stat().st_size}" for name in self.names]
        captions = None if self.captions is None else _digest(self.captions)
        return {"images": len(self), "images_sha256": _digest(files), "captions_sha256": captions}

    def pictures(self, start: int) -> Iterator[Picture]:
        for number in range(start, len(self)):
            path = self.folder / self.names[number]
            yield Picture(self.names[number], path, self.captions[number] if self.captions else None, str(path))


def check_images(source: FolderImages) -> None:
    """Opens the header of every picture. Raises FluxIRError that names the broken ones: none is left out silently."""
    broken: list[tuple[str, Exception]] = []
    for name in source.names:
        try:
            with Image.open(source.folder / name):
                pass
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append((name, error))
    if len(broken) == 1:
        raise broken_image(source.folder / broken[0][0], broken[0][1])
    if broken:
        told = ", ".join(name for name, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise FluxIRError(
            f"{len(broken)} of {len(source)} files in {source.folder} are no pictures that can be read: {told}",
            hint="mend them or take them out of the folder",
        )


class ShardedImages:
    """Shards of (image, caption): parquet files or tars of webdataset, in the order of their names.

    Columns are found by their names in the first shard: `image` or a picture's suffix, `caption`, `text` or `txt`, or
    one of these inside a column `json`; a struct of an image has `bytes`. Without a column of captions, pictures alone
    are read. Raises FluxIRError where the library `datasets` is missing, for files that cannot be read, and where there
    is no column of images.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        _check_library()
        self.files = files
        self._counts = [_count(file) for file in files]
        columns = _columns(_stream(files[0]))
        self.image = _column(files[0], columns, IMAGE_COLUMNS)
        named = [column for column in CAPTION_COLUMNS if column in columns]
        self.caption = named[0] if named else None

    @property
    def has_captions(self) -> bool:
        return self.caption is not None

    def __len__(self) -> int:
        return sum(self._counts)

    def described(self) -> dict[str, Any]:
        return {
            "images": len(self),
            "images_sha256": files_digest(self.files),
            "columns": [self.image, self.caption],
        }

    def pictures(self, start: int) -> Iterator[Picture]:
        for file, count in zip(self.files, self._counts, strict=True):
            if start < count:
                yield from self._pictures_of(file, start, count)
            start = max(0, start - count)

    def _pictures_of(self, file: Path, start: int, count: int) -> Iterator[Picture]:
        stream = _stream(file)
        for column in [self.image, *([self.caption] if self.caption else [])]:  # those of the first shard, here too
            _column(file, _columns(stream), (column,))
        number = start
        for row in _readable(file, stream.skip(start)):
            key = str(row.get("__key__", f"{number:06d}"))
            caption = _value(row, self.caption) if self.caption else None
            content = row[self.image]
            if isinstance(content, dict):  # how `datasets` keeps an image
                content = content.get("bytes")
            where = f"{file}, {'key' if '__key__' in row else 'row'} {key}"
            if not isinstance(content, bytes):
                raise _lacking(where, self.image, "the bytes of a picture", content)
            if self.caption and not isinstance(caption, str):
                raise _lacking(where, self.caption, "text", caption)
            yield Picture(f"{file.stem}/{key}", content, caption, where)
            number += 1
        if number != count:
            raise FluxIRError(f"{file} must have {count} examples: {number} were read", hint="write it again")


def _columns(stream: Any) -> list[str]:
    """The names of a shard's columns, and of the keys in its column json, as `json.KEY`."""
    inner = stream.features.get("json")
    below = [f"json.{key}" for key in inner] if isinstance(inner, dict) else []
    return [*stream.features, *below]


def _value(row: dict[str, Any], column: str) -> Any:
    outer, _, key = column.partition(".")
    value = row[outer]
    return value.get(key) if key and isinstance(value, dict) else value


def _check_library() -> None:
    try:
        import datasets  # noqa: F401 (asked for before anything is read)
    except ImportError as error:
        raise FluxIRError(
            "shards of pictures are read by the library datasets, which is not installed",
            hint="pip install datasets, or pip install 'flux-ir[datasets]'",
        ) from error


def _stream(file: Path) -> Any:
    """The examples of one shard, not decoded. Raises FluxIRError for a file that is no such shard."""
    import datasets

    kind = {".parquet": "parquet", ".tar": "webdataset"}[file.suffix.lower()]
    try:
        stream = datasets.load_dataset(kind, data_files=[str(file)], split="train", streaming=True)
        return stream.decode(enable=False)
    except (OSError, ValueError, KeyError, IndexError, tarfile.TarError) as error:
        raise _unreadable(file, error) from error


def _readable(file: Path, rows: Any) -> Iterator[dict[str, Any]]:
    """The rows. What goes wrong while they are read is raised as a FluxIRError that names the file."""
    try:
        yield from rows
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise _unreadable(file, error) from error


def _count(file: Path) -> int:
    """How many examples a shard has, without reading them: by parquet's footer, or the names in a tar."""
    try:
        if file.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return int(parquet.read_metadata(file).num_rows)
        with tarfile.open(file) as tar:
            keys = [found[1] for member in tar if member.isfile() and (found := _KEY.fullmatch(member.name))]
            return sum(key != before for key, before in zip(keys, [None, *keys], strict=False))
    except (OSError, ValueError, tarfile.TarError) as error:
        raise _unreadable(file, error) from error


def _column(file: Path, columns: Sequence[str], known: Sequence[str]) -> str:
    """The first of the known names that a shard has as a column. Raises FluxIRError for a shard that has none."""
    for name in known:
        if name in columns:
            return name
    shown = ", ".join(name for name in columns if not name.startswith("__"))
    raise FluxIRError(
        f"{file} must have a column {known[0]!r}: it has {shown}", hint=f"known names are {', '.join(known)}"
    )


def _lacking(where: str, column: str, kind: str, value: object) -> FluxIRError:
    got = "nothing" if value is None else type(value).__name__
    return FluxIRError(
        f"{where}, must have {kind} in its column {column!r}: got {got}",
        hint="mend or remove this example, then run the same command again",
    )


def _unreadable(file: Path, error: Exception) -> FluxIRError:
    told = (str(error) or type(error).__name__).splitlines()[0]
    return FluxIRError(f"{file} must be a shard of pictures that can be read: {told}", hint="fetch it again")


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# ---- Captions: from one file (jsonl, csv, txt), or from a text file beside each picture


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
    suffix = source.suffix.lower()
    if suffix not in (*TABLES, ".txt"):
        raise FluxIRError(
            f"--captions must be a .jsonl, .csv or .txt file, or a folder of text files: got {source}",
            hint="rename the file after what is in it",
        )
    lines = list(read_lines(source, what="captions")) if suffix == ".txt" else []
    if suffix == ".txt" and not any("\t" in line for _, line in lines):
        return _one_per_line(source, lines, names)
    captions: dict[str, str] = {}
    for line, name, caption in _text_rows(source, lines) if suffix == ".txt" else _table_rows(source):
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
    return "".join(line for _, line in read_lines(path, what="captions")).strip()


def _table_rows(source: Path) -> Iterator[tuple[int, str, str]]:
    for row in read_rows(source, what="captions"):
        name = next((row.cells[key] for key in NAME_KEYS if isinstance(row.cells.get(key), str)), None)
        caption = next((row.cells[key] for key in CAPTION_KEYS if isinstance(row.cells.get(key), str)), None)
        if name is None or caption is None:
            told = f"got {', '.join(map(str, row.cells))}"
            raise _wrong(source, row.line, told, f"name them {NAME_KEYS[0]} and {CAPTION_KEYS[0]}")
        yield row.line, name, caption


def _text_rows(source: Path, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab:
                raise _wrong(
                    source, number, "no tab", "write a name, a tab and a caption on every line, or only captions"
                )
            yield number, name.strip(), caption.strip()


def _one_per_line(source: Path, lines: Sequence[tuple[int, str]], names: Sequence[str]) -> list[str]:
    if len(lines) != len(names):
        raise FluxIRError(
            f"a list of captions has one line per picture: {source} has {len(lines)}, --images has {len(names)}",
            hint="or write a name, a tab and a caption on every line",
        )
    return [caption.strip() for _, caption in lines]


def _wrong(source: Path, line: int, problem: str, hint: str) -> FluxIRError:
    return FluxIRError(f"{source}, line {line}: a picture and its caption are needed: {problem}", hint=hint)
