"""How the options of a command are declared: one frozen dataclass whose fields are its flags.

A field has a type, a default, and what `option` says about it. It is checked whenever the dataclass is constructed,
from the command line or from Python; `parse` turns the same fields into flags, and `help` into a help page.
Nothing heavy is imported here, so that `--help` answers at once.
"""

import math
import re
import shlex
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from flux_ir.api.arguments import LEAST
from flux_ir.errors import FluxIRError, nearest

T = TypeVar("T")
Scalar = str | int | float | bool | Path

REQUIRED: Any = MISSING  # the default of an option that has none

OUTPUT_DIR = "output_dir"  # the flag that makes folders, wherever it stands
_ONE = {int: "a whole number", float: "a number", bool: "True or False", Path: "a path", str: "text"}
_MANY = {int: "whole numbers", float: "numbers", bool: "True or False", Path: "paths", str: "names"}
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_NONE = ("None", "none")
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class FlagFacts:
    """What `option` says about a field, beyond its type and default."""

    help: str
    unit: str = ""
    group: str = ""
    choices: tuple[Scalar, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None
    free_text: bool = False
    default_text: str = ""
    elsewhere: tuple[str, ...] = ()
    positional: bool = False


def option(
    default: T,
    *,
    help: str,  # noqa: A002 (the word the help page uses)
    unit: str = "",
    group: str = "",
    choices: tuple[Scalar, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    multiple_of: int | None = None,
    free_text: bool = False,
    default_text: str = "",
    elsewhere: tuple[str, ...] = (),
    positional: bool = False,
) -> T:
    """Declares one field of an `Options` dataclass, in place of its bare default.

        width: int = option(256, help="width of the picture", unit="px", multiple_of=16)

    `default` may be `REQUIRED`. `group` is its heading on the help page; `default_text` stands there for a default that
    its value does not explain (`None`: "4 for flux-schnell, else 50"). `free_text` marks prompts and the like: the word
    None is text there, while for every other `X | None` field it means None. `elsewhere` are the names that other
    programs have for it: whoever types one is told ours. `positional` allows the value alone, as the first word.

    A number whose name stands in `LEAST` needs no `minimum`: it has the bound that Python's arguments have.

    A field whose flag would be a word of Python's own has an underscore at its end: `from_` is `--from`.
    """
    facts = FlagFacts(
        help, unit, group, choices, minimum, maximum, multiple_of, free_text, default_text, elsewhere, positional
    )
    return field(default=default, metadata={"facts": facts})


@dataclass(frozen=True)
class Flag:
    """One field of an `Options` dataclass, as a flag: `kind` is its type (of one element, where `many`).

    A switch, of kind bool, may have `choices`: words that it takes beside True and False.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    choices: tuple[Scalar, ...]
    default: Any
    facts: FlagFacts

    @property
    def spelling(self) -> str:
        """The flag as it is typed, without its dashes."""
        return self.name.rstrip("_")

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is MISSING

    def read(self, text: str) -> Any:
        """The value that `text` from the command line stands for. Free text is never interpreted.

        Raises FluxIRError if the text stands for no value of the field's type.
        """
        if self.optional and not self.facts.free_text and text in _NONE:
            return None
        try:
            return self._read_list(text) if self.many else self._read_one(text)
        except ValueError:
            raise self._wrong_type(text) from None

    def check(self, value: object) -> None:
        """Raises FluxIRError unless `value` is of the field's type, one of its choices, and within its bounds."""
        if (value is None and self.optional) or (self.many and value == () == self.default):
            return
        if not self.many:
            self._check_one(value)
            return
        if not isinstance(value, tuple) or not value:
            raise self._wrong_type(value)
        for element in value:
            self._check_one(element)

    def _read_list(self, text: str) -> tuple[Scalar, ...]:
        """Elements between commas. Numbers may stand in brackets, and whole numbers may be given as a range, 0-3."""
        elements: list[Scalar] = []
        for part in (text if self.kind is str else text.strip(" []()")).split(","):
            if self.kind is int and (ends := _RANGE.fullmatch(part.strip())):
                first, last = int(ends[1]), int(ends[2])
                if first > last:
                    raise ValueError(part)
                elements.extend(range(first, last + 1))
            else:
                elements.append(self._read_one(part.strip()))
                if elements[-1] == "":
                    raise ValueError(text)
        return tuple(elements)

    def _read_one(self, text: str) -> Scalar:
        if self.kind is bool:
            if text in self.choices:
                return text
            if text.lower() not in _TRUTH:
                raise ValueError(text)
            return _TRUTH[text.lower()]
        if self.kind is Path:
            return _read_path(text)
        return self.kind(text)

    def _check_one(self, value: object) -> None:
        if self.kind is bool and value in self.choices:
            return
        if not _is_a(self.kind, value):
            raise self._wrong_type(value)
        if self.choices and self.kind is not bool and value not in self.choices:
            names = [str(choice) for choice in self.choices]
            near = nearest(str(value), names)
            raise FluxIRError(
                f"--{self.spelling} must be {_either(names)}: got {value!r}",
                hint=f"did you mean {near}?" if near else None,
            )
        if self.name == OUTPUT_DIR and "," in str(value):
            # Flags that take folders, such as --captures, take several with commas between them.
            raise FluxIRError(
                f"--{OUTPUT_DIR} must be a folder that other flags can name, so without commas: got {str(value)!r}",
                hint="name another folder",
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_bounds(value)

    def _check_bounds(self, value: float) -> None:
        facts, wanted, hint = self.facts, "", None
        if not math.isfinite(value):
            wanted = "a finite number"
        elif facts.minimum is not None and value < facts.minimum:
            wanted, hint = f"at least {facts.minimum}", f"use {facts.minimum} or more"
        elif facts.maximum is not None and value > facts.maximum:
            wanted, hint = f"at most {facts.maximum}", f"use {facts.maximum} or less"
        elif facts.multiple_of is not None and value % facts.multiple_of:
            wanted = f"a multiple of {facts.multiple_of}"
            below = int(value // facts.multiple_of * facts.multiple_of)
            low, high = facts.minimum or 1, facts.maximum or math.inf
            hint = "use " + " or ".join(str(n) for n in (below, below + facts.multiple_of) if low <= n <= high)
        if wanted:
            raise FluxIRError(f"--{self.spelling} must be {wanted}: got {value}", hint=hint)

    def _wrong_type(self, value: object) -> FluxIRError:
        wanted = f"{_MANY[self.kind]} separated by commas" if self.many else _ONE[self.kind]
        if self.kind is bool and self.choices:
            wanted = _either(["True", "False", *map(str, self.choices)])
        if self.optional and not self.facts.free_text:
            wanted += " or None"
        hints = {int: "write them like 0,2,5 or 0-3", str: f"write --{self.spelling} NAME,NAME"}
        hint = hints.get(self.kind) if self.many else None
        return FluxIRError(f"--{self.spelling} must be {wanted}: got {value!r}", hint=hint)


@dataclass(frozen=True)
class Options:
    """What every command's options inherit from: a frozen dataclass that checks its fields when it is constructed.

    A subclass with rules of its own (two options that exclude each other) calls `super().__post_init__()` first.
    """

    def __post_init__(self) -> None:
        for flag in flags(type(self)):
            flag.check(getattr(self, flag.name))

    def given(self, settings: type) -> dict[str, Any]:
        """The values that `settings`, a dataclass, takes of these: a setting has the name of its flag.

        A setting without a flag keeps its default: no command of its work offers it.
        """
        return {field.name: getattr(self, field.name) for field in fields(settings) if hasattr(self, field.name)}


def flags(options_type: type[Options]) -> list[Flag]:
    """The flags of a command: its own in the order they are declared, then those it shares with other commands."""
    declared = {field.name: field for field in fields(options_type)}
    names = dict.fromkeys(name for base in options_type.__mro__ for name in getattr(base, "__annotations__", {}))
    ordered = [declared[name] for name in names if name in declared]
    return [_flag(field.name, field.type, field.default, field.metadata.get("facts")) for field in ordered]


def command_line(options: Options, **changes: object) -> str:
    """What is typed for these options, with some of them changed: flags at their defaults are left out."""
    words: list[str] = []
    for flag in flags(type(options)):
        value = changes.get(flag.name, getattr(options, flag.name))
        if value == flag.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag.spelling}" if value else f"--no{flag.spelling}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{flag.spelling}={text}"] if text.startswith("-") else [f"--{flag.spelling}", text]
    return shlex.join(words)


def _flag(name: str, annotation: Any, default: Any, facts: FlagFacts | None) -> Flag:
    """Reads `X`, `X | None`, `tuple[X, ...]` and `tuple[X, ...] | None`, where X is a scalar type or a Literal.

    And `bool | Literal[...]`: a switch that takes some words as well.
    """
    if facts is None:
        raise TypeError(f"{name}: every field of an Options dataclass is declared with option(default, help=...)")
    arms = get_args(annotation) if get_origin(annotation) in (UnionType, Union) else ()
    words = next((get_args(arm) for arm in arms if get_origin(arm) is Literal), ())
    if bool in arms and words:
        return Flag(name, bool, many=False, optional=False, choices=words, default=default, facts=facts)
    optional = NoneType in arms
    inner = next(arm for arm in arms if arm is not NoneType) if optional else annotation
    many = get_origin(inner) is tuple
    element = get_args(inner)[0] if many else inner
    choices = get_args(element) if get_origin(element) is Literal else facts.choices
    kind = type(choices[0]) if get_origin(element) is Literal else element
    if kind not in _ONE:
        raise TypeError(f"{name}: no flag can be made of the type {annotation}")
    if kind in (int, float) and facts.minimum is None:
        facts = replace(facts, minimum=LEAST.get(name))
    return Flag(name, kind, many, optional, choices, default, facts)


def _read_path(text: str) -> Path:
    """A path, with a leading ~ expanded: shells leave it alone after `--output_dir=`."""
    if not text:
        raise ValueError("an empty path would silently mean the current folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody without a home folder
        raise ValueError(text) from error


def _is_a(kind: type, value: object) -> bool:
    """Whether `value` is of `kind`; a whole number is also a number, but True is not a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
