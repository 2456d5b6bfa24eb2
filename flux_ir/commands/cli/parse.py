"""The front of every command: python-fire splits the words and constructs the options, behind two guards.

First, an unknown or misspelt flag stops at once with the nearest name, before anything loads. Second, free text stays
text: fire would read `cat, dog` as a tuple, `2024` as a number and drop what follows a `#`; here every value reaches
the field it is for as text (`Flag.read`). The same place turns what a user can mend into one line and exit code 2.
"""

import errno
import os
import re
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from flux_ir.commands.cli.help import help_page, placeholder
from flux_ir.commands.cli.option import Flag, Options, flags
from flux_ir.errors import FluxIRError, nearest

AnyOptions = TypeVar("AnyOptions", bound=Options)

MENDABLE = 2  # exit codes
INTERRUPTED = 128 + 2  # as a shell reports SIGINT
READER_LEFT = 128 + 13  # as a shell reports SIGPIPE

_HELP = ("-h", "--help")
_FLAG = re.compile(r"--[^\W\d_][\w-]*(=.*)?", re.DOTALL)
_FLAG_TO_FIRE = re.compile("--|-[a-zA-Z]")  # what starts like this, fire takes for a flag
_NEVER_TYPED = "\0"  # as fire's separator: by default it is -, which may be a value
_DASHES = "-\N{EN DASH}\N{EM DASH}"  # what editors make of two hyphens

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_HINTS = {
    **dict.fromkeys(_FULL, "free some space, or write to another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions, or choose another place"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file stands where a folder is needed: choose another place"),
}


def launch(
    options_type: type[AnyOptions],
    run: Callable[[AnyOptions], int | None],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
) -> int:
    """Runs a command with the options its flags describe, and returns the exit code.

    `argv` are the words after the program's name, `prog` (both taken from the command line unless given).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = prog or Path(sys.argv[0]).name

    def work() -> int | None:
        if any(word in _HELP for word in words):
            print(help_page(options_type, name))
            return 0
        return _run(run, parse(options_type, words, prog=name))

    return exit_code(work)


def exit_code(work: Callable[[], int | None]) -> int:
    """Does `work` and returns its exit code; what a user can mend becomes one line. All else keeps its traceback."""
    try:
        code = work() or 0
        sys.stdout.flush()
    except FluxIRError as error:
        return _complain(error.message, error.hint)
    except KeyboardInterrupt:
        after_the_caret_c = "\n" if sys.stderr.isatty() else ""
        print(f"{after_the_caret_c}stopped; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        left = [_reader_left(stream) for stream in (sys.stdout, sys.stderr)]
        if not any(left):
            raise  # some other pipe, such as a video encoder's
        return READER_LEFT
    except OSError as error:
        if error.errno not in _HINTS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{str(error.strerror).lower()}", _HINTS[error.errno])
    return code


def parse(options_type: type[AnyOptions], words: Sequence[str], *, prog: str) -> AnyOptions:
    """The options these words describe. Raises FluxIRError at the first word that is wrong."""
    known = flags(options_type)
    command = checked_words(words, known, prog=prog)

    import fire  # 60 ms: only once the words are in order
    from fire.decorators import SetParseFns

    readers = {flag.name: flag.read for flag in known}
    fires_own = ["--", f"--separator={_NEVER_TYPED}"]
    return fire.Fire(
        SetParseFns(**readers)(options_type), command=[*command, *fires_own], name=prog, serialize=lambda _: None
    )


def checked_words(words: Sequence[str], known: Sequence[Flag], *, prog: str) -> list[str]:
    """The words, once every flag among them is known, given once and has its value; fire then splits them.

    They stay as typed but for two spellings that fire would misread: a hyphen behind `--no`, and a text that starts
    with dashes, which is joined to its flag by `=`. A word that looks like a flag is never taken for a value.
    Raises FluxIRError on an unknown, repeated or missing flag, a missing value, and a word that follows no flag.
    """
    by_name = {flag.spelling: flag for flag in known}
    given: set[str] = set()
    checked: list[str] = []
    rest = list(words)
    alone = next((flag for flag in known if flag.facts.positional), None)
    if alone is not None and rest and not rest[0].startswith("-"):
        rest[:1] = [f"--{alone.spelling}={rest[0]}"]
    while rest:
        word = rest.pop(0)
        spelling, equals, text = word.partition("=")
        flag, negated = _find(word, by_name, prog=prog)
        if flag.name in given:
            hint = "give it once, with commas between its values" if flag.many else "give it once"
            raise FluxIRError(f"--{flag.spelling} is given twice", hint=hint)
        given.add(flag.name)
        if negated and equals:
            hint = f"write {spelling}, or --{flag.spelling}"
            raise FluxIRError(f"{spelling} takes no value: got {text!r}", hint=hint)
        if flag.name != flag.spelling:  # fire must find the field
            word = f"--{flag.name}{equals}{text}"
        checked.append(f"--no{flag.name}" if negated else word)
        if negated or equals:
            continue
        if rest and not _looks_like_flag(rest[0]):
            value = rest.pop(0)
            checked[-1:] = [f"{word}={value}"] if _FLAG_TO_FIRE.match(value) else [word, value]
        elif flag.kind is not bool:  # fire would read True
            raise _no_value(flag, rest)
    if missing := next((flag for flag in known if flag.required and flag.name not in given), None):
        raise FluxIRError(
            f"--{missing.spelling} is required: {missing.facts.help}", hint=f"{prog} --help lists all flags"
        )
    return checked


def _find(word: str, by_name: dict[str, Flag], *, prog: str) -> tuple[Flag, bool]:
    """The flag a word spells, and whether it spells its negation."""
    spelling = word.partition("=")[0]
    name = spelling.lstrip(_DASHES).replace("-", "_")
    if _looks_like_flag(word):
        if name in by_name:
            return by_name[name], False
        switch = by_name.get(name.removeprefix("no").lstrip("_")) if name.startswith("no") else None
        if switch is not None and switch.kind is bool:
            return switch, True
    elif not word.startswith(tuple(_DASHES)):
        raise FluxIRError(
            f"{word!r} follows no flag: every value is given by name",
            hint='quote a text of several words: --prompt "a red circle"' if "prompt" in by_name else None,
        )
    if ours := next((flag for flag in by_name.values() if name in flag.facts.elsewhere), None):
        raise FluxIRError(
            f"{spelling}: no such flag; here it is --{ours.spelling}",
            hint=f"--{ours.spelling} {placeholder(ours)}: {ours.facts.help}",
        )
    near = nearest(name, by_name)
    meant = f"; did you mean --{near}?" if near else ""
    raise FluxIRError(f"{spelling}: no such flag{meant}", hint=f"{prog} --help lists all flags")


def _no_value(flag: Flag, rest: Sequence[str]) -> FluxIRError:
    hint = f"write --{flag.spelling} {placeholder(flag)}"
    if rest and flag.kind is str:
        hint = f"a text that starts with dashes is written --{flag.spelling}={shlex.quote(rest[0])}"
    return FluxIRError(f"--{flag.spelling} needs a value", hint=hint)


def _looks_like_flag(word: str) -> bool:
    """`--name` or `--name=value`; not `-5`, `-`, `- a cat` or `--a cat`, which are values."""
    return _FLAG.fullmatch(word) is not None


def _run(run: Callable[[AnyOptions], int | None], options: AnyOptions) -> int | None:
    """Runs the command; an error of a full disk that names no file is given the folder that was written to."""
    try:
        return run(options)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:  # a failed write names no file, unlike a failed open
            error.filename = getattr(options, "output_dir", None)
        raise


def _complain(message: str, hint: str | None) -> int:
    # torchrun ends all processes as soon as one has failed: this line may be the only one that is seen.
    rank = os.environ.get("RANK", "0")
    whose = "" if rank == "0" else f"rank {rank}: "
    print(f"{whose}error: {' '.join(message.splitlines())}", file=sys.stderr)
    if hint:
        print(f"{whose}hint: {' '.join(hint.splitlines())}", file=sys.stderr)
    return MENDABLE


def _reader_left(stream: TextIO) -> bool:
    """Whether the reader of this stream is gone (`| head`); if so, what is left to write goes nowhere, quietly."""
    if not hasattr(select, "poll"):
        return False  # Windows: the error keeps its traceback
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone
