"""The file of a study: what it may say, read and checked with all defaults before anything runs.

A table of the file holds the arguments of one function of the Python API; `[prompts]`, `[concepts.pick]` and
`[concepts.report]` say where prompts come from. Next: `study`, which runs it.
"""

import inspect
import json
import random
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from flux_ir.collecting.prompts import read_prompts
from flux_ir.demo.captions import PARTS, captions
from flux_ir.errors import FluxIRError, nearest

Table = dict[str, Any]
PICK, REPORT = "pick", "report"


class StageSpec(NamedTuple):
    """One stage: the function that does it, and which of its arguments the study itself gives."""

    module: str
    function: str
    given: tuple[str, ...]
    study_defaults: Mapping[str, Any] = {}
    """Defaults of a study that differ from the function's."""
    own: Mapping[str, Any] = {}
    """Settings of the study that the function does not have, with their defaults."""

    def load(self) -> Callable[..., Any]:
        """The function."""
        return getattr(import_module(self.module), self.function)


# Pictures are kept although they cost the rest of the steps: examples of features are shown on them.
STAGES = {
    "collect": StageSpec(
        "flux_ir.api.collect", "collect", ("prompts", "output_dir"), study_defaults={"save_images": True}
    ),
    "train": StageSpec(
        "flux_ir.api.train_sae", "train_sae", ("captures", "output_dir", "name", "model", "prompts", "repeats", "stop")
    ),
    "evaluate": StageSpec("flux_ir.api.evaluate_sae", "evaluate_sae", ("sae", "captures")),
    "features": StageSpec("flux_ir.api.features", "analyse_features", ("sae", "captures", "name", "output_dir")),
    "concepts": StageSpec(
        "flux_ir.api.score_concepts",
        "score_concepts",
        ("sae", "captures", "report", "name", "output_dir"),
        own={"repeats": 4},  # generations of each prompt, to pick with and to report on
    ),
}
"""The stages in the order they run: those whose table the file has."""
NEEDED = ("prompts", "collect")
_PROMPT_DEFAULTS = {"file": None, "captions": None, "part": None, "alone": None, "sample": None, "seed": 0}


@dataclass(frozen=True)
class StudyFile:
    """A study as it will run, with every setting, defaults included."""

    path: Path
    name: str
    prompts: dict[str, list[str]]
    """By their use: "train", and with `[concepts]` also "pick" and "report"."""
    prompt_settings: dict[str, Table]
    stages: dict[str, Table]

    def to_toml(self) -> str:
        """The file with every default written out; a setting that is left to the function is a comment."""
        tables = {"prompts": self.prompt_settings["train"]} | self.stages
        tables |= {f"concepts.{name}": table for name, table in self.prompt_settings.items() if name != "train"}
        return f'name = "{self.name}"\n' + "".join(
            f"\n[{name}]\n" + "".join(_toml_line(key, value) for key, value in table.items())
            for name, table in tables.items()
        )


def read_study(path: Path | str) -> StudyFile:
    """Reads a study's file. Raises FluxIRError for unknown tables and settings, wrong values and bad prompts."""
    path = Path(path)
    tables = _parse(path)
    name = tables.pop("name", path.stem)
    if not isinstance(name, str) or not name.strip() or set(name) & set("/\\,"):
        raise FluxIRError(f"{path}: name must be the name of a folder, without commas: got {name!r}")
    _check_tables(path, tables)
    asked = {"train": tables.pop("prompts")}
    if "concepts" in tables:
        for use, seed, part in ((PICK, 202, "A"), (REPORT, 303, "C")):
            sizes = {"captions": 400, "alone": 200, "seed": seed, "part": part}
            asked[use] = tables["concepts"].pop(use, sizes)
    settings = {use: _prompt_settings(path, use, table) for use, table in asked.items()}
    stages = {stage: _settled(path, stage, tables[stage]) for stage in STAGES if stage in tables}
    prompts = {use: _prompts(path, use, table) for use, table in settings.items()}
    _check_disjoint(path, prompts)
    return StudyFile(path, name, prompts, settings, stages)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, if one is near."""
    near = nearest(name, list(known))
    return f"; did you mean {near}?" if near else ""


def _parse(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "name a file such as recipes/runs/flux_tiny.toml"
        raise FluxIRError(f"cannot read the study {path}: {error.strerror}", hint=hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FluxIRError(
            f"{path} must be TOML: {error}", hint='settings are written k = 16 or site = "double.3.img"'
        ) from error


def _check_tables(path: Path, tables: Table) -> None:
    known = ("prompts", *STAGES)
    for name, table in tables.items():
        if name not in known:
            raise FluxIRError(
                f"{path}: there is no stage {name!r}{did_you_mean(name, known)}",
                hint=f"the tables of a study are {', '.join(known)}",
            )
        if not isinstance(table, dict):
            raise FluxIRError(
                f"{path}: {name} must be a table: got {table!r}", hint=f"write [{name}] above its settings"
            )
    for name in NEEDED:
        if name not in tables:
            raise FluxIRError(f"{path}: a study needs a table [{name}]", hint="see recipes/runs/flux_tiny.toml")


def _settled(path: Path, stage: str, table: Table) -> Table:
    """All settings of a stage, with defaults. Raises FluxIRError for an unknown one, and for a wrong value."""
    spec = STAGES[stage]
    function = spec.load()
    parameters = inspect.signature(function).parameters
    annotations = get_type_hints(function)
    known = [name for name in parameters if name not in (*spec.given, "progress")]
    for name, value in table.items():
        if name in spec.own:
            continue
        if name not in known:
            why = "the study itself gives it" if name in spec.given else "there is no such setting"
            raise FluxIRError(
                f"{path}: [{stage}] {name}: {why}{did_you_mean(name, [*known, *spec.own])}",
                hint=f"it has the arguments of flux_ir.{spec.function}",
            )
        if not _fits(annotations[name], value):
            raise FluxIRError(
                f"{path}: [{stage}] {name} must be {_words(annotations[name])}: got {value!r}",
                hint=f"it is the argument of flux_ir.{spec.function}",
            )
    settled: Table = {}
    for name in known:
        default = parameters[name].default
        value = table.get(name, spec.study_defaults.get(name, default))
        settled[name] = list(value) if isinstance(value, tuple) else value
        if value is inspect.Parameter.empty:
            raise FluxIRError(f"{path}: [{stage}] needs {name}", hint=f"it is an argument of flux_ir.{spec.function}")
    for name, default in spec.own.items():
        settled[name] = table.get(name, default)
        if not _fits(type(default), settled[name]) or settled[name] < 1:
            raise FluxIRError(f"{path}: [{stage}] {name} must be a number of at least 1: got {settled[name]!r}")
    return settled


def _prompt_settings(path: Path, use: str, table: Any) -> Table:
    where = "[prompts]" if use == "train" else f"[concepts.{use}]"
    if not isinstance(table, dict):
        raise FluxIRError(f"{path}: {where} must be a table: got {table!r}")
    for name, value in table.items():
        if name not in _PROMPT_DEFAULTS:
            raise FluxIRError(
                f"{path}: {where} {name}: there is no such setting{did_you_mean(name, _PROMPT_DEFAULTS)}",
                hint=f"prompts have {', '.join(_PROMPT_DEFAULTS)}",
            )
        type_of: Any = str if name in ("file", "part") else int
        if not _fits(type_of, value) or (name in ("captions", "sample") and value < 1):
            raise FluxIRError(
                f"{path}: {where} {name} must be {'text' if type_of is str else 'a number'}: got {value!r}"
            )
    if ("file" in table) == ("captions" in table):
        raise FluxIRError(
            f"{path}: {where} must say where prompts come from: a file, or so many captions of flux-tiny",
            hint='write file = "prompts.txt", or captions = 2000',
        )
    if "part" in table and table["part"] not in PARTS:
        raise FluxIRError(f"{path}: {where} part must be one of {', '.join(PARTS)}: got {table['part']!r}")
    if "file" in table and (odd := {"part", "alone"} & table.keys()):
        raise FluxIRError(f"{path}: {where} {min(odd)} is for captions: got a file", hint="leave it out")
    settled = {name: table.get(name, default) for name, default in _PROMPT_DEFAULTS.items()}
    return settled | ({"file": str((path.parent / table["file"]).resolve())} if "file" in table else {})


def _prompts(path: Path, use: str, table: Table) -> list[str]:
    """The prompts, each once: all of them, or a sample that keeps their order."""
    if table["file"] is None:
        try:
            prompts = captions(table["captions"], table["seed"], table["part"], table["alone"])
        except ValueError as error:
            raise FluxIRError(f"{path}: {use}: {error}") from error
    else:
        prompts = list(dict.fromkeys(read_prompts(Path(table["file"]))))
    size = table["sample"]
    if size is None:
        return prompts
    if size > len(prompts):
        raise FluxIRError(
            f"{path}: a sample of {size} prompts needs as many different ones: there are {len(prompts)}",
            hint="leave sample out, or give more prompts",
        )
    return [prompts[index] for index in sorted(random.Random(table["seed"]).sample(range(len(prompts)), size))]


def _check_disjoint(path: Path, prompts: Mapping[str, Sequence[str]]) -> None:
    """Raises FluxIRError if two uses share a prompt: features must not be picked, or judged, on prompts seen before."""
    seen: dict[str, str] = {}
    for use, some in prompts.items():
        for prompt in some:
            if prompt in seen:
                raise FluxIRError(
                    f"{path}: prompts for {seen[prompt]} and for {use} must differ: both have {prompt!r}",
                    hint='captions of different parts never meet: part = "T" to train, "A" to pick, "C" to report',
                )
            seen[prompt] = use


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a value from TOML has this type."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (UnionType, Union):
        return any(_fits(one, value) for one in inner)
    if origin is Literal:
        return value in inner
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return isinstance(value, list) and all(_fits(inner[0], element) for element in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return annotation in (str, bool, Path) and isinstance(value, str if annotation is Path else annotation)


def _words(annotation: Any) -> str:
    """The name of a type in a message."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (UnionType, Union):
        return " or ".join(dict.fromkeys(filter(None, map(_words, inner))))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list of {_words(inner[0])}"
    names = {int: "whole number", float: "number", str: "text", Path: "text", bool: "true or false", NoneType: ""}
    return names.get(annotation, "")


def _toml_line(key: str, value: Any) -> str:
    if value is None:
        return f"# {key}: the function's own choice\n"
    return f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
