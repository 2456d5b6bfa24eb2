"""The page that `--help` prints: plain text, aligned, made from the options dataclass and nothing else."""

import inspect
import os
import shutil
import sys
import textwrap
from pathlib import Path

from flux_ir.commands.cli.option import Flag, Options, flags

_FLAG_COLUMN_CHARS = 38  # a longer flag gets a line of its own
_FOOTER = """\
A value follows its flag as --name value or --name=value; inside a name, - and _ are the same. A [no] flag is a switch:
--name, --noname, --name True, --name=False. Text is taken as typed; a text that starts with dashes is written
--name="--like this".
"""


def help_page(options_type: type[Options], prog: str) -> str:
    """The whole page: purpose, usage, and every flag with its unit, choices and default."""
    purpose, _, details = inspect.cleandoc(options_type.__doc__ or "").partition("\n\n")
    all_flags = flags(options_type)
    required = [_spelling(flag) for flag in all_flags if flag.required]
    parts = [_wrap(purpose, ""), f"{bold('usage:')} {' '.join([prog, *required, '[--flag value ...]'])}"]
    parts += [_wrap(paragraph, "") for paragraph in details.split("\n\n") if paragraph]
    column = min(_FLAG_COLUMN_CHARS, max((len(_spelling(flag)) for flag in all_flags), default=0) + 4)
    for group in dict.fromkeys(flag.facts.group for flag in all_flags):
        rows = [_row(flag, column) for flag in all_flags if flag.facts.group == group]
        parts.append("\n".join([bold(f"{group or 'options'}:"), *rows]))
    parts.append(_wrap(_FOOTER, ""))
    return "\n\n".join(parts)


def table(rows: dict[str, str], column: int) -> str:
    """Two aligned columns, the second wrapped to the terminal."""
    return "\n".join(_two_columns(left, right, column) for left, right in rows.items())


def bold(text: str) -> str:
    """Bold on a terminal, and plain in a file, a pipe, or where NO_COLOR is set."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def placeholder(flag: Flag) -> str:
    """What stands for the value on the help page: TEXT, N, euler|x0|both, nothing for a switch."""
    choices = "|".join(str(choice) for choice in flag.choices)
    if choices and len(choices) <= 16:
        return choices
    one = {int: "N", float: "X", bool: "", Path: "PATH", str: "TEXT" if flag.facts.free_text else "NAME"}[flag.kind]
    return f"{one},{one},.." if flag.many else one


def _row(flag: Flag, column: int) -> str:
    facts = [text for text in (flag.facts.unit, _bounds(flag)) if text]
    if flag.choices and "|" not in placeholder(flag):
        facts.append("one of " + ", ".join(str(choice) for choice in flag.choices))
    facts.append("required" if flag.required else f"default: {_default_text(flag)}")
    return _two_columns(_spelling(flag), f"{flag.facts.help} ({'; '.join(facts)})", column)


def _bounds(flag: Flag) -> str:
    """The bounds worth reading: not that a count is at least one, nor how far a machine can count."""
    facts = flag.facts
    if facts.multiple_of is not None:
        return f"a multiple of {facts.multiple_of}"
    if facts.maximum is not None and facts.maximum < 2**31:
        return f"at most {facts.maximum}" if facts.minimum is None else f"{facts.minimum} to {facts.maximum}"
    return f"at least {facts.minimum}" if facts.minimum is not None and facts.minimum > 1 else ""


def _spelling(flag: Flag) -> str:
    if flag.kind is bool and not flag.optional:
        return f"--[no]{flag.spelling}" + (f" [{placeholder(flag)}]" if flag.choices else "")
    if flag.facts.positional:
        return placeholder(flag)
    return f"--{flag.spelling} {placeholder(flag)}".rstrip()


def _default_text(flag: Flag) -> str:
    if flag.facts.default_text:
        return flag.facts.default_text
    if isinstance(flag.default, tuple):
        return ",".join(str(element) for element in flag.default)
    return f'"{flag.default}"' if flag.facts.free_text and flag.default is not None else str(flag.default)


def _two_columns(left: str, right: str, column: int) -> str:
    indent = " " * column
    start = f"  {left}".ljust(column)
    wrapped = _wrap(right, indent)
    return start + wrapped[column:] if len(start) == column and start.endswith(" ") else f"{start}\n{wrapped}"


def _wrap(text: str, indent: str) -> str:
    width = min(110, max(60, shutil.get_terminal_size((110, 24)).columns))
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
