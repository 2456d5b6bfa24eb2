"""Training: several autoencoders side by side on one resident batch, over one process or many, one step at a time.

`train` walks through batches and yields what each step measured, as tensors: nothing is read back from the device until
the caller asks (`Progress.read`). Files, tables and clocks are the caller's. With many processes each gives its share
of every batch; gradients are averaged, so that the weights are those of one process with the whole batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.distributed import Ranks
from flux_ir.errors import FluxIRError
from flux_ir.sae.checkpoints import SavedRun, Shard
from flux_ir.sae.data.filters import SiteKey
from flux_ir.sae.member import AcrossRanks, Member, Numbers, TrainSettings

__all__ = ["Member", "Numbers", "Progress", "TrainSettings", "Trainer", "state_of", "train"]


class Progress(NamedTuple):
    """A finished step: how far the run is, and its numbers by autoencoder."""

    optimiser_step: int
    """Steps finished."""
    tokens: int
    """Tokens seen by all processes."""
    numbers: dict[str, Numbers]

    def read(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        """The numbers as floats, averaged over processes, which must all ask. Waits for the device, once."""
        stacked = torch.stack([torch.stack([n.float() for n in numbers]) for numbers in self.numbers.values()])
        rows = AcrossRanks(ranks).mean(stacked).tolist()
        return {
            name: dict(zip(Numbers._fields, row, strict=True)) for name, row in zip(self.numbers, rows, strict=True)
        }


class Trainer:
    """All autoencoders of a run, and how far it is."""

    def __init__(self, members: Sequence[Member], settings: TrainSettings, ranks: Ranks) -> None:
        if settings.batch_tokens % ranks.world_size:
            raise FluxIRError(
                f"a batch is cut into equal shares: got {settings.batch_tokens} tokens, {ranks.world_size} processes",
                hint=f"make --batch_tokens a multiple of {ranks.world_size}",
            )
        if len({member.name for member in members}) < len(members):
            raise FluxIRError("two autoencoders of one run have the same name", hint="give each of them once")
        self.members, self.settings, self.ranks = list(members), settings, ranks
        self.steps_done = 0

    @property
    def tokens_seen(self) -> int:
        """Tokens that all processes have trained on."""
        return self.steps_done * self.settings.batch_tokens

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.settings.total_steps

    def step(self, batch: Mapping[SiteKey, Tensor]) -> Progress:
        """One optimiser step of every autoencoder on this process's share of a batch of raw tokens [n, d], by site."""
        number, seen = self.steps_done, self.tokens_seen
        normalised: dict[SiteKey, Tensor] = {}
        numbers = {}
        for member in self.members:
            if member.site not in normalised:  # all members of a site have its statistics
                normalised[member.site] = member.normalise(self._checked(batch[member.site]))
            numbers[member.name] = member.step(normalised[member.site], number, seen)
        self.steps_done += 1
        return Progress(self.steps_done, self.tokens_seen, numbers)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds once."""
        return {name: tensor for member in self.members for name, tensor in member.tensors().items()}

    def shard(self) -> Shard:
        """What this process adds to a checkpoint: its rows of the moments, if the first does not hold them as well."""
        tensors, rows = {}, {}
        for member in self.members:
            for key, moment in member.optimiser.state_dict().items():
                name = key.rpartition(".")[0]
                whole = len(member.parameters[name]) == len(moment)
                if not whole or self.ranks.is_first:
                    tensors[f"{member.name}/{key}"] = moment
                    rows[f"{member.name}/{key}"] = member.optimiser.rows(name)
        return Shard(tensors, rows)

    def load(self, saved: SavedRun) -> None:
        """Go on from a checkpoint, with any number of processes."""
        self.steps_done = int(saved.state["optimiser_step"])
        for member in self.members:
            member.load(saved, self.steps_done)

    def _checked(self, rows: Tensor) -> Tensor:
        share = self.settings.batch_tokens // self.ranks.world_size
        if len(rows) != share:
            raise FluxIRError(f"a batch must have {share} tokens for each process: got {len(rows)}")
        return rows.to(self.members[0].sae.W_dec.device, non_blocking=True)


def train(trainer: Trainer, batches: Iterable[Mapping[SiteKey, Tensor]]) -> Iterator[Progress]:
    """Step through batches until the run is finished; the caller saves and reads between the steps.

    Raises FluxIRError if the batches end before.
    """
    source = iter(batches)
    while not trainer.finished:
        batch = next(source, None)
        if batch is None:
            raise FluxIRError(
                f"the data ended after {trainer.steps_done} of {trainer.settings.total_steps} optimiser steps",
                hint="train on fewer tokens, or read the data more often with --epochs",
            )
        yield trainer.step(batch)


def state_of(trainer: Trainer, data: Mapping[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint, beside the state of the data."""
    return {"optimiser_step": trainer.steps_done, "tokens": trainer.tokens_seen, "data": dict(data)}
