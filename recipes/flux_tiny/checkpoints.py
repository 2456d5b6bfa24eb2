"""Checkpoints of one training stage: written by time, complete or absent, and enough to go on bit for bit.

Every draw of a step is seeded by the step's number, so a checkpoint needs no random state: weights, optimiser, schedule
and the number of steps done are the whole state.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from flux_ir.errors import FluxIRError


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state dict: a network, an optimiser, a schedule, a moving average."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of one optimiser step: the same after a resume as before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Checkpoint:
    """The checkpoint file of one stage in a run folder."""

    def __init__(self, path: Path, *, every_seconds: float = 120.0) -> None:
        self.path = path
        self.every_seconds = every_seconds

    def steps(self, total: int, **parts: Stateful) -> Iterator[int]:
        """The steps still to do, `parts` restored first. Saves as time passes and after the last step.

        Only between steps: a stop in the middle of one would leave weights that no step count describes, so an
        interrupted run goes on from the last save, at most `every_seconds` back.
        """
        done = self._restore(total, parts)
        saved_at = time.monotonic()
        for step in range(done, total):
            yield step
            if step + 1 == total or time.monotonic() - saved_at > self.every_seconds:
                self._save(step + 1, total, parts)
                saved_at = time.monotonic()

    def weights(self, part: str) -> dict[str, Any]:
        """The saved state of one part, for the stages that follow. Raises FluxIRError if there is none."""
        if not self.path.exists():
            raise FluxIRError(f"no checkpoint at {self.path}", hint="run the stages before this one first")
        return torch.load(self.path, map_location="cpu", weights_only=True)[part]

    def _restore(self, total: int, parts: dict[str, Stateful]) -> int:
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if "schedule" in parts and state["total"] != total:  # a one-cycle schedule is drawn over its whole length
            raise FluxIRError(
                f"{self.path} belongs to a schedule of {state['total']} steps, this one has {total}",
                hint="use the same number of steps, or another --run_dir",
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["done"]

    def _save(self, done: int, total: int, parts: dict[str, Stateful]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"done": done, "total": total, **states}, beside)
        beside.replace(self.path)
