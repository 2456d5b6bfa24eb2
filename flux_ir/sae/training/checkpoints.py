"""Checkpoints of a training run: complete or absent, without pickle, and enough to go on bit for bit.

A checkpoint is a folder: `state.json` (counters, settings, position in the data, curves), `shared.safetensors` (what
all processes have alike: weights, statistics, thresholds, averages, dead counters) and `rank_0000`, `rank_0001`...
`.safetensors` (the rows of the moments that each process keeps). The shuffle buffer is not saved: it is read again. A
checkpoint is written to a temporary folder that is renamed after a barrier. Draws are seeded by the step they happen
in, so there is no random state to save.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ir.distributed import Ranks, all_sum, wait_for_all
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, disk_error, read_json, write_json
from flux_ir.sae.training.optimiser import RowRange

KEPT = 2  # one more than needed: the newest may be damaged
DIVERGED_HINT = (
    "pass a lower --lr with another --name, and keep --clip at 1: the same command would come to the same end"
)
_NAME = re.compile(r"step_(\d{9})")


class MomentShard(NamedTuple):
    """What one process keeps of the moments: tensors by name, and which rows of the whole they are."""

    tensors: dict[str, Tensor]
    rows: dict[str, RowRange]


class TrainingCheckpoints:
    """The checkpoints of one run in a folder. Every process calls `save` at the same step."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks

    def newest(self) -> Path | None:
        """The checkpoint of the latest step, or None if the run has not saved any."""
        return max(self._complete(), default=None)

    def last_good(self) -> tuple["SavedRun | None", list[FluxIRError]]:
        """The latest checkpoint that can be resumed from, read, and what is wrong with those after it.

        None: the run has not saved any. Raises FluxIRError if it has, and none of them can be read.
        """
        faults: list[FluxIRError] = []
        for path in sorted(self._complete(), reverse=True):
            try:
                return SavedRun(path), faults
            except FluxIRError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        return None, []

    def save(self, step: int, state: Mapping[str, Any], shared: Mapping[str, Tensor], shard: MomentShard) -> Path:
        """Write the checkpoint of a step: `state` as JSON, `shared` and `shard` as tensors. Keeps the last two.

        Of `state` and `shared`, those of the first process are written. An empty shard is not.

        Raises FluxIRError, on every process, and writes nothing where a number is not finite: two such checkpoints
        would be all that is left of the run.
        """
        final = self.folder / f"step_{step:09d}"
        self._check_finite(step, {**shared, **shard.tensors})
        with self._temporary_folder(final) as partial:
            if self.ranks.is_first:
                _save(partial / "shared.safetensors", shared)
                write_json(partial / "state.json", state)
            if shard.tensors:
                rows = {name: list(bounds) for name, bounds in shard.rows.items()}
                _save(partial / f"rank_{self.ranks.rank:04d}.safetensors", shard.tensors, {"rows": json.dumps(rows)})
        if self.ranks.is_first:
            for old in sorted(self._complete())[:-KEPT]:
                shutil.rmtree(old)
        return final

    def remove(self) -> None:
        """Delete all checkpoints: the run is finished and its results are written."""
        if self.ranks.is_first and self.folder.exists():
            shutil.rmtree(self.folder)
            with suppress(OSError):  # there are others beside it
                self.folder.parent.rmdir()

    def _check_finite(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        wrong = not_finite(tensors)
        if not all_sum(torch.tensor([len(wrong)]), self.ranks).item():
            return
        kept = self.newest()
        before = f"{kept} is from before, and kept" if kept else "nothing was saved before"
        raise FluxIRError(
            f"the training diverged: after {step} optimiser steps {wrong[0] if wrong else 'a moment'} is not finite, "
            f"so no checkpoint was written; {before}",
            hint=DIVERGED_HINT,
        )

    def _complete(self) -> list[Path]:
        return [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]

    @contextmanager
    def _temporary_folder(self, final: Path) -> Iterator[Path]:
        """A folder that all processes write to, which is renamed to `final` when the last has finished."""
        partial = final.with_name(f"{final.name}.partial")
        if self.ranks.is_first:
            try:
                for stale in self.folder.glob("*.partial"):  # of a process that was killed
                    shutil.rmtree(stale)
                partial.mkdir(parents=True)
            except OSError as error:
                raise disk_error(partial, error) from error
        wait_for_all(self.ranks)
        try:
            yield partial
        except BaseException:
            if self.ranks.world_size == 1:  # the others may still be writing to it
                shutil.rmtree(partial, ignore_errors=True)
            raise
        wait_for_all(self.ranks)
        if self.ranks.is_first:
            if final.exists():  # a run that was resumed from here and stopped before its next step
                shutil.rmtree(final)
            partial.replace(final)
        wait_for_all(self.ranks)


class SavedRun:
    """A checkpoint, read: `state` and `shared` at once, rows of moments when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = read_json(
            path / "state.json", hint="it is no checkpoint of this program: delete the folder"
        )
        try:
            self.shared = load_file(path / "shared.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise FluxIRError(f"{path} is no checkpoint of this program: {error}", hint="delete it") from error
        if wrong := not_finite(self.shared):
            raise FluxIRError(
                f"{path} cannot be resumed from: {wrong[0]} is not finite", hint=f"delete it, and {DIVERGED_HINT}"
            )
        self._shards = sorted(path.glob("rank_*.safetensors"))

    def moment(self, name: str, rows: RowRange) -> Tensor:
        """Rows of a moment, put together from the processes that kept them."""
        parts = []
        for shard in self._shards:
            with safe_open(shard, framework="pt") as file:
                bounds = json.loads(file.metadata()["rows"]).get(name)
                if bounds is None:
                    continue
                start, stop = max(rows.start, bounds[0]), min(rows.stop, bounds[1])
                if start < stop:
                    parts.append(file.get_slice(name)[start - bounds[0] : stop - bounds[0]])
        if sum(map(len, parts)) != rows.stop - rows.start:
            raise FluxIRError(
                f"{self.path} lacks rows of {name}: {sum(map(len, parts))} of {rows.stop - rows.start} are there",
                hint="the processes must write to one shared folder",
            )
        return torch.cat(parts)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with complete_file(path) as beside:
        save_file(on_host, beside, metadata)
