"""The table of features for other programs: CSV, Parquet, or the layout that Neuronpedia imports."""

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from flux_ir.api.arguments import check_words
from flux_ir.api.features import flat_columns, read_features
from flux_ir.api.progress import Note, Watch, follow, unwatched
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder, open_features
from flux_ir.features.neuronpedia import NeuronpediaRows, batches, description_rows, names_of
from flux_ir.features.words import find_tokenizer, prompt_tokens
from flux_ir.files import complete_file
from flux_ir.sites import Stream

FeatureFormat = Literal["csv", "parquet", "neuronpedia"]


def export_features(
    features: str | Path | FeatureFolder,
    *,
    format: FeatureFormat | Sequence[FeatureFormat] = ("csv",),  # noqa: A002 (the flag's name)
    stream: Stream | None = None,
    tokenizer: str | Path | None = None,
    output_dir: str | Path | None = None,
    progress: Watch = unwatched,
) -> dict[str, Path]:
    """Write the table of features as other programs read it; gives the paths written, by format and stream.

    `features` is a folder that is scored. csv and parquet are the table with the columns of later stages, a row per
    feature; neuronpedia has its folders of features/ and activations/, and needs examples. `stream` None is every
    stream. `tokenizer` is a folder with the tokenizer of the prompts, by default the model's own. Files go to
    `output_dir`, by default exports/ in the folder of features.

    Raises FluxIRError for a stage that has not been run, and without the package that a format needs.
    """
    folder = open_features(features)
    formats: Sequence[FeatureFormat] = (format,) if isinstance(format, str) else tuple(format)
    check_words(export_features, {"format": formats})
    where, written = Path(folder.path / "exports" if output_dir is None else output_dir), dict[str, Path]()
    writers = {name: _WRITERS[name]() for name in formats if name != "neuronpedia"}
    for name in formats:
        for own in folder.streams if stream is None else (stream,):
            if name == "neuronpedia":
                path = _write_neuronpedia(where / name, folder, own, tokenizer, progress)
            else:
                path = where / f"{own}.{name}"
                writers[name](path, flat_columns(folder, read_features(folder, own).table))
            written[f"{name}, {own}"] = path
    return written


# Each writer is made before anything is written, so that a package that is missing is told at once.


def _csv_writer() -> Callable[[Path, Mapping[str, NDArray[Any]]], None]:
    def write(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
        """NaN is an empty cell, as spreadsheets and pandas read it."""
        with complete_file(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(columns)
            rows.writerows(zip(*(_texts(column) for column in columns.values()), strict=True))

    return write


def _texts(column: NDArray[Any]) -> Iterable[Any]:
    if column.dtype.kind == "f":  # as short as they can be read back: a float32 has fewer digits
        return ("" if math.isnan(value) else str(value) for value in column)
    return ("true" if value else "false" for value in column) if column.dtype.kind == "b" else column.tolist()


def _parquet_writer() -> Callable[[Path, Mapping[str, NDArray[Any]]], None]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise FluxIRError("parquet needs pyarrow", hint="pip install 'flux-ir[analysis]', or use csv") from error

    def write(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
        with complete_file(path) as beside:
            parquet.write_table(pyarrow.table({name: np.asarray(column) for name, column in columns.items()}), beside)

    return write


_WRITERS = {"csv": _csv_writer, "parquet": _parquet_writer}


def _write_neuronpedia(
    where: Path, folder: FeatureFolder, stream: Stream, tokenizer: str | Path | None, progress: Watch
) -> Path:
    folder.check_done("examples")
    names, tokens = names_of(folder, stream), None
    if stream == "txt":
        model_tokenizer = find_tokenizer(folder.settings.model, None if tokenizer is None else Path(tokenizer))
        if model_tokenizer is None:
            progress(Note("note: there is no tokenizer of the model here, so tokens of texts are called by number"))
        else:
            prompts = [row.prompt for row in folder.images]
            tokens = prompt_tokens(model_tokenizer, prompts, folder.settings.tokens["txt"])
    path, rows, every = where / names.model / names.source, NeuronpediaRows(folder, stream, tokens), batches(folder)
    for number, features in enumerate(follow(progress, f"neuronpedia {stream}", every, total=len(every))):
        with _lines(path / "features" / f"batch-{number}.jsonl.gz") as file:
            file.writelines(map(_line, map(rows.feature, features)))
        with _lines(path / "activations" / f"batch-{number}.jsonl.gz") as file:
            file.writelines(_line(row) for feature in features for row in rows.activations(feature))
    for name, row in description_rows(folder, names).items():
        with complete_file(path / name) as beside:
            beside.write_text(_line(row), encoding="utf-8")
    return path


@contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    """A gzip file to write text to; its header has no name and no time, so that the same lines give the same bytes."""
    with (
        complete_file(path) as beside,
        beside.open("wb") as raw,
        gzip.GzipFile("", "wb", 5, raw, mtime=0) as compressed,
        io.TextIOWrapper(compressed, encoding="utf-8", newline="\n") as lines,
    ):
        yield lines


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
