"""Threads that work side by side, one core each, with results in the order of what they were given."""

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)
Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(
    work: Callable[[Given], Made], items: Iterable[Given], workers: int, *, torch_threads: int | None = 1
) -> Generator[Made, None, None]:
    """`work` of every item, by so many threads, in the order of the items.

    Each thread computes on one core: what it makes has the same bits however many there are. (`torch_threads` None is
    for work that does not compute with torch, beside a consumer that does.) No more than twice as many items as threads
    are taken ahead, so memory stays flat. What one raises is raised here; the rest is dropped then, as it is when the
    consumer leaves.
    """
    available = torch.get_num_threads()
    if torch_threads is None:
        pool = ThreadPoolExecutor(workers, "in_order")
    else:
        pool = ThreadPoolExecutor(workers, "collect", initializer=torch.set_num_threads, initargs=(torch_threads,))
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if torch_threads is not None:
            torch.set_num_threads(available)  # a thread sets the number for itself, and for all that start later


def replicas(network: Network, count: int) -> "SimpleQueue[Network]":
    """The network once per thread: all share its weights, and each has modules of its own to listen at."""
    networks: SimpleQueue[Network] = SimpleQueue()
    networks.put(network)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    for _ in range(count - 1):
        networks.put(copy.deepcopy(network, dict(shared)))
    return networks


@contextmanager
def borrowed(networks: "SimpleQueue[Network]") -> Iterator[Network]:
    """One of the replicas, for as long as the `with` lasts."""
    network = networks.get()
    try:
        yield network
    finally:
        networks.put(network)
