"""The one exception a user can mend: what must hold, what came instead, and what to do about it."""


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
