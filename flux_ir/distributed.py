"""Many processes, one job: what `torchrun` starts. (One process and many devices is `models.placement`'s matter.)

Without torchrun's environment variables there is one process, no process group, and every function here does nothing.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from flux_ir.errors import FluxIRError

T = TypeVar("T")

# How long a rank waits in a collective. Training ranks keep step; where features are scored they may be hours apart.
PATIENCE = timedelta(days=7)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Which of the job's processes this one is: `rank` of `world_size`, and `local_rank` among those of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: Store | None = field(default=None, repr=False, compare=False)
    """Where ranks count together while each works at its own pace; None: this process is on its own."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def device(self, kind: str | None) -> torch.device:
        """The device of this rank: `cpu`, or the GPU of its number on this machine (None: a GPU where there is one).

        Raises FluxIRError where a machine has fewer GPUs than processes.
        """
        gpus = torch.cuda.device_count()
        if kind == "cpu" or (kind is None and gpus == 0):
            return torch.device("cpu")
        if kind not in (None, "cuda"):
            if self.world_size > 1:
                raise FluxIRError(
                    f"with several processes --device must be cpu or cuda: got {kind!r}",
                    hint="every process takes the GPU of its own number",
                )
            return torch.device(str(kind))
        if self.local_rank >= gpus:
            raise FluxIRError(
                f"process {self.local_rank} of this machine needs a GPU of its own: there are {gpus}",
                hint="start as many processes as there are GPUs with --nproc_per_node, or pass --device cpu",
            )
        return torch.device("cuda", self.local_rank)

    def count(self, name: str, more: int = 1) -> int:
        """Adds to a counter that all ranks share, without waiting for any; returns its value (one process alone: 0)."""
        return 0 if self.store is None else self.store.add(name, more)


_JOINED: list[Ranks] = []  # the job that this process is part of, while it is


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the job that torchrun's variables describe for as long as the `with` lasts. Without them: one process.

    Within another `with` of this kind it is the same job. Tensors on CPUs are summed by gloo, those on GPUs by nccl.
    Raises FluxIRError for variables that make no sense.
    """
    if _JOINED:
        yield _JOINED[-1]
        return
    ranks = _from_environment()
    if ranks is None:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store, _, _ = next(iter(rendezvous("env://", ranks.rank, ranks.world_size)))
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=PATIENCE)
    try:
        own = PrefixStore("flux_ir", store)
        _JOINED.append(Ranks(ranks.rank, ranks.world_size, ranks.local_rank, own))
        yield _JOINED[-1]
    finally:
        _JOINED.clear()
        dist.destroy_process_group()


def all_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all ranks, in place and on each of them; the tensor as it is for one process."""
    if ranks.store is not None:
        dist.all_reduce(tensor)
    return tensor


def all_max(number: int, ranks: Ranks) -> int:
    """The largest of the numbers that the ranks pass, on each of them."""
    if ranks.store is None:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def wait_for_all(ranks: Ranks) -> None:
    """Returns once every rank has come here."""
    if ranks.store is not None:
        dist.all_reduce(torch.zeros(1))  # on the CPU, so by gloo: a barrier of nccl would need to know the device


def arrivals(name: str, ranks: Ranks, *, seconds: float = 0.1) -> Iterator[int]:
    """Says that this rank has come to a point, and yields how many have, every so many seconds, until all of them have.

    Unlike in `wait_for_all`, Ctrl-C ends the wait at once. Every point of a job has a name of its own.
    """
    arrived = ranks.count(name)
    while arrived < ranks.world_size and ranks.store is not None:
        yield arrived
        time.sleep(seconds)
        arrived = ranks.count(name, 0)
    yield ranks.world_size


def first_rank_value(value: T, ranks: Ranks) -> T:
    """The value that rank 0 passed, on every rank. Anything that can be pickled."""
    if ranks.store is None:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def _from_environment() -> Ranks | None:
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return None
    try:
        rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank = int(given.get("LOCAL_RANK", 0))
    except ValueError:
        rank, world_size, local_rank = 0, 0, 0
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    if not 0 <= rank < world_size or local_rank < 0:
        raise FluxIRError(
            f"RANK must be a whole number below WORLD_SIZE: got {told}", hint="start with torchrun, or unset them"
        )
    if "MASTER_ADDR" not in given or "MASTER_PORT" not in given:
        raise FluxIRError(
            f"ranks meet at MASTER_ADDR and MASTER_PORT: got only {told}", hint="start with torchrun, or set both"
        )
    return Ranks(rank, world_size, local_rank)
