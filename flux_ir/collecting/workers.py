"""A network for each thread that works beside others: replicas that share their weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


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
