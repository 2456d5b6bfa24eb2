"""Labels of any pictures from files: a table of what each picture shows, or masks that say where.

A table, .csv or .jsonl, has a row per picture, known by its `id` or by its `prompt`; every other column is a label.
Words are asked for one by one, 0 and 1 (or false and true) as they are, and numbers are for regression. An empty cell
is not known. Masks are PNG files, white where the concept is: FOLDER/CONCEPT/ID.png or FOLDER/KIND/CONCEPT/ID.png.
A picture of which the folder has no mask at all is left out; one with a mask of another concept does not have this one.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flux_ir.activations.blocks import DrawnSource, TokenSource
from flux_ir.errors import FluxIRError, counted
from flux_ir.studies.judged import PATCH_PX
from flux_ir.studies.labels import (
    CLEAR_BELOW,
    COVERED_ABOVE,
    IN_ALL,
    INSIDE_ABOVE,
    POSITIVE,
    Labels,
    Question,
    make_bits,
)
from flux_ir.tables import TABLES, TableRow, read_rows

_YES_NO = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}
_FEWEST_NUMBERS = 3  # a column of two different numbers is read as two words


class LabelColumn(NamedTuple):
    """One label of a table: the known `values` by key, as text."""

    name: str
    values: Mapping[str, str]

    @property
    def is_yes_no(self) -> bool:
        return all(value.lower() in _YES_NO for value in self.values.values())

    @property
    def is_number(self) -> bool:
        different = set(self.values.values())
        return not self.is_yes_no and len(different) >= _FEWEST_NUMBERS and all(map(_is_number, different))


class LabelFile(NamedTuple):
    """Labels as a file or folder has them; `labels` finds the pictures of a source that they are about."""

    path: Path
    columns: tuple[LabelColumn, ...]
    by: str
    """The column that identifies a row: id or prompt."""
    masks: Mapping[tuple[str, str], Mapping[str, Path]]
    """By kind and concept, the mask of each picture that has one, by its id."""
    digest: str
    """A digest of the content: 16 hex digits."""

    def labels(self, source: TokenSource, follow: Callable[[Sequence[int]], Iterable[int]] = iter) -> Labels:
        """The labels of a source's generations. Raises FluxIRError if none of them is labelled."""
        keys = [generation.id if self.by == "id" else generation.prompt for generation in source.generations]
        if self.masks:
            return self._of_masks(source, keys, follow)
        known = {key for column in self.columns for key in column.values}
        images = np.array([image for image, key in enumerate(keys) if key in known], dtype=np.int64)
        self._check_some(source, len(images))
        known_keys = [keys[int(image)] for image in images]
        questions, pictures = list[Question](), list[np.ndarray]()
        for column in self.columns:
            if not column.is_number:
                for question, bits in _asked(column, known_keys):
                    questions.append(question)
                    pictures.append(bits)
        numbers = {
            column.name: np.array([float(column.values.get(key, "nan")) for key in known_keys])
            for column in self.columns
            if column.is_number
        }
        return Labels(
            images=images,
            prompts=_prompts(source, images),
            questions=tuple(questions),
            tokens=np.zeros((0, len(images), 0), dtype=np.uint8),
            pictures=np.stack(pictures) if pictures else np.zeros((0, len(images)), dtype=np.uint8),
            dropped={"no label": len(keys) - len(images)},
            by_shape={},
            numbers=numbers,
        )

    def _of_masks(
        self, source: TokenSource, keys: Sequence[str], follow: Callable[[Sequence[int]], Iterable[int]]
    ) -> Labels:
        masked = {key for of_concept in self.masks.values() for key in of_concept}
        images = np.array([image for image, key in enumerate(keys) if key in masked], dtype=np.int64)
        self._check_some(source, len(images))
        covers = []
        for image in follow(images.tolist()):
            rows, columns = _grid(source, image)
            none = np.zeros(rows * columns, dtype=np.float32)
            paths = [of_concept.get(keys[image]) for of_concept in self.masks.values()]
            covers.append(np.stack([none if path is None else _cover(path, rows, columns) for path in paths]))
        sizes = {cover.shape[1] for cover in covers}
        if len(sizes) > 1:
            raise FluxIRError(
                f"pictures with masks must all have one size: {self.path} has masks for pictures of "
                f"{' and '.join(map(str, sorted(sizes)))} patches",
                hint="label collections of one size",
            )
        cover = np.stack(covers)  # [images, concepts, tokens]
        questions, tokens, pictures = list[Question](), list[np.ndarray](), list[np.ndarray]()
        kinds = [kind for kind, _ in self.masks]
        of_pictures: list[tuple[Question, np.ndarray]] = []
        for number, (kind, concept) in enumerate(self.masks):
            rivals = [n for n, other in enumerate(kinds) if other == kind and n != number]
            for question, bits in _of_cover(kind, concept, cover[:, number], cover, cover[:, rivals]):
                if question.of_tokens:
                    questions.append(question)
                    tokens.append(bits)
                else:
                    of_pictures.append((question, bits))
        for question, bits in of_pictures:
            questions.append(question)
            pictures.append(bits)
        return Labels(
            images=images,
            prompts=_prompts(source, images),
            questions=tuple(questions),
            tokens=np.stack(tokens),
            pictures=np.stack(pictures),
            dropped={"no mask": len(keys) - len(images)},
            by_shape={},
        )

    def _check_some(self, source: TokenSource, found: int) -> None:
        if not found:
            first = source.generations[0]
            key = first.id if self.by == "id" else first.prompt
            raise FluxIRError(
                f"labels must be of pictures of these captures: {self.path} knows none of "
                f"{counted(len(source.generations), 'generation')} by its {self.by}, such as {key!r}",
                hint="rows are known by the columns id or prompt of index.jsonl, masks by ID.png",
            )


def _prompts(source: TokenSource, images: np.ndarray) -> tuple[str, ...]:
    """The prompt of each image; where it has none, as a picture of CLIP's, its id."""
    known = (source.generations[int(image)] for image in images)
    return tuple(one.prompt or one.id for one in known)


def read_label_file(path: Path) -> LabelFile:
    """Labels from a .csv or .jsonl file, or from a folder of masks. Raises FluxIRError for what is none of these."""
    if path.is_dir():
        return _read_masks(path)
    if path.suffix not in TABLES:
        raise FluxIRError(
            f"labels are a table, .csv or .jsonl, or a folder of masks: got {path}"
            + ("" if path.exists() else ", which does not exist"),
            hint="a table has a column id or prompt; masks are FOLDER/CONCEPT/ID.png",
        )
    rows = [_cells(path, row) for row in read_rows(path, what="labels")]
    names = list(dict.fromkeys(name for row in rows for name in row))
    by = next((key for key in ("id", "prompt") if key in names), None)
    labels = [name for name in names if name not in ("id", "prompt")]
    if by is None or not labels:
        lacks = "a column id or prompt" if by is None else "columns beside id and prompt"
        raise FluxIRError(f"labels need {lacks}: {path} has {', '.join(names) or 'nothing'}")
    keys = [row.get(by, "") for row in rows]
    if double := next((key for key, more in _counted(keys).items() if more > 1 and key), None):
        raise FluxIRError(f"every {by} stands in one row: {path} has {double!r} twice", hint="leave one of them out")
    columns = []
    for name in labels:
        values = {key: row[name] for key, row in zip(keys, rows, strict=True) if key and row.get(name, "")}
        if len(set(values.values())) > 1:
            columns.append(LabelColumn(name, values))
    if not columns:
        raise FluxIRError(f"a label must differ between pictures: no column of {path} has two values")
    for column in columns:
        if strange := next((v for v in column.values.values() if _is_number(v) and not math.isfinite(float(v))), None):
            raise FluxIRError(f"labels must be finite: column {column.name} of {path} has {strange}")
    return LabelFile(path, tuple(columns), by, {}, hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def _cells(path: Path, row: TableRow) -> dict[str, str]:
    """A row's cells as text; an empty cell is not known."""
    if path.suffix == ".csv" and (None in row.cells or None in row.cells.values()):
        raise FluxIRError(f"{path}, line {row.line} must have as many cells as its head", hint="quote commas in cells")
    return {name.strip(): _as_text(value) for name, value in row.cells.items()}


def _as_text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value).strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _counted(keys: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


def _asked(column: LabelColumn, keys: Sequence[str]) -> Iterator[tuple[Question, np.ndarray]]:
    """The questions that a column of words answers, each with the bits of the pictures with these keys."""
    values = np.array([column.values.get(key, "") for key in keys])
    bits = np.where(values != "", np.uint8(IN_ALL), np.uint8(0))
    if column.is_yes_no:
        yes = np.array([_YES_NO.get(value.lower(), False) for value in values])
        yield Question(column.name, column.name, "image"), bits + np.where(yes, np.uint8(POSITIVE), np.uint8(0))
        return
    for word in sorted(set(column.values.values())):
        yield Question(column.name, word, "image"), bits + np.where(values == word, np.uint8(POSITIVE), np.uint8(0))


# ---- Masks


def _read_masks(folder: Path) -> LabelFile:
    masks: dict[tuple[str, str], dict[str, Path]] = {}
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.png")):
        parts = path.relative_to(folder).parts
        if len(parts) not in (2, 3):
            raise FluxIRError(
                f"masks are FOLDER/CONCEPT/ID.png or FOLDER/KIND/CONCEPT/ID.png: got {path}", hint="move it there"
            )
        kind, concept = (parts[0], parts[1]) if len(parts) == 3 else ("mask", parts[0])
        masks.setdefault((kind, concept), {})[path.stem] = path
        digest.update(f"{'/'.join(parts)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    if not masks:
        raise FluxIRError(f"a folder of masks holds CONCEPT/ID.png: {folder} has none", hint="or give a .csv or .jsonl")
    return LabelFile(folder, (), "id", masks, digest.hexdigest()[:16])


def _grid(source: TokenSource, image: int) -> tuple[int, int]:
    """The rows and columns of patches of a picture."""
    drawn = source.drawn(image) if isinstance(source, DrawnSource) else None
    if drawn is None or drawn.width is None or drawn.height is None:
        raise FluxIRError(
            "masks are laid over pictures of a known size, and these captures do not say theirs",
            hint="use what flux-ir collect made, or give a table of labels",
        )
    return drawn.height // PATCH_PX, drawn.width // PATCH_PX


def _cover(path: Path, rows: int, columns: int) -> np.ndarray:
    """The share of each patch that a mask covers: float32 [tokens]. A mask may have any size of the right form."""
    try:
        with Image.open(path) as file:
            mask = file.convert("L").convert("F")  # in float32: resized bytes would be rounded
    except OSError as error:
        raise FluxIRError(f"cannot read the mask {path}: {error}") from error
    if abs(mask.width * rows - mask.height * columns) > max(mask.width * rows, mask.height * columns) * 0.02:
        raise FluxIRError(
            f"a mask has the form of its picture, {columns} x {rows} patches: {path} has {mask.width} x {mask.height}"
        )
    # Each pixel of the mask is divided among the patches it lies on.
    return (np.asarray(mask.resize((columns, rows), Image.Resampling.BOX)) / np.float32(255)).reshape(-1)


def _of_cover(
    kind: str, concept: str, mine: np.ndarray, every: np.ndarray, rivals: np.ndarray
) -> Iterator[tuple[Question, np.ndarray]]:
    """The three questions about one concept, with their bits.

    `mine` is its own cover [images, tokens], `every` those of all concepts [images, concepts, tokens], `rivals` those
    of the others of its kind.
    """
    others = rivals.max(1) if rivals.shape[1] else np.zeros_like(mine)
    clear = every.max(1) < CLEAR_BELOW
    inside, elsewhere = mine > INSIDE_ABOVE, (mine < CLEAR_BELOW) & (every.max(1) > INSIDE_ABOVE)
    in_rival = (mine < CLEAR_BELOW) & (others > INSIDE_ABOVE)
    yield Question(kind, concept, "interior"), make_bits(inside, inside | elsewhere | clear, inside | in_rival)
    covered, free = mine > COVERED_ABOVE, mine < CLEAR_BELOW
    rivals_there = free & (others > COVERED_ABOVE)
    yield Question(kind, concept, "any"), make_bits(covered, covered | free, covered | rivals_there)
    has, lacks = np.any(covered, axis=1), np.all(free, axis=1)
    yield Question(kind, concept, "image"), make_bits(has, has | lacks, np.zeros_like(has))
