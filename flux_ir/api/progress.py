"""Progress of long work: it calls `progress` with events, and prints nothing itself."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Progress(NamedTuple):
    """So many of a stage's parts are done. A stage begins with 0 and ends with `total`."""

    stage: str
    done: int
    total: int


class Note(NamedTuple):
    """Something worth knowing, in one sentence."""

    text: str


class Begun(NamedTuple):
    """A generation has its id, which is the name of its folder."""

    generation_id: str


Watch = Callable[[Progress | Note | Begun], None]


def unwatched(event: Progress | Note | Begun) -> None:
    """Ignores every event."""


def follow(progress: Watch, stage: str, items: Iterable[T], total: int) -> Iterator[T]:
    """The items; each is reported when the next is asked for, and so done."""
    progress(Progress(stage, 0, total))
    for done, item in enumerate(items, start=1):
        yield item
        progress(Progress(stage, done, total))


@contextmanager
def phase(progress: Watch, stage: str) -> Iterator[None]:
    """A stage of one part."""
    progress(Progress(stage, 0, 1))
    yield
    progress(Progress(stage, 1, 1))
