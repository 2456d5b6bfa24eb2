"""The one exception a user can mend: what must hold, what came instead, and what to do about it; words for messages."""

import difflib
from collections.abc import Iterable


class FluxIRError(Exception):
    """An error a user can mend. Commands print it as one line plus the hint and leave with exit code 2.

    `message` states the invariant and what was received; `hint` says what to do next.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name a person most likely meant by `word`, or None if none comes near."""
    names = list(known)
    if close := difflib.get_close_matches(word.lower(), names, n=1):
        return close[0]
    starts = (name for name in names if word and name.startswith(word.lower()))
    holds = (name for name in names if len(word) > 2 and word.lower() in name)
    return next(starts, None) or next(holds, None)


def counted(number: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def in_units(size: int) -> str:
    """A number of bytes for people: 512 B, 3.4 MB, 80.7 GB (powers of ten, three digits)."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
