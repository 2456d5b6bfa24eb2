"""Ctrl-C that waits for a good moment: between two steps, so that what is saved can be gone on with."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the second is what torchrun and batch systems send


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.made = False
        self.waits = False
        """Whether a good moment will come: as long as it will not, Ctrl-C stops at once."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """As long as the `with` lasts, the first Ctrl-C while `waits` only sets the flag; any other stops at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.made or not request.waits:
            raise KeyboardInterrupt
        request.made = True

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
